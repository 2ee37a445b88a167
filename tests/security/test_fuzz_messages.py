"""Arbitrary messages of a peer of `attach`: the result is an IOReturnError or a buffer, and nothing remains."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import socket
import struct
import tempfile
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from support.child import NOBODY
from support.fuzzing import anything, fuzzed, mutated, numbers

import iobmd
from iobmd import IOReturnError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = mmap.PAGESIZE
PAGEABLE, PURGEABLE, SHARED = 0x20, 0x40, 0x10000
F_ADD_SEALS, SEAL_SHRINK_AND_GROW = 1033, 6
SCM_CREDENTIALS = 2


def memfd(size: int, *, sealed: bool = True) -> int:
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if sealed:
        fcntl.fcntl(fd, F_ADD_SEALS, SEAL_SHRINK_AND_GROW)
    return fd


def read_only() -> int:
    fd = memfd(4 * PAGE)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def half_of(pair: tuple[int, int]) -> int:
    os.close(pair[0])
    return pair[1]


KINDS: dict[str, Callable[[], int]] = {
    "memfd": lambda: memfd(4 * PAGE),
    "purgeable memfd": lambda: memfd(3 * PAGE),
    "empty memfd": lambda: memfd(0),
    "odd memfd": lambda: memfd(2 * PAGE + 1),
    "unsealed memfd": lambda: memfd(4 * PAGE, sealed=False),
    "read-only memfd": read_only,
    "sparse memfd": lambda: memfd(8 << 30),
    "file": lambda: os.open(__file__, os.O_RDONLY),
    "temporary file": lambda: os.open(tempfile.gettempdir(), os.O_RDWR | os.O_TMPFILE, 0o600),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "path": lambda: os.open("/", os.O_PATH),
    "/dev/zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "/dev/null": lambda: os.open("/dev/null", os.O_RDWR),
    "/proc/self/mem": lambda: os.open("/proc/self/mem", os.O_RDWR),
    "pipe": lambda: half_of(os.pipe()),
    "eventfd": lambda: os.eventfd(0),
    "pidfd": lambda: os.pidfd_open(os.getpid()),
    "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
}


@contextlib.contextmanager
def sent(data: bytes, makers: list[Callable[[], int]], user: int, rest: bytes = b"") -> Iterator[socket.socket]:
    """Send a message with descriptors as the process of a user; root may specify other credentials (unix(7))."""
    here, there = socket.socketpair()
    with here, there:
        for end in (here, there):
            end.settimeout(10)
        fds = []
        try:
            fds = [make() for make in makers]
            ancillary: list[tuple[int, int, bytes]] = []
            if fds:
                ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds)))
            if os.geteuid() == 0:
                ancillary.append((socket.SOL_SOCKET, SCM_CREDENTIALS, struct.pack("=iII", os.getpid(), user, user)))
            here.sendmsg([data], ancillary)
            here.sendall(rest)
        finally:
            for fd in fds:
                os.close(fd)
        here.shutdown(socket.SHUT_WR)
        yield there


def attach(data: bytes, kinds: list[str], user: int, *, rest: bytes = b"", wired: bool | None = False) -> bool:
    """Return whether a message is accepted; its memory must be usable then, and freed afterwards."""
    with sent(data, [KINDS[kind] for kind in kinds], user, rest) as end:
        try:
            with iobmd.attach(end, wired=wired) as buffer:
                assert 0 <= len(buffer) <= buffer.getCapacity()
                assert buffer.readBytes(0, min(len(buffer), PAGE)) is not None
                if len(buffer):
                    buffer.writeBytes(len(buffer) - 1, b"x")
        except IOReturnError as error:
            assert str(error)
            return False
    return True


def message(description: Any, *, mark: bytes = b"iobmd1", length: int | None = None) -> bytes:
    text = json.dumps(description).encode()
    return struct.pack("=6sxxI", mark, len(text) if length is None else length) + text


users = st.sampled_from([0, NOBODY, os.geteuid()])
kinds = st.lists(st.sampled_from(sorted(KINDS)), max_size=3) | st.just(["memfd"])
options = st.integers(0, 1 << 24) | st.sampled_from(
    [SHARED | PAGEABLE, SHARED, SHARED | PAGEABLE | PURGEABLE, SHARED | PAGEABLE | 0x90]
)
pages = st.integers(0, 5).map(lambda count: count * PAGE)
pieces = st.lists(st.tuples(pages, pages), max_size=5)
plausible = st.tuples(
    options, st.integers(0, 5 * PAGE), st.integers(0, 5 * PAGE), pieces, st.sampled_from([PAGE, 1 << 20])
)


@fuzzed(50, data=st.binary(max_size=200), kinds=kinds, user=users)
def test_any_bytes(data: bytes, kinds: list[str], user: int) -> None:
    assert not attach(data or b"x", kinds, user)


@fuzzed(60, description=plausible, kinds=kinds, user=users, wired=st.sampled_from([None, False]))
def test_plausible_numbers(description: Any, kinds: list[str], user: int, wired: bool | None) -> None:
    """Pieces within and past the memory, overlapping ones, with descriptors of every kind."""
    if attach(message(description), kinds, user, wired=wired):
        options, capacity, length, extents, _alignment = description
        assert len(kinds) == 1
        assert "memfd" in kinds[0] or kinds[0] == "temporary file"
        assert 0 < capacity <= sum(size for _offset, size in extents)
        assert length <= capacity
        assert kinds[0] not in ("unsealed memfd", "temporary file") or user in (0, os.geteuid())
        assert not options & PURGEABLE or options & PAGEABLE


@st.composite
def descriptions_with_wrong_fields(draw: st.DrawFn) -> Any:
    """Return a description that is valid except for some of its fields."""
    fields: list[Any] = [SHARED | PAGEABLE, 2 * PAGE, PAGE, [[0, PAGE], [PAGE, PAGE]], PAGE]
    for _ in range(draw(st.integers(1, 3))):
        fields[draw(st.integers(0, 4))] = draw(anything(SHARED, 16 << 10))
    if isinstance(fields[3], list) and draw(st.booleans()):
        fields[3] = draw(st.lists(st.tuples(numbers(8 << 30), numbers(8 << 30)), min_size=1, max_size=4))
    return draw(st.just(fields) | anything())


@fuzzed(80, description=descriptions_with_wrong_fields(), kind=st.sampled_from(["memfd", "sparse memfd"]), user=users)
def test_descriptions_with_wrong_fields(description: Any, kind: str, user: int) -> None:
    attach(message(description), [kind], user)


@fuzzed(
    50,
    data=mutated(plausible.map(message)),
    rest=st.binary(max_size=20),
    user=users,
    length=st.none() | st.integers(0, (1 << 32) - 1),
)
def test_mutated_messages(data: bytes, rest: bytes, user: int, length: int | None) -> None:
    if length is not None and len(data) >= 12:
        data = data[:8] + struct.pack("=I", length) + data[12:]
    attach(data or b"x", ["memfd"], user, rest=rest)


@fuzzed(40, word=numbers() | st.integers(0, 0x7FFF), steps=st.lists(st.integers(1, 4), max_size=4))
def test_purgeable_words(word: int, steps: list[int]) -> None:
    """The word with the state after the memory, to which every process with the descriptor may write."""
    description = [SHARED | PAGEABLE | PURGEABLE, 2 * PAGE, 2 * PAGE, [[0, 2 * PAGE]], PAGE]
    fd = memfd(3 * PAGE)
    try:
        with (
            sent(message(description), [lambda: os.dup(fd)], NOBODY) as end,
            iobmd.attach(end, wired=False) as buffer,
        ):
            for step in steps:
                os.pwrite(fd, struct.pack("=Q", word % (1 << 64)), 2 * PAGE)
                with contextlib.suppress(IOReturnError):
                    assert buffer.setPurgeable(step) in (2, 3, 4)
                with contextlib.suppress(IOReturnError):
                    buffer.readBytes(0, 10)
    finally:
        os.close(fd)
