"""The types of arrays. Checked like program.py, but not without NumPy's own annotations."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type

import numpy
from numpy.typing import NDArray

import iobmd


def arrays(buf: iobmd.IOBufferMemoryDescriptor) -> None:
    """The type of the elements is that of `dtype`."""
    assert_type(buf.array(), NDArray[numpy.uint8])
    assert_type(buf.array(shape=(2, 3)), NDArray[numpy.uint8])
    assert_type(buf.array(numpy.float64), NDArray[numpy.float64])
    assert_type(buf.array(numpy.dtype(numpy.int16), 5), NDArray[numpy.int16])
    assert_type(buf.array(">u4"), NDArray[numpy.generic])
    assert_type(buf[0], int)
    assert_type(buf[1:3], bytes)
    assert_type(buf.__dlpack_device__(), tuple[int, int])
    buf[0] = 5
    buf[1:3] = memoryview(b"ab")
    buf[1:3] = "ab"  # type: ignore[call-overload]
    numpy.from_dlpack(buf)
    numpy.frombuffer(memoryview(buf), numpy.uint8)
