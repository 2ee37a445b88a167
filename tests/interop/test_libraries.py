"""Buffers used by third-party libraries: the same memory, for as long as they hold it."""

import contextlib
import gc
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import shared_memory
from typing import Any

import pytest
from support import kernel
from support.memory_mark import is_there, mark

import iobmd
from iobmd.units import PAGE_SIZE

SIZE = 256 << 10


def numpy_array(buffer: iobmd.IOBufferMemoryDescriptor) -> Any:
    return buffer.array()


def numpy_frombuffer(buffer: iobmd.IOBufferMemoryDescriptor) -> Any:
    import numpy

    return numpy.frombuffer(buffer, "u1")[100:]  # a view of a view


def numpy_asarray(buffer: iobmd.IOBufferMemoryDescriptor) -> Any:
    import numpy

    return numpy.asarray(memoryview(buffer))


def numpy_dlpack(buffer: iobmd.IOBufferMemoryDescriptor) -> Any:
    import numpy

    return numpy.from_dlpack(buffer)


def arrow_buffer(buffer: iobmd.IOBufferMemoryDescriptor) -> Any:
    import pyarrow

    return pyarrow.py_buffer(buffer)


def arrow_table(buffer: iobmd.IOBufferMemoryDescriptor) -> Any:
    import pyarrow

    column = pyarrow.Array.from_buffers(pyarrow.int32(), SIZE // 4, [None, pyarrow.py_buffer(buffer)])
    return pyarrow.table({"numbers": column})


def torch_dlpack(buffer: iobmd.IOBufferMemoryDescriptor) -> Any:
    import torch

    return torch.from_dlpack(buffer)


def torch_frombuffer(buffer: iobmd.IOBufferMemoryDescriptor) -> Any:
    import torch

    return torch.frombuffer(memoryview(buffer), dtype=torch.uint8)


def holders() -> list[Any]:
    """Return each way to hold a buffer, with the library that it needs."""
    ways = {
        "numpy": [numpy_array, numpy_frombuffer, numpy_asarray, numpy_dlpack],
        "pyarrow": [arrow_buffer, arrow_table],
        "torch": [torch_dlpack, torch_frombuffer],
    }
    return [
        pytest.param(way, id=way.__name__, marks=pytest.mark.needs(name))
        for name, found in ways.items()
        for way in found
    ]


@pytest.mark.parametrize("hold", holders())
@pytest.mark.parametrize("wired", [True, False])
def test_memory_goes_with_the_last_array(hold: Callable[[iobmd.IOBufferMemoryDescriptor], Any], wired: bool) -> None:
    with iobmd.allocate(SIZE, wired=False) as buffer:
        hold(buffer)  # imports the library, which may lock memory itself: Debian's torch locks 16 KiB
    gc.collect()
    locked = kernel.status("VmLck")
    with iobmd.allocate(SIZE, wired=wired) as buffer:
        address = mark(buffer)
        held = hold(buffer)
        with pytest.raises(iobmd.BusyError):
            buffer.free()
    del buffer
    gc.collect()
    assert is_there(address)
    assert kernel.status("VmLck") == locked + (SIZE if wired else 0)
    del held
    gc.collect()
    assert not is_there(address)
    assert kernel.status("VmLck") == locked


@pytest.mark.needs("numpy")
def test_an_array_is_the_memory_itself() -> None:
    import numpy

    with iobmd.allocate(64, wired=False) as buffer:
        numbers = buffer.array(numpy.uint32, (4, 4))
        assert (numbers.shape, numbers.dtype, numbers.flags.writeable) == ((4, 4), numpy.uint32, True)
        numbers[:] = numpy.arange(16).reshape(4, 4)
        assert buffer.readBytes(0, 64) == numpy.arange(16, dtype=numpy.uint32).tobytes()
        assert numpy.asarray(buffer).nbytes == 64
        assert buffer.array("<u8", 2).tolist() == [0x100000000, 0x300000002]
        assert buffer.array(shape=0).size == 0
        assert buffer.array("S5").shape == (12,)  # as many as fit
        assert buffer.array(shape=()).shape == ()
        with pytest.raises(iobmd.BadArgumentError, match="17 elements of 4 bytes"):
            buffer.array("u4", 17)
        with pytest.raises(ValueError, match="OBJECT"):
            buffer.array(object)
        with pytest.raises(TypeError):
            buffer.array("no type")
        buffer.setLength(10)
        assert buffer.array().shape == (10,)
    assert numbers[3, 3] == 15


@pytest.mark.needs("numpy")
def test_the_body_of_a_block_keeps_its_exception() -> None:
    """The exception of the block is not replaced, although an array outlives the block."""
    import numpy

    with pytest.raises(RuntimeError, match="the body's own") as caught, iobmd.allocate(PAGE_SIZE) as buffer:
        array = numpy.frombuffer(buffer, "f8")
        raise RuntimeError("the body's own")
    assert caught.value.__context__ is None
    assert array.sum() == 0


@pytest.mark.needs("numpy")
def test_no_array_of_memory_elsewhere() -> None:
    with iobmd.allocate(PAGE_SIZE, task=None, wired=False) as nowhere:
        with pytest.raises(iobmd.UnsupportedError, match="map"):
            nowhere.array()
        with nowhere.map() as mapped:
            import numpy

            numpy.frombuffer(mapped, "u1")[3] = 9
        assert nowhere[3] == 9


@pytest.mark.needs("pyarrow")
def test_arrow_reads_and_writes_in_place() -> None:
    import pyarrow

    with iobmd.allocate(SIZE) as buffer:
        with pyarrow.FixedSizeBufferWriter(pyarrow.py_buffer(buffer)) as sink:
            table = pyarrow.table({"a": [1, 2, 3]})
            with pyarrow.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        read = pyarrow.ipc.open_stream(pyarrow.py_buffer(buffer)).read_all()
        assert read.equals(table)
        start = buffer.getBytesNoCopy()
        assert start <= read.column("a").chunk(0).buffers()[1].address < start + SIZE  # no copy


@pytest.mark.needs("mpi4py")
def test_mpi_sends_and_receives_in_place() -> None:
    """In a separate process, because MPI changes the process that initializes it."""
    program = """
import iobmd
from mpi4py import MPI
with iobmd.allocate(1 << 20) as sent, iobmd.allocate(1 << 20) as received:
    sent.writeBytes(1 << 19, b"by MPI")
    MPI.COMM_SELF.Sendrecv([sent, MPI.BYTE], dest=0, recvbuf=[received, MPI.BYTE], source=0)
    print(received.readBytes(1 << 19, 6))
    window = MPI.Win.Create(received, comm=MPI.COMM_SELF)
    window.Lock(0)
    window.Put([b"window", MPI.BYTE], 0)
    window.Unlock(0)
    window.Free()
    print(received[:6])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "b'by MPI'\nb'window'\n"), done.stderr


@pytest.mark.parametrize("size", [1, 10, 64, 100, 1000, 2048, 3000, PAGE_SIZE, 1 << 20, 2 << 20, 5 << 20])
def test_alignment_suffices_for_vectors(size: int) -> None:
    """64 bytes for AVX-512 and Arrow; the size's own power of two up to a page; huge pages from 2 MiB on."""
    expected = 2 << 20 if size >= 2 << 20 else min(max(1 << (size - 1).bit_length(), 64), PAGE_SIZE)
    number = 1 if size > 1 << 20 else 4  # an unprivileged user may lock 8 MiB
    for wired in (True, False):
        with contextlib.ExitStack() as stack:
            buffers = [stack.enter_context(iobmd.allocate(size, wired=wired)) for _ in range(number)]
            assert {buffer.getBytesNoCopy() % expected for buffer in buffers} == {0}


@pytest.mark.needs("torch")
def test_which_tensors_are_the_memory() -> None:
    """`asarray` takes the bytes for float32, and `as_tensor` copies them: docs/howto/arrays.md warns of both."""
    import torch

    with iobmd.allocate(PAGE_SIZE, wired=False) as buffer:
        buffer[:2] = b"\x01\x02"
        tensors = {
            "from_dlpack": torch.from_dlpack(buffer),
            "frombuffer": torch.frombuffer(memoryview(buffer), dtype=torch.uint8),
            "asarray with a type": torch.asarray(buffer, dtype=torch.uint8),
            "asarray": torch.asarray(buffer),
            "as_tensor": torch.as_tensor(buffer),
        }
        for name, tensor in tensors.items():
            same = tensor.data_ptr() == buffer.getBytesNoCopy()
            expected = {"asarray": (torch.float32, 1024, True), "as_tensor": (torch.int64, PAGE_SIZE, False)}
            found = (tensor.dtype, tensor.numel(), same)
            assert found == expected.get(name, (torch.uint8, PAGE_SIZE, True)), name


@pytest.mark.needs("numpy", "frames")
def test_shared_memory_of_multiprocessing_can_be_pinned() -> None:
    """The pages are those that another mapping of the same object shows, and they are unpinned by `complete`."""
    import numpy

    theirs = shared_memory.SharedMemory(create=True, size=SIZE)
    try:
        other = shared_memory.SharedMemory(theirs.name)
        here, there = (numpy.frombuffer(one.buf, "u1") for one in (theirs, other))
        address = here.ctypes.data
        pinned = kernel.pinned()  # an earlier test's pins may still have to end in a work queue of the kernel
        with iobmd.IOMemoryDescriptor.withAddressRange(
            address, SIZE, iobmd.kIODirectionInOut, iobmd.kernel_task
        ) as described:
            described.prepare()
            assert kernel.pinned(pinned + SIZE) == pinned + SIZE
            there[:] = 7
            assert described.readBytes(SIZE - 2, 2) == b"\x07\x07"
            assert list(described.page_addresses()) == [
                frame * kernel.PAGE for frame in kernel.frames(there.ctypes.data, SIZE)
            ]
            described.complete()
        assert kernel.pinned(pinned) == pinned
        del here, there
        other.close()
    finally:
        theirs.close()
        theirs.unlink()
