"""A ring of io_uring by system calls, as another library's: it shares no code with the rings of `iobmd`."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_SETUP, _ENTER, _REGISTER = 425, 426, 427  # the same on all architectures
_REGISTER_BUFFERS, _CLONE_BUFFERS = 0, 30
_READ_FIXED, _GETEVENTS, _SQES = 4, 1, 0x10000000
_ENTRY = struct.Struct("=BBHiQQIIQHHiQQ")  # struct io_uring_sqe
_libc = ctypes.CDLL(None, use_errno=True)


def _call(*arguments: object) -> int:
    result = _libc.syscall(*(ctypes.c_long(one) if isinstance(one, int) else one for one in arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(result)


class Ring:
    """A ring of one entry, for one thread (io_uring(7))."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(120)
        self.fd = _call(_SETUP, 1, parameters)
        numbers = struct.unpack("=30I", parameters.raw)
        self._tail, self._array = numbers[11], numbers[16]
        self._head, self._completions = numbers[20], numbers[25]
        size = max(self._array + 4 * numbers[0], self._completions + 16 * numbers[1])
        self._ring = mmap.mmap(self.fd, size)
        self._entries = mmap.mmap(self.fd, _ENTRY.size * numbers[0], offset=_SQES)
        self._mask = numbers[1] - 1

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_error: object) -> None:
        self._entries.close()
        self._ring.close()
        os.close(self.fd)

    def register(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Register fixed buffers: the address and size of each (IORING_REGISTER_BUFFERS). Raises OSError."""
        packed = b"".join(struct.pack("=QQ", *one) for one in ranges)
        _call(_REGISTER, self.fd, _REGISTER_BUFFERS, packed, len(packed) // 16)

    def clone(self, other: Ring) -> None:
        """Use the fixed buffers of another ring (IORING_REGISTER_CLONE_BUFFERS, Linux 6.12). Raises OSError."""
        _call(_REGISTER, self.fd, _CLONE_BUFFERS, struct.pack("=8I", other.fd, *[0] * 7), 1)

    def read_fixed(self, fd: int, address: int, size: int, offset: int, index: int) -> int:
        """Read from a file to an address in the fixed buffer `index`; return the result of the operation."""
        entry = _ENTRY.pack(_READ_FIXED, 0, 0, fd, offset, address, size, 0, 0, index, 0, 0, 0, 0)
        self._entries[: _ENTRY.size] = entry
        self._put(self._array, 0)
        self._put(self._tail, self._get(self._tail) + 1)
        _call(_ENTER, self.fd, 1, 1, _GETEVENTS, None, 0)
        done = self._get(self._head)
        place = self._completions + 16 * (done & self._mask)
        _data, result, _flags = struct.unpack("=QiI", self._ring[place : place + 16])
        self._put(self._head, done + 1)
        return int(result)

    def _get(self, offset: int) -> int:
        return int.from_bytes(self._ring[offset : offset + 4], "little")

    def _put(self, offset: int, number: int) -> None:
        self._ring[offset : offset + 4] = (number & 0xFFFFFFFF).to_bytes(4, "little")
