"""RDMA between two guests: WRITE, READ and atomics in iobmd's memory, with checksums of up to 1 GiB."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support import rdma_server, rxe
from support.examples import EXAMPLES

import iobmd
from iobmd import rdma

sys.path.insert(0, str(EXAMPLES))

pytestmark = [pytest.mark.needs("rdma"), pytest.mark.usefixtures("rdma_machines")]
MIB = 1 << 20


class Server:
    """A buffer on the other machine, to which a queue pair here is connected."""

    def __init__(self, process: subprocess.Popen[str], pair) -> None:
        from far.messages import Station, receive

        self._process, self.pair = process, pair
        first = receive(process.stdout)
        assert first
        pair.connect(Station(*first["station"]))
        self.address, self.key = first["address"], first["key"]
        self.ask(station=pair.here)

    def ask(self, **message: object) -> dict:
        from far.messages import receive, send

        send(self._process.stdin, **message)
        answer = receive(self._process.stdout)
        assert answer
        return answer


@contextmanager
def serving(kind: str, size: int) -> Iterator[Server]:
    from far.queue_pair import QueuePair

    with QueuePair(rxe.DEVICE) as pair:
        process = rxe.start_there(f"python3 -m support.rdma_server {kind} {size}")
        try:
            yield Server(process, pair)
        finally:
            process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("pinned", 100), ("pinned", 5 * MIB + 11), ("pageable", 20 * MIB), ("shared", 5 * MIB), ("pinned", 1024 * MIB)],
    ids=str,
)
@pytest.mark.timeout(1500)
def test_write_and_read(kind: str, size: int, record_property) -> None:
    """The other machine computes the checksum of what arrived, and this one that of what it read there."""
    import pyverbs.enums as verbs

    with (
        serving(kind, size) as server,
        iobmd.allocate(size) as buffer,
        rdma.register(buffer, server.pair.domain, verbs.IBV_ACCESS_LOCAL_WRITE) as region,
    ):
        rdma_server.fill(buffer)
        server.pair.transfer(verbs.IBV_WR_RDMA_WRITE, region, server.address, server.key)
        assert server.ask()["checksum"] == rdma_server.checksum(buffer)
        there = server.ask(fill=True)["checksum"]
        assert there != rdma_server.checksum(buffer)
        server.pair.read(region, server.address, server.key)
        assert rdma_server.checksum(buffer) == there
        buffer.verify()
    record_property("RDMA MiB between guests", 2 * size // MIB)


@pytest.mark.needs("rdma_answers")
def test_atomics(record_property) -> None:
    import pyverbs.enums as verbs
    from pyverbs.wr import SGE, SendWR

    with (
        serving("pageable", MIB) as server,
        iobmd.allocate(8) as result,
        rdma.register(result, server.pair.domain, verbs.IBV_ACCESS_LOCAL_WRITE) as region,
    ):
        for before in range(3):
            request = SendWR(
                opcode=verbs.IBV_WR_ATOMIC_FETCH_AND_ADD, num_sge=1, sg=[SGE(region.address, 8, region.lkey)]
            )
            request.set_wr_atomic(server.key, server.address + 8, 1, 0)
            server.pair._pair.post_send(request)
            server.pair.wait()
            assert int.from_bytes(result.readBytes(0, 8), sys.byteorder) == before
        assert server.ask()["start"] == str([*bytes(8), *(3).to_bytes(8, sys.byteorder)])
    record_property("RDMA between guests, atomics", "works")
