"""The program of each rank of `iobmd bench mpi`: the same calls over iobmd memory and over memory that MPI allocates.

Rank 0 prints a JSON list with the arguments of the rows. All memory is accessed by a `memoryview`: passing the buffer
itself takes 0.8 µs more for each call, which is an eighth of a message of 64 KiB.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from mpi4py import MPI

from iobmd.api import allocate
from iobmd.errors import NotPrivilegedError
from iobmd.sharing import attach, share
from iobmd.units import PAGE_SIZE

from ..mpi import DIRECT

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor

Row = dict[str, object]
"""The arguments of `mpi._row`."""
WORLD = MPI.COMM_WORLD
OTHER = (WORLD.rank + 1) % WORLD.size
SIZES = (64 << 10, 16 << 20)
ROUNDS, BYTES = map(int, sys.argv[1:])
"""The number of samples, and how many bytes each moves at least: small messages are repeated."""
ALLOCATED = "`Alloc_mem`"
_KINDS: dict[str, Any] = {"pinned": {}, "shared": {"shared": True}}


class _Memory(NamedTuple):
    """A window over `target`, and `source` in the same kind of memory."""

    source: memoryview
    target: memoryview
    window: MPI.Win


def _exchanged(memory: _Memory) -> None:
    WORLD.Sendrecv([memory.source, MPI.BYTE], OTHER, 0, [memory.target, MPI.BYTE], OTHER, 0)


def _reduced(memory: _Memory) -> None:
    WORLD.Allreduce(MPI.IN_PLACE, [memory.target, MPI.INT32_T], MPI.BOR)


def _put(memory: _Memory) -> None:
    memory.window.Lock(OTHER)
    memory.window.Put([memory.source, MPI.BYTE], OTHER)
    memory.window.Unlock(OTHER)


def _got(memory: _Memory) -> None:
    memory.window.Lock(OTHER)
    memory.window.Get([memory.source, MPI.BYTE], OTHER)
    memory.window.Unlock(OTHER)


_CALLS: dict[str, Callable[[_Memory], None]] = {
    "Sendrecv": _exchanged,
    "Allreduce in place": _reduced,
    "Put": _put,
    "Get": _got,
}


def _view(memory: Any) -> memoryview:  # MPI.buffer, of whose protocol type checkers do not know before Python 3.12
    return memoryview(memory)


def _kinds() -> dict[str, Any]:
    try:
        allocate(PAGE_SIZE, contiguous=True).free()
    except NotPrivilegedError:
        return _KINDS
    return {**_KINDS, "contiguous": {"contiguous": True}}


def _made(stack: ExitStack, size: int, options: Any) -> _Memory:
    """Allocate by iobmd with these options, by MPI if they are None; freed by `stack`."""

    def buffer() -> memoryview:
        if options is None:
            ours = MPI.Alloc_mem(size)
            stack.callback(MPI.Free_mem, ours)
            return _view(ours)
        return stack.enter_context(memoryview(stack.enter_context(allocate(size, **options))))

    source, target = buffer(), buffer()
    for view in (source, target):
        view[:] = b"\1" * size  # MPI's memory is not populated
    window = MPI.Win.Create(target, 1, comm=WORLD)
    stack.callback(window.Free)
    return _Memory(source, target, window)


def _allocated_window(stack: ExitStack, size: int) -> _Memory:
    """Return a window whose memory MPI allocates, so that ranks of a host access each other's memory directly."""
    source = MPI.Alloc_mem(size)
    stack.callback(MPI.Free_mem, source)
    window = MPI.Win.Allocate(size, 1, comm=WORLD)
    stack.callback(window.Free)
    memory = _Memory(_view(source), _view(window.tomemory()), window)
    for view in memory[:2]:
        view[:] = b"\1" * size
    return memory


def _medians(size: int, actions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each action, until all ranks have completed it. The actions alternate."""
    repeated = max(BYTES // size, 1)
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(ROUNDS + 1):
        for name, action in actions.items():
            WORLD.Barrier()
            begin = time.perf_counter()
            for _ in range(repeated):
                action()
            WORLD.Barrier()
            took = WORLD.allreduce(time.perf_counter() - begin, MPI.MAX)
            if number:  # the first warms up
                samples[name].append(took / repeated)
    return {name: statistics.median(times) for name, times in samples.items()}


def _calls(size: int) -> list[Row]:
    rows = []
    with ExitStack() as stack:
        allocated = _made(stack, size, None)
        ours = {kind: _made(stack, size, options) for kind, options in _kinds().items()}
        window = _allocated_window(stack, size)
        for what, call in _CALLS.items():
            memories = {ALLOCATED: allocated, **ours} | ({DIRECT: window} if call in (_put, _got) else {})
            times = _medians(size, {kind: partial(call, one) for kind, one in memories.items()})
            theirs = {name: times.pop(name) for name in (ALLOCATED, DIRECT) if name in times}
            rows += [_row(what, size, times, *one) for one in theirs.items()]
    return rows


def _shared_by_first(size: int) -> IOBufferMemoryDescriptor:
    """Return one buffer in all ranks: rank 0 allocates and sends it over Unix sockets."""
    if WORLD.rank:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(WORLD.bcast(None))
            return attach(connection)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{folder}/socket")
        listening.listen(WORLD.size)
        WORLD.bcast(listening.getsockname())
        buffer = allocate(size, shared=True)
        with share(buffer) as handle:
            for _ in range(1, WORLD.size):
                with listening.accept()[0] as connection:
                    handle.send(connection)
        return buffer


def _stores(size: int) -> Row:
    """Compare stores of rank 1 to memory of rank 0 that both map; rank 0 waits."""
    data = b"\1" * size
    with ExitStack() as stack:
        ours = stack.enter_context(memoryview(stack.enter_context(_shared_by_first(size))))
        window = MPI.Win.Allocate_shared(0 if WORLD.rank else size, 1, comm=WORLD)
        stack.callback(window.Free)
        theirs = _view(window.Shared_query(0)[0])

        def store(memory: memoryview) -> None:
            if WORLD.rank:
                memory[:] = data

        times = _medians(size, {"share": lambda: store(ours), "MPI": lambda: store(theirs)})
    name = "`Win.Allocate_shared`"
    return _row("stores to memory of another rank", size, times, name, times.pop("MPI"))


def _row(what: str, size: int, ours: dict[str, float], against: str, theirs: float) -> Row:
    return {"what": what, "size": size, "ours": ours, "against": against, "theirs": theirs}


def main() -> None:
    """Measure, and print the rows."""
    rows = [row for size in SIZES for row in [*_calls(size), _stores(size)]]
    if WORLD.rank == 0:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
