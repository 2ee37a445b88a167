"""A peer of `attach`, of another user, that tries to crash, exhaust or deceive the process that attaches."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, in_child
from support.fuse import FILE_SYSTEM

import iobmd
from iobmd import IOReturn, IOReturnError, sharing
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
HUGE = 2 << 20
F_ADD_SEALS, SEAL_SHRINK_AND_GROW = 1033, 6
MFD_HUGETLB = 4
SHARED, SHARED_AND_PAGEABLE = 0x10000, 0x10020


def memory(size: int, flags: int = 0) -> int:
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, F_ADD_SEALS, SEAL_SHRINK_AND_GROW)
    return fd


def message(extents: object, capacity: int, alignment: object = kernel.PAGE) -> bytes:
    text = json.dumps([SHARED_AND_PAGEABLE, capacity, capacity, extents, alignment]).encode()
    return struct.pack("=6sxxI", b"iobmd1", len(text)) + text


def attached(peer: Callable[[socket.socket], object], *, user: int = NOBODY) -> IOReturn | None:
    """Attach memory that a peer of `user` sends; return the code of the refusal, None if it was accepted."""

    def child() -> None:
        there.close()
        peer(here)

    here, there = socket.socketpair()
    with here, there:
        # In a thread, because the socket may not accept a whole message before it is read.
        running = threading.Thread(target=partial(in_child, child, uid=user))
        running.start()
        try:
            iobmd.attach(there).free()
        except IOReturnError as error:
            return error.code
        finally:
            there.close()
            running.join()
    return None


def hostile(data: bytes, fd: Callable[[], int]) -> Callable[[socket.socket], object]:
    def send(peer: socket.socket) -> None:
        descriptor = fd()
        socket.send_fds(peer, [data[:12]], [descriptor])
        with contextlib.suppress(OSError):  # refused before the whole message was read
            peer.sendall(data[12:])

    return send


SILENT_FILE = (
    FILE_SYSTEM
    + """
import socket, sys
server, fd = served_file(sys.argv[1])
peer = socket.socket(fileno=int(sys.argv[2]))
os.setresuid(65534, 65534, 65534)
message = bytes.fromhex(sys.argv[3])
os.write(1, b"%d\\n" % server)
sys.stdin.readline()
credentials = struct.pack("=iII", os.getpid(), 65534, os.getgid())
peer.sendmsg([message[:12]], [(1, 1, struct.pack("=i", fd)), (1, 2, credentials)])
peer.sendall(message[12:])
sys.stdin.readline()
"""
)


@pytest.mark.needs("root")
def test_a_file_whose_server_does_not_answer(tmp_path: Path) -> None:
    """Neither inspecting the file nor its close(2), which waits for the server, delays `attach`."""
    here, there = socket.socketpair()
    text = message([[0, 8192]], 8192).hex()
    program = [sys.executable, "-c", SILENT_FILE, str(tmp_path), str(there.fileno()), text]
    with (
        here,
        there,
        subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[there.fileno()]
        ) as peer,
    ):
        assert peer.stdin
        assert peer.stdout
        server = int(peer.stdout.readline())
        codes: list[IOReturn] = []

        def attach() -> None:
            try:
                iobmd.attach(here)
            except IOReturnError as error:
                codes.append(error.code)

        attaching = threading.Thread(target=attach, daemon=True)
        try:
            os.kill(server, signal.SIGSTOP)
            attaching.start()
            peer.stdin.write("\n")
            peer.stdin.flush()
            attaching.join(30)
            refused = list(codes)
        finally:
            os.kill(server, signal.SIGKILL)
        assert refused == [IOReturn.kIOReturnBadArgument]


def socket_whose_close_waits(stack: contextlib.ExitStack) -> socket.socket:
    """A TCP socket whose last close(2) waits for a minute, because its data is not read."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    sender = socket.create_connection(listener.getsockname())
    receiver = stack.enter_context(listener.accept()[0])
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PAGE_SIZE)
    sender.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.send(bytes(1 << 16))
    sender.setblocking(True)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    return sender


@pytest.mark.parametrize("place", ["with the header", "among many", "with the description"])
def test_a_socket_whose_close_waits(place: str) -> None:
    """The only descriptor is the one that is sent: closing it waits, even in the kernel if there are too many."""
    text = message([[0, 8192]], 8192)
    with contextlib.ExitStack() as stack:
        here, there = map(stack.enter_context, socket.socketpair())
        here.settimeout(2)
        sender = socket_whose_close_waits(stack)
        fd = memory(8192)
        stack.callback(os.close, fd)
        first = {"with the header": [sender.fileno()], "among many": [fd] * 30 + [sender.fileno()]}
        socket.send_fds(there, [text[:12]], first.get(place, [fd]))
        socket.send_fds(there, [text[12:]], [] if place in first else [sender.fileno()])
        sender.close()
        begin = time.monotonic()
        with pytest.raises(IOReturnError) as caught:
            iobmd.attach(here)
        assert time.monotonic() - begin < 20
        assert caught.value.code == IOReturn.kIOReturnBadArgument


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("alignment", [0, 1, 3, 2048, 12288, 1 << 47, 1 << 61, -PAGE_SIZE, True, 4096.0, "4096"])
def test_impossible_alignments(alignment: object) -> None:
    """An alignment of 0 once made the whole address space the excess of the mapping, which was unmapped."""
    before = mappings()
    two = message([[PAGE_SIZE, PAGE_SIZE], [0, PAGE_SIZE]], 8192, alignment)
    assert attached(hostile(two, partial(memory, 8192))) == IOReturn.kIOReturnBadArgument
    assert abs(mappings() - before) < 10


