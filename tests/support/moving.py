"""Tests that compare two readings of page frames, which the kernel may change in between."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

Asked = ParamSpec("Asked")
_ATTEMPTS = 20


def _moved() -> dict[str, int]:
    """Return how many pages the kernel of this host has moved, collapsed, split or reclaimed."""
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    kinds = ("pgmigrate_", "thp_collapse_", "thp_split_", "pgsteal_")
    return {name: int(value) for name, value in lines if name.startswith(kinds)}


def again_if_pages_move(test: Callable[Asked, None]) -> Callable[Asked, None]:
    """Repeat a test that failed while the kernel moved pages of any process: those of the test may be among them.

    Compaction moves pages of any process at any time. A failure while no page was moved is reported at once.
    """

    @functools.wraps(test)
    def repeated(*args: Asked.args, **kwargs: Asked.kwargs) -> None:
        for _ in range(_ATTEMPTS - 1):
            before = _moved()
            try:
                return test(*args, **kwargs)
            except AssertionError:
                if _moved() == before:
                    raise
        return test(*args, **kwargs)

    return repeated
