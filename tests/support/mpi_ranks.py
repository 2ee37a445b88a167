"""The program of each rank of tests/interop/test_mpi.py: windows and in-place collectives over buffers of one kind.

Arguments: the size of the buffers, and the kinds. Rank 0 prints each kind after all ranks have passed its checks.
"""

import sys

import numpy
from mpi4py import MPI

import iobmd
from support.kernel import frames

WORLD = MPI.COMM_WORLD
RANK, RANKS = WORLD.rank, WORLD.size
NEXT, BEFORE = (RANK + 1) % RANKS, (RANK - 1) % RANKS
ADDITIONS = 50


def allocated(kind: str, size: int) -> iobmd.IOBufferMemoryDescriptor:
    return iobmd.allocate(
        size, contiguous="contiguous" in kind, shared="shared" in kind, wired="pageable" not in kind
    )


def pattern(rank: int, size: int) -> "numpy.typing.NDArray[numpy.uint32]":
    return numpy.arange(size // 4, dtype="u4") * (rank + 3)


def put_and_get(window: MPI.Win, buffer: iobmd.IOBufferMemoryDescriptor, kind: str) -> None:
    """Each rank writes into the window of the next one, and reads it back."""
    size = len(buffer)
    with allocated(kind, size) as source:
        source.writeBytes(0, pattern(RANK, size))
        window.Fence()
        window.Put(source, NEXT)
        window.Fence()
        assert (buffer.array("u4") == pattern(BEFORE, size)).all()
        source.writeBytes(0, bytes(size))
        window.Fence()
        window.Get(source, NEXT)
        window.Fence()
        assert (source.array("u4") == pattern(RANK, size)).all()


def add(window: MPI.Win, buffer: iobmd.IOBufferMemoryDescriptor) -> None:
    """All ranks add to one number in the window of the last one, which takes no part in it."""
    target = RANKS - 1
    buffer.writeBytes(0, bytes(8))
    WORLD.Barrier()
    one, before = numpy.ones(1, "i8"), numpy.empty(1, "i8")
    seen = []
    for _ in range(ADDITIONS):
        window.Lock(target)
        window.Fetch_and_op(one, before, target, 0, MPI.SUM)
        window.Unlock(target)
        seen.append(int(before[0]))
    everything = sorted(number for numbers in WORLD.allgather(seen) for number in numbers)
    assert everything == list(range(ADDITIONS * RANKS))
    if target == RANK:
        assert buffer.readBytes(0, 8) == (ADDITIONS * RANKS).to_bytes(8, "little")


def windows(buffer: iobmd.IOBufferMemoryDescriptor, kind: str) -> None:
    window = MPI.Win.Create(buffer, comm=WORLD)
    put_and_get(window, buffer, kind)
    add(window, buffer)
    try:
        buffer.free()
    except iobmd.BusyError:
        pass
    else:
        raise AssertionError("memory of a window was freed")
    window.Free()


def collectives(buffer: iobmd.IOBufferMemoryDescriptor) -> None:
    numbers = buffer.array("f8")
    part = numbers.size // RANKS
    parts = numbers[: part * RANKS].reshape(RANKS, part)

    numbers[:] = RANK + 1
    WORLD.Allreduce(MPI.IN_PLACE, [buffer, MPI.DOUBLE])
    assert (numbers == RANKS * (RANKS + 1) / 2).all()

    numbers[:] = RANK
    WORLD.Bcast([buffer, MPI.DOUBLE], RANKS - 1)
    assert (numbers == RANKS - 1).all()

    numbers[:] = -1
    parts[RANK] = RANK
    WORLD.Allgather(MPI.IN_PLACE, [buffer, part, MPI.DOUBLE])
    assert (parts == numpy.arange(RANKS)[:, None]).all()

    parts[:] = numpy.arange(RANKS)[:, None] + RANK * 100
    WORLD.Alltoall(MPI.IN_PLACE, [buffer, part, MPI.DOUBLE])
    assert (parts == RANK + numpy.arange(RANKS)[:, None] * 100).all()


def main(size: int, kinds: list[str]) -> None:
    for kind in kinds:
        buffer = allocated(kind, size)
        buffer.prepare()
        before = frames(buffer.getBytesNoCopy(), size)
        windows(buffer, kind)
        collectives(buffer)
        assert frames(buffer.getBytesNoCopy(), size) == before
        buffer.complete()
        buffer.free()
        WORLD.Barrier()
        if RANK == 0:
            print(kind)


if __name__ == "__main__":
    with iobmd.policy(time_budget=60):  # all ranks search at the same time, on a busy machine
        main(int(sys.argv[1]), sys.argv[2:])