@pytest.mark.parametrize(
    "extents",
    [
        [[0, PAGE_SIZE], [0, PAGE_SIZE]],
        [[0, 8192], [PAGE_SIZE, PAGE_SIZE]],
        [[0, 0], [0, PAGE_SIZE]],
        [[PAGE_SIZE, PAGE_SIZE], [0, 1 << 61]],
        [[0, 1 << 61], [0, 1 << 61], [0, 1 << 61], [0, 1 << 61]],
        [[0, PAGE_SIZE], [8192, PAGE_SIZE]],
        [[2, PAGE_SIZE]],
    ],
    ids=["twice", "overlap", "empty", "huge", "sum overflows", "past the end", "within a page"],
)
def test_impossible_pieces(extents: list[list[int]]) -> None:
    before = mappings()
    assert attached(hostile(message(extents, PAGE_SIZE), partial(memory, 8192))) == IOReturn.kIOReturnBadArgument
    assert abs(mappings() - before) < 10
    assert "hostile" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("count", [20_000, 65_000])
def test_too_many_pieces(count: int) -> None:
    """Each piece is a mapping: 65,000 of them would exhaust vm.max_map_count; 20,000 fit the length of a message."""
    extents = [[number * PAGE_SIZE, PAGE_SIZE] for number in reversed(range(count))]
    peer = hostile(message(extents, count * PAGE_SIZE), lambda: memory(count * PAGE_SIZE))
    assert attached(peer) == IOReturn.kIOReturnBadArgument


@pytest.mark.needs("root")
def test_a_child_is_not_root_because_its_socket_was_made_by_root() -> None:
    """SO_PEERCRED of a socketpair names the process that created it."""

    def unsealed(peer: socket.socket) -> None:
        descriptor = os.memfd_create("hostile")
        os.ftruncate(descriptor, PAGE_SIZE)
        hostile(message([[0, PAGE_SIZE]], PAGE_SIZE), lambda: descriptor)(peer)

    assert attached(unsealed) == IOReturn.kIOReturnBadArgument


@pytest.mark.needs("root", "hugetlb")
def test_hugetlb_memory_of_another_user(hugetlb_pool: int) -> None:
    """Its size is sealed, but a hole can be punched, and with an empty pool the next access raises SIGBUS."""
    assert hugetlb_pool

    def pool_page(peer: socket.socket) -> None:
        hostile(message([[0, HUGE]], HUGE, HUGE), lambda: memory(HUGE, MFD_HUGETLB))(peer)

    assert attached(pool_page) == IOReturn.kIOReturnBadArgument


def test_what_is_sealed_is_accepted_from_anybody() -> None:
    """The control of the tests above."""
    assert attached(hostile(message([[PAGE_SIZE, PAGE_SIZE], [0, PAGE_SIZE]], 8192), partial(memory, 8192))) is None

    def share(peer: socket.socket) -> None:
        with iobmd.allocate(3 * MIB, shared=True, wired=False) as buffer:
            iobmd.share(buffer, peer).close()

    assert attached(share) is None


def test_no_descriptor_is_left() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        attached(
            hostile(message([[0, PAGE_SIZE], [0, PAGE_SIZE]], PAGE_SIZE), partial(memory, 8192)),
            user=os.geteuid() or NOBODY,
        )
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.needs("root", "memory_cgroup")
def test_wired_memory_that_does_not_fit(memory_cgroup: Callable[[int], Path]) -> None:
    """A sparse object costs its peer nothing, but populating it once got the attaching process killed."""
    size, limit = 8 << 30, 256 * MIB
    procs = memory_cgroup(limit)

    def sparse(peer: socket.socket) -> None:
        text = json.dumps([SHARED, size, size, [[0, size]], kernel.PAGE]).encode()
        hostile(struct.pack("=6sxxI", b"iobmd1", len(text)) + text, lambda: memory(size))(peer)

    def attacked() -> tuple[IOReturn | None, int]:
        procs.write_text("0")
        before = kernel.status("VmRSS")
        code = attached(sparse)
        return code, kernel.status("VmRSS") - before

    code, more = in_child(attacked)  # which the OOM killer would kill
    assert code == IOReturn.kIOReturnNoMemory
    assert more < limit // 2
    assert attached(sparse_and_pageable(size)) is None, "pageable memory is not populated"


def sparse_and_pageable(size: int) -> Callable[[socket.socket], object]:
    return hostile(message([[0, size]], size), lambda: memory(size))


class ByteByByteSocket:
    """A socket whose peer sends single bytes."""

    def recvmsg(self, *_arguments: int) -> tuple[bytes, list[object], int, None]:
        return b"x", [], 0, None


def test_a_peer_that_sends_single_bytes() -> None:
    """Half of the largest description takes 0.65 s; it took 5.4 s when each byte copied all previous ones."""
    begin = time.process_time()
    assert sharing._exactly(ByteByByteSocket(), MIB // 2, []) == b"x" * (MIB // 2)  # type: ignore[arg-type]
    assert time.process_time() - begin < 4
