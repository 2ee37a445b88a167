"""Descriptors that cross a boundary: sent by a peer, passed to a target, or inherited by another program."""

import array
import contextlib
import fcntl
import mmap
import os
import resource
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.child import NOBODY, in_child, sleeping
from support.errors import code_of
from support.guests import before_call, steal

import iobmd
from iobmd import IOReturn, pagemap, procfs
from iobmd.remote import fd_passing
from iobmd.remote.guest import Guest

PAGE = mmap.PAGESIZE
F_OFD_SETLK, SO_PASSCRED = 37, 16
ANYWHERE = 1


def message(size: int) -> bytes:
    """Return the message of `Handle.send` for memory of this size."""
    here, there = socket.socketpair()
    with here, there, iobmd.allocate(size, shared=True, wired=False) as buffer:
        iobmd.share(buffer, here).close()
        data, fds, _flags, _address = socket.recv_fds(there, 12, 1)
        os.close(fds[0])
        return data + there.recv(4096)


def unsealed(size: int) -> int:
    fd = os.memfd_create("hostile")
    os.ftruncate(fd, size)
    return fd


@pytest.mark.needs("root")
def test_the_descriptor_counts_as_that_of_its_own_sender() -> None:
    """Another user has a program of root write the first byte: SO_PASSCRED at one end adds root's credentials."""
    text = message(PAGE)
    here, there = socket.socketpair()
    with here, there:
        here.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
        subprocess.run(["printf", text[:1].decode()], stdout=here, check=True)

        def attack() -> None:
            socket.send_fds(here, [text[1:12]], [unsealed(PAGE)])
            here.sendall(text[12:])

        in_child(attack, uid=NOBODY)
        assert code_of(lambda: iobmd.attach(there).free()) == IOReturn.kIOReturnBadArgument


def send_all(peer: socket.socket, text: bytes, fds: list[int]) -> None:
    """Send a message as this user."""
    rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)
    sender = socket.SOL_SOCKET, 2, struct.pack("=iII", os.getpid(), os.geteuid(), os.getegid())
    peer.sendmsg([text[:12]], [rights, sender])
    peer.sendall(text[12:])


class SocketWithoutCredentials:
    """A socket, as a library may wrap it, that discards the credentials of messages."""

    def __init__(self, wrapped: socket.socket) -> None:
        self._wrapped = wrapped
        self.getsockopt, self.setsockopt, self.sendmsg = wrapped.getsockopt, wrapped.setsockopt, wrapped.sendmsg

    def recvmsg(self, *arguments: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        data, ancillary, flags, address = self._wrapped.recvmsg(*arguments)
        return data, [one for one in ancillary if one[1] == socket.SCM_RIGHTS], flags, address


@pytest.mark.parametrize("has_credentials", [True, False], ids=["the control", "without"])
def test_a_sender_without_credentials_is_not_root(has_credentials: bool) -> None:
    here, there = socket.socketpair()
    with here, there:
        fd = unsealed(PAGE)
        send_all(here, message(PAGE), [fd])
        os.close(fd)
        source: Any = there if has_credentials else SocketWithoutCredentials(there)
        if has_credentials:
            iobmd.attach(source).free()
        else:
            assert code_of(lambda: iobmd.attach(source)) == IOReturn.kIOReturnBadArgument


def open_pipe(_folder: Path) -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def open_memfd_for_reading(_folder: Path) -> int:
    memory = unsealed(2 * PAGE)
    try:
        return os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    finally:
        os.close(memory)


def open_file(flags: int) -> Callable[[Path], int]:
    def opened(folder: Path) -> int:
        (folder / "file").write_bytes(bytes(2 * PAGE))
        return os.open(folder / "file", flags)

    return opened


OTHER: dict[str, Callable[[Path], int]] = {
    "pipe": open_pipe,
    "memfd, read-only": open_memfd_for_reading,
    "socket": lambda _folder: socket.socket(socket.AF_UNIX).detach(),
    "file, write-only": open_file(os.O_WRONLY),
    "file, O_PATH": open_file(os.O_PATH),
    "directory": lambda folder: os.open(folder, os.O_RDONLY),
    "memory of this process": lambda _folder: os.open("/proc/self/mem", os.O_RDWR),
    "device": lambda _folder: os.open("/dev/zero", os.O_RDWR),
}


@pytest.mark.parametrize("kind", OTHER)
def test_descriptors_of_other_things_are_refused_and_closed(kind: str, tmp_path: Path) -> None:
    """Even a peer of the same user, whose memory need not be sealed, cannot make other files be mapped."""
    text, before = message(PAGE), descriptors()
    here, there = socket.socketpair()
    with here, there:
        fd = OTHER[kind](tmp_path)
        send_all(here, text, [fd])
        os.close(fd)
        assert code_of(lambda: iobmd.attach(there).free()) == IOReturn.kIOReturnBadArgument
    end = time.monotonic() + 10
    while descriptors() != before:  # a thread closes some of them
        assert time.monotonic() < end


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_more_descriptors_than_are_free() -> None:
    """The kernel omits those for which no number is free (MSG_CTRUNC): none of the others remains open."""

    def attacked() -> None:
        text, before = message(PAGE), descriptors()
        here, there = socket.socketpair()
        with here, there, contextlib.ExitStack() as stack:
            fd = unsealed(PAGE)
            stack.callback(os.close, fd)
            send_all(here, text, [fd] * 100)
            room = max(map(int, os.listdir("/proc/self/fd"))) + 20  # noqa: PTH208
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, room))
            assert code_of(lambda: iobmd.attach(there).free()) == IOReturn.kIOReturnBadArgument
        assert descriptors() == before

    in_child(attacked)


