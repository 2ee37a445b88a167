"""`python -m e1000 ADDRESS OWN-IP PEER-IP [SIZE]` sends an ARP request and a ping of SIZE bytes."""

import os
import socket
import sys
import time

import iobmd
from iobmd import IOMultiMemoryDescriptor, kIODirectionOut

from . import Card
from .frames import arp_reply, arp_request, echo_headers, echo_reply


def main() -> int:
    """Run the command and return 0; errors are exceptions."""
    name, own, peer, *size = sys.argv[1:]
    mine, wanted = socket.inet_aton(own), socket.inet_aton(peer)
    with Card(name) as card:
        target = resolve(card, mine, wanted)
        print(f"{peer} is at {target.hex(':')}")
        begin = time.perf_counter()
        payload = os.urandom(int(size[0]) if size else 1400)
        pieces, reply = ping(card, target, mine, wanted, payload)
        assert reply == payload
        print(f"{len(reply)} bytes returned in {(time.perf_counter() - begin) * 1e3:.1f} ms, sent in {pieces} pieces")
    return 0


def resolve(card: Card, own: bytes, wanted: bytes) -> bytes:
    """Return the Ethernet address of an IPv4 address."""
    request = arp_request(card.address, own, wanted)
    with iobmd.IOBufferMemoryDescriptor.withBytes(request, kIODirectionOut) as frame:
        card.send(frame)
    while (found := arp_reply(card.receive(), wanted)) is None:
        pass
    return found


def ping(card: Card, target: bytes, own: bytes, peer: bytes, payload: bytes) -> tuple[int, bytes]:
    """Send an echo request; return the number of pieces in which it was sent, and the payload of the reply.

    The frame is gathered by the card: the headers and the payload are in separate buffers, and the payload is
    pageable memory, which need not be contiguous and is pinned only while it is sent.
    """
    headers = echo_headers(target, card.address, own, peer, payload)
    with (
        iobmd.IOBufferMemoryDescriptor.withBytes(headers, kIODirectionOut) as first,
        iobmd.allocate(len(payload), wired=False, direction="out") as second,
        IOMultiMemoryDescriptor.withDescriptors([first, second], kIODirectionOut) as frame,
    ):
        second.writeBytes(0, payload)
        pieces = card.send(frame)
    while (reply := echo_reply(card.receive())) is None:
        pass
    return pieces, reply


if __name__ == "__main__":
    sys.exit(main())
