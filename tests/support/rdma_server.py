"""The other machine of RDMA tests: a buffer that is registered for all accesses, and commands on its contents.

`python3 -m support.rdma_server KIND SIZE`. Messages are lines of JSON on its standard input and output.
"""

import json
import os
import sys
import zlib

import iobmd
from iobmd import rdma
from support.examples import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

ALL = 0xF  # IBV_ACCESS_LOCAL_WRITE, …REMOTE_WRITE, …REMOTE_READ and …REMOTE_ATOMIC
MIB = 1 << 20
KINDS: dict[str, dict[str, bool]] = {
    "pinned": {},
    "pageable": {"wired": False},
    "shared": {"shared": True},
}


def fill(buffer: iobmd.IOMemoryDescriptor) -> None:
    """Fill a buffer with random bytes that differ in each MiB: random bytes for all of it take too long."""
    block = os.urandom(MIB)
    for number, offset in enumerate(range(0, buffer.getLength(), MIB)):
        turned = block[number:] + block[:number]
        buffer.writeBytes(offset, turned[: buffer.getLength() - offset])


def checksum(buffer: iobmd.IOMemoryDescriptor) -> int:
    """Return the CRC-32 of a buffer's memory."""
    with buffer.map() as mapped, memoryview(mapped) as view:
        return zlib.crc32(view)


def main() -> int:
    """Serve until the input ends."""
    from far.messages import Station, receive, send
    from far.queue_pair import QueuePair

    from support.rxe import DEVICE

    kind, size = sys.argv[1:]
    with (
        QueuePair(DEVICE, access=ALL) as pair,
        iobmd.allocate(int(size), **KINDS[kind]) as buffer,
        rdma.register(buffer, pair.domain, ALL) as region,
    ):
        send(sys.stdout, station=pair.here, address=region.address, key=region.rkey)
        while (message := receive(sys.stdin)) is not None:
            match message:
                case {"station": station}:
                    pair.connect(Station(*station))
                case {"fill": True}:
                    fill(buffer)
            if buffer.wiring is iobmd.Wiring.PINNED:
                buffer.verify()
            send(sys.stdout, checksum=checksum(buffer), start=json.dumps(list(buffer.readBytes(0, 16))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
