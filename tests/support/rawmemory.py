"""Memory of this process by plain system calls: areas of every kind, and ways to remove them."""

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

PAGE = mmap.PAGESIZE
READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE
PRIVATE, SHARED, ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_SHARED, mmap.MAP_ANONYMOUS
NORESERVE, HUGETLB = 0x4000, 0x40000
MADV_GUARD_INSTALL = 102
MEMFD_SECRET = 447
USERFAULTFD = {"x86_64": 323, "aarch64": 282}[os.uname().machine]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.syscall.restype = ctypes.c_long


def _checked(result: int) -> int:
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def map_memory(
    size: int, protection: int = READ | WRITE, flags: int = PRIVATE | ANONYMOUS, fd: int = -1, at: int = 0
) -> int:
    """Call mmap(2); return the address."""
    flags |= 0x10 if at else 0  # MAP_FIXED
    found = _libc.mmap(ctypes.c_void_p(at), ctypes.c_size_t(size), protection, flags, fd, ctypes.c_long(0))
    _checked(-1 if found in (None, 2**64 - 1) else 0)
    return int(found)


def unmap(address: int, size: int) -> None:
    _checked(_libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)))


def protect(address: int, size: int, protection: int) -> None:
    _checked(_libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection))


def install_guard(address: int, size: int) -> None:
    """Call madvise(2) with MADV_GUARD_INSTALL (Linux 6.13)."""
    _checked(_libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_GUARD_INSTALL))


def secret_memory(size: int) -> int:
    """Return a descriptor of secret memory (memfd_secret(2), Linux 5.14)."""
    fd = _checked(_libc.syscall(MEMFD_SECRET, 0))
    os.ftruncate(fd, size)
    return fd


def vvar() -> tuple[int, int]:
    """Return the address and size of the kernel's data for the vDSO, which is mapped like device memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[vvar]"):
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            return start, end - start
    raise LookupError("no [vvar]")


class Pause:
    """A page whose first access waits in the kernel for `when_reached` (userfaultfd(2)).

    Parameters
    ----------
    address : int
        The address of a page of private anonymous memory, which is dropped.
    """

    def __init__(self, address: int) -> None:
        self._address = address
        self._fd = _checked(_libc.syscall(USERFAULTFD, os.O_CLOEXEC))
        fcntl.ioctl(self._fd, 0xC018AA3F, bytearray(struct.pack("=QQQ", 0xAA, 0, 0)))  # UFFDIO_API
        assert _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 4) == 0  # MADV_DONTNEED
        register = struct.pack("=QQQQ", address, PAGE, 1, 0)  # UFFDIO_REGISTER_MODE_MISSING
        fcntl.ioctl(self._fd, 0xC020AA00, bytearray(register))

    def when_reached(self, action: Callable[[], object], patience: float = 30.0) -> None:
        """Wait until the page is accessed, call a function, and then supply a page of zeros."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        assert poll.poll(patience * 1000), "the page was not accessed"
        os.read(self._fd, 32)
        action()
        zeros = bytearray(struct.pack("=QQQq", self._address, PAGE, 0, 0))
        fcntl.ioctl(self._fd, 0xC020AA04, zeros)  # UFFDIO_ZEROPAGE

    def close(self) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def memfd(size: int) -> Iterator[int]:
    """Yield a descriptor of new shared memory that may be sealed."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)
