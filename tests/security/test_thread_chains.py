"""A target with hundreds of threads that create threads and exit is not pursued beyond the documented time."""

import os
import time
from collections.abc import Iterator

import pytest

from iobmd import Task, procfs
from iobmd.remote import areas, session, threads
from iobmd.units import PAGE_SIZE


def test_threads_are_looked_at_for_no_longer_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspecting each of 1,000 threads takes 10 s on a busy machine; the rest of the time is for their stop."""
    seen: list[int] = []

    def slow_call(_pid: int, tid: int) -> int:
        seen.append(tid)
        time.sleep(0.01)
        return -1

    monkeypatch.setattr(threads, "thread_ids", lambda _pid: list(range(1 << 23, (1 << 23) + 1000)))  # no threads
    monkeypatch.setattr(threads, "call", slow_call)
    assert session._sleeping(Task(os.getpid())) == []
    assert 0 < len(seen) < 200


def test_areas_above_a_range_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has a stack: reading their page tables once took 3 s for 400 threads, 22 s for 1,500."""
    read = 0

    def counted(_pid: int) -> Iterator[tuple[procfs.VMA, set[str]]]:
        nonlocal read
        for number in range(1000):
            read += 1
            start = number * PAGE_SIZE
            yield procfs.VMA(start, start + PAGE_SIZE, "rw-p", 0, "00:00", 0, ""), {"um"} if number > 4 else set()

    monkeypatch.setattr(procfs, "vm_flags", counted)
    assert areas.userfault_area(Task(os.getpid()), PAGE_SIZE, 3 * PAGE_SIZE) is None
    assert read == 4
    found = areas.userfault_area(Task(os.getpid()), PAGE_SIZE, 8 * PAGE_SIZE)
    assert found
    assert found.start == 5 * PAGE_SIZE
