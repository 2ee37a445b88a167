"""The kinds of events: operations of workers, each checked against the kernel. Each family is one module."""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING, NamedTuple

from iobmd.constants import IOReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..context import Context


class Kind(NamedTuple):
    """A kind of event.

    Parameters
    ----------
    name : str
        Its name in the report and for `--kinds`.
    weight : int
        How often it is chosen, relative to the others.
    function : str
        ``module.function`` of this package, loaded only by workers: the supervisor does not load the library. It
        executes the event with a `Context`, and raises `context.Found` if it finds a fault.
    needs : str
        Its requirement: a key of `requirements.PROBES`, or "".
    refusals : mapping of IOReturn to str
        Codes that are expected, each with the key of the reason in `report.REASONS`.
    """

    name: str
    weight: int
    function: str
    needs: str = ""
    refusals: Mapping[IOReturn, str] = {}

    def load(self) -> Callable[[Context], None]:
        """Return the function."""
        module, _, name = self.function.partition(".")
        function: Callable[[Context], None] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return function


_FRAGMENTED = {IOReturn.kIOReturnNoResources: "fragmentation"}
# The target releases these pages continually, so that one may be missing at each stop.
_FAULTING = {IOReturn.kIOReturnNotReady: "meant", IOReturn.kIOReturnUnsupported: "meant"}
_CONTENDED = {IOReturn.kIOReturnNotPermitted: "contended", IOReturn.kIOReturnTimeout: "contended"}

KINDS = {kind.name: kind for kind in (
    Kind("small", 6000, "allocations.small"),
    Kind("pageable", 1500, "allocations.pageable"),
    Kind("wired", 300, "allocations.wired"),
    Kind("shared", 300, "allocations.shared"),
    Kind("large", 6, "allocations.large"),
    Kind("large-shared", 6, "allocations.large_shared"),
    Kind("contiguous", 20, "allocations.contiguous", needs="frames", refusals=_FRAGMENTED),
    Kind("masked", 5, "allocations.masked", needs="frames", refusals=_FRAGMENTED),
    Kind("guarded", 50, "allocations.guarded"),
    Kind("prepare", 800, "pins.prepare"),
    Kind("existing", 150, "pins.existing"),
    Kind("hold", 40, "pins.hold"),
    Kind("verify", 100, "pins.verify"),
    Kind("collapse", 10, "pins.collapse"),
    Kind("control", 10, "pins.control"),
    Kind("purge", 500, "purges.private"),
    Kind("purge-shared", 100, "purges.shared"),
    Kind("purge-all", 10, "purges.everything"),
    Kind("map", 200, "maps.here"),
    Kind("map-read-only", 50, "maps.read_only"),
    Kind("redirect", 100, "maps.redirect"),
    Kind("map-target", 8, "maps.in_target", needs="ptrace", refusals=_CONTENDED),
    Kind("redirect-target", 4, "maps.redirect_in_target", needs="ptrace", refusals=_CONTENDED),
    Kind("read", 200, "copies.read"),
    Kind("readinto", 50, "copies.readinto"),
    Kind("write", 100, "copies.write"),
    Kind("copy", 50, "copies.copy"),
    Kind("copy-sparse", 10, "copies.sparse", needs="existing pages"),
    Kind("freeze", 6, "copies.freeze", needs="ptrace", refusals=_CONTENDED),
    Kind("freeze-moment", 6, "copies.moment", needs="ptrace", refusals=_CONTENDED),
    Kind("copy-faulting", 4, "copies.faulting", needs="userfaultfd", refusals=_CONTENDED | _FAULTING),
    Kind("copy-lazy", 6, "copies.lazy"),
    Kind("allocate-target", 10, "stops.allocate", needs="ptrace", refusals=_CONTENDED),
    Kind("pin-target", 5, "stops.pin", needs="ptrace", refusals=_CONTENDED),
    Kind("share", 60, "sharing.handed_over"),
    Kind("share-child", 4, "sharing.to_child"),
    Kind("fork", 6, "forks.fork"),
)}  # fmt: skip
"""All kinds by name."""
PLANTED_FAULTS = {kind.name: kind for kind in (
    Kind(f"plant-{name.replace('_', '-')}", 50, f"planted_faults.{name}")
    for name in (
        "moved", "wrong_bytes", "wrong_state", "wrong_code", "error", "descriptor", "mapping", "locked", "thread",
        "child", "hang", "crash", "disturb", "kill",
    )
)}  # fmt: skip
"""Kinds that cause a fault deliberately, which the run must report."""


def schedule(names: list[str]) -> list[Kind]:
    """Return each kind as often as its weight, so that a uniform choice from the list is a weighted one."""
    kinds = [(KINDS | PLANTED_FAULTS)[name] for name in names]
    return list(itertools.chain.from_iterable([kind] * kind.weight for kind in kinds))
