"""A mark in the memory of a buffer, by which it is recognized when the buffer no longer exists."""

import os

import iobmd

MARK = b"written into the memory of this buffer"


def mark(buffer: iobmd.IOBufferMemoryDescriptor) -> int:
    """Mark the memory, and return the address of the mark."""
    buffer.writeBytes(8192, MARK)
    return buffer.getBytesNoCopy(8192)


def is_there(address: int) -> bool:
    """Return whether the mark can still be read at the address; the kernel may have mapped other memory there."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        try:
            return os.pread(memory.fileno(), len(MARK), address) == MARK
        except OSError:
            return False
