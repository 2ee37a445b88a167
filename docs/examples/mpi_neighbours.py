"""Memory that all ranks of a host share, allocated once by MPI and once by iobmd, and a pin of MPI's memory.

Run it with `mpiexec -n 4 python -m mpi4py mpi_neighbours.py`: an exception in one rank then ends all of them.
"""

import socket
import tempfile
from pathlib import Path

from mpi4py import MPI

import iobmd

SIZE = 4 << 20


def shared_by_first(host: MPI.Comm, size: int) -> iobmd.IOBufferMemoryDescriptor:
    """Return the same memory in every rank of a host: rank 0 allocates it and sends it over Unix sockets."""
    if host.rank:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(host.bcast(None))
            return iobmd.attach(connection)
    # Only this user can enter the directory, and connect to the socket in it.
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(Path(folder, "socket")))
        listening.listen(host.size)
        host.bcast(listening.getsockname())
        buffer = iobmd.allocate(size, shared=True)
        with iobmd.share(buffer) as handle:
            for _ in range(host.size - 1):
                connection, _address = listening.accept()
                with connection:
                    handle.send(connection)
        return buffer


def sign(host: MPI.Comm, memory: memoryview) -> list[int]:
    """Write the number of each rank into memory of rank 0, and return what this rank then reads."""
    memory[host.rank] = host.rank + 1
    host.Barrier()  # the ranks of a host are processes: a barrier orders their loads and stores too
    return list(memory[: host.size])


def main() -> None:
    """Share memory in both ways, and let all ranks write to it."""
    host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)

    window = MPI.Win.Allocate_shared(SIZE if host.rank == 0 else 0, comm=host)
    memory = memoryview(window.Shared_query(0)[0])
    theirs = sign(host, memory)
    pinned = ""
    if host.rank == 0:  # memory of MPI is neither locked nor pinned, but can be
        address = MPI.Get_address(memory)
        with iobmd.IOMemoryDescriptor.withAddressRange(
            address, SIZE, iobmd.kIODirectionInOut, iobmd.kernel_task
        ) as existing:
            existing.prepare()
            pinned = existing.wiring.value
            existing.complete()
    memory.release()
    window.Free()

    with shared_by_first(host, SIZE) as buffer:
        with memoryview(buffer) as memory:
            ours = sign(host, memory)
        wirings = host.gather(buffer.wiring.value)
        host.Barrier()  # rank 0 may free the buffer first: the others' mapping remains

    if host.rank == 0:
        print(f"Win.Allocate_shared: {theirs}, {pinned} between prepare and complete")
        print(f"iobmd.share:         {ours}, {', '.join(wirings)}")


if __name__ == "__main__":
    main()
