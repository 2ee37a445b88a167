"""Physically contiguous runs of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iobmd._native import runs as native_runs
from iobmd.pagemap.entries import no_entries, opened
from iobmd.task import Task, as_task, check_range
from iobmd.units import PAGE_SIZE, round_down, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

_STEP = 16 << 20  # bytes of address space a step: a scan holds up the task's own mmap for that long


class Run(NamedTuple):
    """Pages that lie behind each other both virtually and physically; all in bytes."""

    virtual: int
    physical: int
    length: int


def runs(task: Task | int | psutil.Process, address: int, size: int) -> Iterator[Run]:
    """Iterate over the physically contiguous runs of a range, ascending by virtual address.

    Absent pages, and pages whose frame is hidden, are in no run. Read in steps, with few objects at a time.
    Parameters and errors as `pages`.
    """
    task = as_task(task)
    check_range(address, size)
    start, end = round_down(address, PAGE_SIZE), round_up(address + size, PAGE_SIZE)
    pending: Run | None = None
    with opened(task) as descriptor:
        for step in range(start, end, _STEP):
            try:
                table = native_runs.read(descriptor.fd, step, min(_STEP, end - step), PAGE_SIZE)
            except OSError:
                raise no_entries(task, step) from None
            for index in range(table.count):
                run = Run(*table[index])
                if pending and _follows(pending, run):
                    pending = pending._replace(length=pending.length + run.length)
                    continue
                if pending:
                    yield pending
                pending = run
    if pending:
        yield pending


def _follows(first: Run, second: Run) -> bool:
    return first.virtual + first.length == second.virtual and first.physical + first.length == second.physical
