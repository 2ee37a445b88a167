"""Wiring: how firmly memory stays where it is."""

import enum
import errno

from iobmd import host, procfs
from iobmd._native import memory
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.units import format_size


class Wiring(enum.Enum):
    """How firmly memory stays where it is."""

    PAGEABLE = "pageable"
    """The kernel may swap it out."""
    RESIDENT = "resident"
    """Locked in memory by mlock(2): never swapped out, but the kernel may still move it to other frames."""
    PINNED = "pinned"
    """Its physical addresses cannot change."""


def make_resident(address: int, size: int, *, populate: bool = True) -> None:
    """Lock a range of this process, whole pages of a mapping of its own; unmapping it unlocks it.

    Parameters
    ----------
    address, size
        In bytes.
    populate : bool
        Fault every page in now (mlock). Otherwise each is locked as it is first touched (mlock2 with
        MLOCK_ONFAULT, Linux 4.4), but counts against the limit from now on.

    Raises
    ------
    IOReturnError
        `kIOReturnCannotWire`: RLIMIT_MEMLOCK, with its value and how to raise it; `kIOReturnNoMemory`.
    """
    try:
        (memory.lock if populate else memory.lock_on_fault)(address, size)
    except OSError as error:
        raise cannot_lock(size, error) from None


def cannot_lock(size: int, error: OSError) -> IOReturnError:
    """Return the error for an mlock of `size` bytes that failed: which limit, its value, and how to raise it."""
    limit = host.memlock_limit()
    locked = procfs.locked_bytes()
    if limit is not None and (error.errno == errno.EPERM or locked + size > limit):
        message = (
            f"cannot lock {format_size(size)} ({size} bytes) in memory: RLIMIT_MEMLOCK is {limit} bytes, "
            f"{locked} of them in use; raise it (`ulimit -l KIB`, `prlimit --memlock=BYTES`, systemd's "
            "LimitMEMLOCK=), give the program CAP_IPC_LOCK, or ask for pageable memory"
        )
        return IOReturnError(IOReturn.kIOReturnCannotWire, message, error.errno or 0)
    if error.errno == errno.EPERM:
        message = f"cannot lock {format_size(size)} in memory: the kernel refuses mlock (a seccomp filter?)"
        return IOReturnError(IOReturn.kIOReturnCannotWire, message, errno.EPERM)
    message = (
        f"cannot lock {format_size(size)} in memory: the kernel has not enough free memory, or too many mappings"
    )
    return IOReturnError(IOReturn.kIOReturnNoMemory, message, error.errno or 0)