def test_a_message_in_pieces_with_many_descriptors() -> None:
    """Each piece may come with 253: they are refused before the table of this process is full of them."""
    text, before = message(PAGE), descriptors()
    here, there = socket.socketpair()
    with here, there:
        fd = unsealed(PAGE)
        send_all(here, text[:12], [fd])
        for _ in range(3):
            socket.send_fds(here, [b"["], [fd] * 100)
        os.close(fd)
        with pytest.raises(iobmd.IOReturnError, match="too many descriptors") as caught:
            iobmd.attach(there)
        assert caught.value.code == IOReturn.kIOReturnBadArgument
    assert descriptors() == before


def test_descriptors_are_closed_without_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate thread closes those that may wait; they do not remain open if none can be started."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    text, before = message(PAGE), descriptors()
    here, there = socket.socketpair()
    with here, there:
        fd = open_pipe(tmp_path)
        send_all(here, text, [fd])
        os.close(fd)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert code_of(lambda: iobmd.attach(there)) == IOReturn.kIOReturnBadArgument
    assert descriptors() == before


OURS = "memfd:", "iobmd", "anon_inode", "pagemap", "pidfd", "/mem"


def test_a_program_that_is_started_inherits_no_descriptor() -> None:
    """By system(3), for example, which closes none: an unprivileged program would have pagemap and all memory."""
    with contextlib.ExitStack() as stack, sleeping() as task:
        for keywords in ({"shared": True}, {"shared": True, "task": None}, {"purgeable": True}, {"contiguous": True}):
            stack.enter_context(iobmd.allocate(4 * PAGE, **{"wired": "contiguous" in keywords, **keywords}))
        shared = stack.enter_context(iobmd.allocate(4 * PAGE, shared=True, wired=False, purgeable=True))
        handle = stack.enter_context(iobmd.share(shared))
        stack.enter_context(handle.attach())
        here, there = map(stack.enter_context, socket.socketpair())
        handle.send(here)
        stack.enter_context(iobmd.Handle.receive(there))
        stack.enter_context(shared.map(0x04000000))
        area = next(procfs.maps(task.pid))
        iobmd.Task(task.pid).read(area.start, 16)
        with contextlib.suppress(iobmd.IOReturnError):  # other tasks may not be traced, or frames are hidden
            stack.enter_context(shared.createMappingInTask(task.pid, 0, ANYWHERE))
            list(pagemap.pages(task.pid, area.start, PAGE))
        assert any(name in link for link in links("self") for name in OURS), "the control"
        done = subprocess.run(
            ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True
        )
        inherited = [line.partition(" -> ")[2] for line in done.stdout.splitlines()]
        assert not [link for link in inherited for name in OURS if name in link]


def links(pid: int | str) -> list[str]:
    folder = Path(f"/proc/{pid}/fd")
    found = []
    for entry in list(folder.iterdir()):
        with contextlib.suppress(OSError):
            found.append(str(entry.readlink()))
    return found


@pytest.mark.usefixtures("may_trace")
def test_a_stolen_descriptor_is_another_open_file_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """With that of this process, O_APPEND would redirect its writes, and F_UNLCK release its locks."""
    stolen: list[int] = []

    def attack(guest: Guest) -> None:
        stolen.append(steal(guest.pid, fd_passing.RECEIVED))

    with sleeping() as program, iobmd.allocate(PAGE, shared=True, wired=False, purgeable=True) as buffer:
        with before_call("mmap", attack, monkeypatch):
            mapped = buffer.createMappingInTask(program.pid, 0, ANYWHERE)
        with mapped:
            require_separate(buffer, stolen.pop())


def test_a_recipient_gets_another_open_file_description() -> None:
    here, there = socket.socketpair()
    with here, there, iobmd.allocate(PAGE, shared=True, wired=False, purgeable=True) as buffer:
        iobmd.share(buffer, here).close()
        _data, fds, _flags, _address = socket.recv_fds(there, PAGE, 1)
        require_separate(buffer, fds[0])


def require_separate(buffer: iobmd.IOBufferMemoryDescriptor, other: int) -> None:
    shared = buffer._memory().require_backing().shared
    assert shared
    number = shared.fd.fileno()
    assert os.fstat(number).st_ino == os.fstat(other).st_ino, "the control"
    fcntl.fcntl(other, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)
    flags = Path(f"/proc/self/fdinfo/{number}").read_text().partition("flags:")[2].split()[0]
    os.close(other)
    assert int(flags, 8) & (os.O_APPEND | os.O_NONBLOCK) == 0
