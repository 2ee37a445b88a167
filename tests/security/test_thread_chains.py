"""A target whose threads make threads and end, by the hundred: it is not chased beyond the time that is promised."""

import itertools
import os
import time
from collections.abc import Iterator

import pytest

from iobmd import Task, procfs
from iobmd.errors import TaskTimeoutError
from iobmd.remote import freeze, threads, wired
from iobmd.units import PAGE_SIZE

PATIENCE = 0.3
THREADS = 1000  # a look at each takes 10 ms, as on a busy machine: at all of them, 10 s


def test_the_deadline_holds_within_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count(1 << 23)  # beyond PID_MAX_LIMIT: no threads

    def slow_activity(_pid: int, _tid: int) -> None:
        time.sleep(0.01)

    monkeypatch.setattr(threads, "thread_ids", lambda _pid: list(itertools.islice(numbers, THREADS)))
    monkeypatch.setattr(threads, "activity", slow_activity)
    before = time.monotonic()
    with pytest.raises(TaskTimeoutError, match="did not stop"):
        freeze._stop_each(Task(os.getpid()), 0, {}, before + PATIENCE)
    assert time.monotonic() - before < 5


def test_areas_above_a_range_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has a stack: reading what their page tables hold took 3 s with 400 of them, 22 s with 1,500."""
    read = 0

    def counted(_pid: int) -> Iterator[tuple[procfs.VMA, set[str]]]:
        nonlocal read
        for number in range(1000):
            read += 1
            start = number * PAGE_SIZE
            yield procfs.VMA(start, start + PAGE_SIZE, "rw-p", 0, "00:00", 0, ""), {"um"} if number > 4 else set()

    monkeypatch.setattr(procfs, "vm_flags", counted)
    assert wired.userfault_area(Task(os.getpid()), PAGE_SIZE, 3 * PAGE_SIZE) is None
    assert read == 4
    found = wired.userfault_area(Task(os.getpid()), PAGE_SIZE, 8 * PAGE_SIZE)
    assert found
    assert found.start == 5 * PAGE_SIZE
