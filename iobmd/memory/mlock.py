"""Wiring: memory that is pageable, resident or pinned."""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from iobmd import host
from iobmd._native import mman
from iobmd.errors import CannotWireError, IOReturnError, NoMemoryError
from iobmd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    _Arguments = ParamSpec("_Arguments")
    _Result = TypeVar("_Result")

PAGEABLE = "allocate pageable memory"
"""The remedy in messages that a command replaces by one of its options."""
_REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSYS)
_LIMITED = (errno.ENOMEM, errno.EAGAIN)
_reliefs: list[Callable[[], int]] = []


class Wiring(enum.Enum):
    """Whether memory can be swapped out, and can move to other page frames."""

    PAGEABLE = "pageable"
    """The kernel may swap it out."""
    RESIDENT = "resident"
    """Locked by mlock(2): never swapped out, but the kernel may move it to other page frames."""
    PINNED = "pinned"
    """Its physical addresses cannot change."""
    DEVICE = "device"
    """Memory of a device, which has no page frames: it is neither swapped out nor moved, and nothing pins it."""

    is_immovable: bool
    """Whether its physical addresses cannot change."""
    survives_fork: bool
    """Whether a forked child may use the memory: fork(2) passes neither locks nor pins on."""

    def __init__(self, value: str) -> None:
        # Attributes: every operation on a descriptor reads them, and properties would cost a call each.
        self.is_immovable = value in ("pinned", "device")
        self.survives_fork = value in ("pageable", "device")


def on_refusal(relief: Callable[[], int]) -> None:
    """Register `relief`, which is called before a limit refuses wired memory, and returns how many bytes it frees."""
    _reliefs.append(relief)


def within_limits(
    wire: Callable[_Arguments, _Result], *arguments: _Arguments.args, **keywords: _Arguments.kwargs
) -> _Result:
    """Call `wire`, and call it again if a limit refuses it and wired memory that was kept for reuse is freed.

    Raises
    ------
    OSError
        As `wire`.
    """
    try:
        return wire(*arguments, **keywords)
    except OSError as error:
        if error.errno not in _LIMITED or not sum(relief() for relief in _reliefs):
            raise
    return wire(*arguments, **keywords)


def make_resident(address: int, size: int, *, populate: bool = True) -> None:
    """Lock a range of this process: whole pages of a separate mapping, which are unlocked when it is unmapped.

    Parameters
    ----------
    address, size
        In bytes.
    populate : bool
        Whether to fault in all pages (mlock). Otherwise each page is locked when it is first touched (mlock2 with
        MLOCK_ONFAULT, Linux 4.4), but counts against the limit immediately.

    Raises
    ------
    IOReturnError
        `kIOReturnCannotWire`: RLIMIT_MEMLOCK, with its value and the remedy; `kIOReturnNoMemory`.
    """
    lock = mman.lock if populate else mman.lock_on_fault
    try:
        within_limits(lock, address, size)
    except OSError as error:
        raise cannot_lock(size, error) from None


def cannot_lock(size: int, error: OSError) -> IOReturnError:
    """Return the error for a failed mlock of `size` bytes, with the limit, its value and the remedy."""
    what, number = f"cannot lock {format_size(size)} ({size} bytes) in memory", error.errno or 0
    limit = host.limits.memlock(size)
    # The kernel itself returns EPERM only for a limit of 0.
    refused = number in _REFUSED and (limit is None or limit.value > 0)
    if limit and not refused:
        message = f"{what}: {limit}, run with CAP_IPC_LOCK, or {PAGEABLE}"
        return CannotWireError(message, number)
    if number in _REFUSED:
        message = (
            f"{what}: mlock is forbidden ({error.strerror}) by a seccomp filter or a security module; allow it "
            f"(systemd: no ~@memlock in SystemCallFilter=; container: the seccomp profile), or {PAGEABLE}"
        )
        return CannotWireError(message, number)
    if met := host.limits.met_by_mapping(0):
        return NoMemoryError(f"{what}: {met}", number)
    if number == errno.ENOMEM and (limit := host.limits.memlock_of()):
        message = f"{what}: {limit}, unless another thread has unlocked memory since"
        return CannotWireError(message, number)
    return NoMemoryError(f"{what}: the kernel does not have enough free memory", number)
