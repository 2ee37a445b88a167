"""Checks of the page frames of a descriptor's memory."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.errors import (
    CannotWireError,
    IOReturnError,
    NoResourcesError,
    NotPrivilegedError,
    UnsupportedError,
    VMError,
)
from iobmd.task import diagnosis
from iobmd.task.task import kernel_task
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd._native.pagemap import RunTable
    from iobmd.backing import Backing


def require_mapped(backing: Backing) -> None:
    """Raise `kIOReturnVMError` if the program has unmapped or replaced a byte."""
    if (lost := backing.lost()) is not None:
        raise _gone(backing, lost)


def require_unmoved(backing: Backing, read_recorded: Callable[[], RunTable]) -> None:
    """Raise `kIOReturnVMError` if a page is not mapped, or not in its recorded frame."""
    lost = backing.lost()
    try:
        recorded = read_recorded()
        now = backing.read_runs(gaps=True)
        if now is None:
            raise hidden()
    except IOReturnError:
        if lost is None:
            raise
        raise _gone(backing, lost) from None
    moved = recorded.difference(now)
    if lost is not None and (moved is None or lost <= moved):
        raise _gone(backing, lost)
    if moved is not None:
        former, _ = recorded.segment(moved, 1)
        present, _ = now.segment(moved, 1)
        if not present:
            raise _gone(backing, moved)
        message = (
            f"the page at {moved:#x} was at physical {former:#x} and is now at {present:#x} (it has moved, or other "
            "memory is mapped there): do not use it for I/O"
        )
        raise VMError(message, 0, moved)


def require_resident(backing: Backing) -> None:
    """Raise `kIOReturnCannotWire` if a page is absent."""
    resident = backing.page_counts()[0] * PAGE_SIZE
    if resident < backing.size:
        raise CannotWireError(
            f"{backing.size - resident} bytes are not resident, and kIODirectionPrepareNoFault forbids faults"
        )


def require_low(table: RunTable) -> None:
    """Raise `kIOReturnNoResources` if a page is above 4 GiB."""
    if table.highest() >> 32:
        raise NoResourcesError(
            f"memory at {table.highest():#x} is above 4 GiB, and kIODirectionPrepareToPhys32 forbids that; "
            "allocate it with inTaskWithPhysicalMask(…, 0xffffffff)"
        )


def hidden() -> IOReturnError:
    """Return the error for frames that the kernel hides."""
    return diagnosis.hidden(os.getpid()) or NotPrivilegedError(
        "the kernel hides physical addresses from this process; run with CAP_SYS_ADMIN"
    )


def no_frames() -> IOReturnError:
    """Return the error for physical addresses of guard pages."""
    return UnsupportedError("the range contains guard pages, which have no physical addresses")


def _gone(backing: Backing, address: int) -> VMError:
    task = backing.task or kernel_task
    area = None
    with contextlib.suppress(OSError):
        area = procfs.find_vma(task.pid, address)
    what = f"replaced it by {area}" if area else "unmapped it"
    return VMError(
        f"the memory at {address:#x} of task {task.pid} no longer exists: the program has {what}", 0, address
    )
