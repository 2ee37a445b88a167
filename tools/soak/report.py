"""The report of a run: its events, refusals and faults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from iobmd.cli.folding import folded
from iobmd.constants import IOReturn

from .board import KINDS, Thread

VERSION = 1
FAULTS = {
    "frames_moved": "pages of pinned memory moved",
    "wrong_addresses": "a physical address is not that of the page",
    "wrong_purge_states": "a purgeable state does not match the memory",
    "wrong_bytes": "bytes differ",
    "programs_disturbed": "a target was disturbed, or remained changed",
    "unexpected_refusals": "a refusal that nothing explains",
    "unexpected_errors": "an exception other than IOReturnError",
    "hangs": "an event did not end",
    "crashes": "a worker exited unexpectedly",
    "leaked_mappings": "mappings left",
    "leaked_descriptors": "file descriptors left open",
    "leaked_locked_bytes": "memory left locked or pinned",
    "leaked_threads": "threads left",
    "leaked_processes": "child processes left",
    "leaked_hugetlb_pages": "hugetlb pages left",
    "leaked_cgroups": "cgroups left",
}
"""All must be 0: names in the report, and their meaning."""
CONTROLS = (
    "locked_pages_seen",
    "locked_pages_moved",
    "pinned_pages_seen",
    "collapses",
    "forks",
    "pages_taken",
    "purges_intact",
    "purges_empty",
)
"""Figures that are not faults, and show that the disturbances are effective."""
REASONS = {
    "limit": "a limit of the worker: memory it may lock, descriptors, address space, memory of its cgroup",
    "privilege": "the worker is an ordinary user",
    "fragmentation": "no physically contiguous or low memory was found within the budget",
    "target ended": "the target has exited: the supervisor killed it, or reports why it exited",
    "contended": "other workers traced the target during the whole time",
    "meant": "the event requested an operation that must be refused",
}
"""Why a refusal was expected."""
CODES = tuple(code for code in IOReturn if code.name in {
    "kIOReturnNoMemory", "kIOReturnNoResources", "kIOReturnNotPrivileged", "kIOReturnBadArgument",
    "kIOReturnUnsupported", "kIOReturnVMError", "kIOReturnNotOpen", "kIOReturnBusy", "kIOReturnTimeout",
    "kIOReturnNotReady", "kIOReturnCannotWire", "kIOReturnNotPermitted", "kIOReturnNotFound",
})  # fmt: skip
"""All codes that may be expected."""
assert Thread.FIRST_REFUSAL + len(REASONS) * len(CODES) <= Thread.FIRST_CONTROL
_DETAILS = 100
"""Maximum number of faults of each kind that the report describes; all are counted."""


@dataclass
class Tally:
    """Sums over the threads of all workers."""

    kinds: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, dict[str, int]] = field(default_factory=dict)
    control: dict[str, int] = field(default_factory=dict)

    @property
    def events(self) -> int:
        """The number of completed events."""
        return sum(self.kinds.values())

    @classmethod
    def of(cls, rows: list[memoryview], names: list[str]) -> Tally:
        """Add up the words of threads."""
        assert len(names) <= KINDS
        kinds = {name: sum(row[Thread.FIRST_KIND + index] for row in rows) for index, name in enumerate(names)}
        refusals: dict[str, dict[str, int]] = {reason: {} for reason in REASONS}
        for number, reason in enumerate(REASONS):
            for index, code in enumerate(CODES):
                place = Thread.FIRST_REFUSAL + number * len(CODES) + index
                if count := sum(row[place] for row in rows):
                    refusals[reason][code.name] = count
        control = {
            name: sum(row[Thread.FIRST_CONTROL + index] for row in rows) for index, name in enumerate(CONTROLS)
        }
        return cls(kinds, refusals, control)


def document(tally: Tally, faults: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    """Return the report for JSON; `about` contains further data on the run."""
    counts = dict.fromkeys(FAULTS, 0)
    details: list[dict[str, Any]] = []
    for fault in faults:
        counts[fault["fault"]] += fault.get("count", 1)
        if sum(other["fault"] == fault["fault"] for other in details) < _DETAILS:
            details.append(fault)
    return {
        "version": VERSION,
        **about,
        "events": tally.events,
        "kinds": tally.kinds,
        "refusals": tally.refusals,
        "control": tally.control,
        "faults": counts,
        "details": details,
    }


def text(report: dict[str, Any], width: int | None = None) -> str:
    """Return the report as text, folded at the width of a terminal."""
    seconds = report["seconds"]
    rate = f", {report['events'] / seconds:,.0f} a second" if seconds >= 1 else ""
    lines = [f"{report['events']:,} events in {seconds:.0f} s{rate}"]
    kinds = [f"{name} {count:,}" for name, count in report["kinds"].items() if count]
    lines.append(_listed("events", kinds))
    refused = [
        f"{reason}: {code.removeprefix('kIOReturn')} {count:,}"
        for reason, codes in report["refusals"].items()
        for code, count in codes.items()
    ]
    lines.append(_listed("expected refusals", refused))
    for title in ("disturbances", "control"):
        lines.append(_listed(title, [f"{name.replace('_', ' ')} {count:,}" for name, count in report[title].items()]))
    lines.append(_listed("left out", [f"{name}: {reason}" for name, reason in report["left_out"].items()]))
    for name, count in report["faults"].items():
        lines.append(f"{count:>9,}  {FAULTS[name]}")
    for fault in report["details"][:20]:
        last = (fault.get("log") or "").strip().rpartition("\n")[2]
        lines.append(f"FAULT {fault['fault']} in {fault['kind']}: {fault['message']}{last and f' ({last})'}")
    lines.append("FAILED" if any(report["faults"].values()) else "passed")
    return "\n".join(folded(line, width, indent="    ") for line in lines)


def _listed(title: str, parts: list[str]) -> str:
    return f"{title}: {', '.join(parts) or 'none'}"
