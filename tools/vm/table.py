"""The features of each kernel, as a table of the documentation."""

import re
from collections.abc import Iterable
from pathlib import Path

from .architecture import Architecture
from .runs import Run

BEGIN, END = "<!-- made by make test-vm ARCH={name} TABLE=… -->", "<!-- end -->"
_CAPABILITY = re.compile(r"^@@CAPABILITY (.+?): (.+)$", re.MULTILINE)
_COUNT = re.compile(r"^@@COUNT (.+?): (\d+)$", re.MULTILINE)


def totals(runs: Iterable[Run]) -> list[str]:
    """Return the sums of the counts of the guests' tests."""
    sums: dict[str, int] = {}
    for run in runs:
        for name, count in _COUNT.findall(run.outcome.output):
            sums[name] = sums.get(name, 0) + int(count)
    return [f"{name}: {count}" for name, count in sums.items()]


def capabilities(runs: Iterable[Run]) -> dict[str, dict[str, str]]:
    """Return the answer of each kernel for each capability."""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        for name, answer in _CAPABILITY.findall(run.outcome.output):
            found.setdefault(name, {})[run.kernel.release] = answer
    return found


def table(runs: list[Run], debian: str) -> str:
    """Return the table in Markdown, with a row for each capability and a column for each kernel.

    Debian's name of the architecture, which is part of the releases, is omitted.
    """
    releases = list(dict.fromkeys(run.kernel.release for run in runs))
    rows = [["", *(release.replace(f"-{debian}", "") for release in releases)], ["---"] * (len(releases) + 1)]
    rows += [
        [name, *(answers.get(release, "") for release in releases)] for name, answers in capabilities(runs).items()
    ]
    rows += [
        [f"seconds: {name}", *_seconds(runs, name, releases)] for name in dict.fromkeys(run.profile for run in runs)
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(architecture: Architecture, runs: list[Run], page: Path) -> None:
    """Write the table and the totals between the markers of a page. Raises ValueError if it has none."""
    marker = BEGIN.format(name=architecture.name)
    before, begin, rest = page.read_text().partition(marker)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the lines {marker!r} and {END!r}")
    counted = "".join(f"\n{line}.\n" for line in totals(runs))
    page.write_text(f"{before}{begin}\n{table(runs, architecture.debian)}{counted}{end}{after}")


def _seconds(runs: list[Run], profile: str, releases: list[str]) -> list[str]:
    spent = {run.kernel.release: run.outcome.seconds for run in runs if run.profile == profile}
    return [f"{spent[release]:.0f}" if release in spent else "" for release in releases]
