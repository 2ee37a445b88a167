"""Another process of a target's user that disturbs the guest in it, at any of its system calls."""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.child import NOBODY, in_child
from support.errors import code_of
from support.guests import before_call, steal
from support.rawmemory import memfd
from support.targets import Target, children, until, until_at_rest

import iobmd
from iobmd import IOMemoryDescriptor, IOReturn, IOReturnError, Wiring, procfs
from iobmd.remote.fd_passing import Channel
from iobmd.remote.guest import Guest
from iobmd.units import PAGE_SIZE

pytestmark = [pytest.mark.needs("root"), pytest.mark.usefixtures("may_trace")]
SIZE = 64 << 10
NEAR, FAR = 0, 1
"""The ends of the socket pair of a guest, which receives by the second."""


@pytest.fixture
def target() -> Iterator[Target]:
    """A program of another user, which the test leaves unchanged."""
    with Target(["sh", "-c", "echo ready; exec sleep 1000"], user=NOBODY) as program:
        until_at_rest(program.pid)
        before = state(program.pid)
        yield program
        until(lambda: state(program.pid) == before)  # a worker of the kernel releases pins
        assert state(program.pid) == before
        assert not children(program.pid)


def state(pid: int) -> tuple[list[str], list[str], list[str]]:
    """Return the areas, descriptors and signals of a program, and its tracer."""
    areas = [" ".join(line.split()[:5]) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    status = procfs.status(pid)
    wanted = ("TracerPid", "Threads", "SigBlk", "SigPnd", "ShdPnd", "VmLck", "VmPin")
    fds = sorted(entry.name for entry in Path(f"/proc/{pid}/fd").iterdir())
    return areas, [status[name] for name in wanted], fds


def allocate(pid: int) -> None:
    iobmd.allocate(SIZE, task=pid, wired=False).free()


def prepared_stack(pid: int) -> IOMemoryDescriptor:
    """Return a page of the stack, prepared."""
    stack = next(area for area in procfs.maps(pid) if area.name == "[stack]")
    memory = IOMemoryDescriptor.withAddressRange(stack.end - PAGE_SIZE, PAGE_SIZE, 3, pid)
    memory.prepare()
    return memory


def prepare(pid: int) -> None:
    prepared_stack(pid).complete()


WORK = {"allocate": allocate, "prepare": prepare}
CALLS = [("allocate", "socketpair"), ("allocate", "recvfrom"), ("allocate", "recvmsg"), ("allocate", "mmap"),
         ("allocate", "close"), ("prepare", "io_uring_setup"), ("prepare", "io_uring_register")]  # fmt: skip


def by_another_process(attack: Callable[[int], object], guest: Guest) -> None:
    pid = guest.pid
    in_child(lambda: attack(pid), uid=NOBODY)


@pytest.mark.parametrize(("work", "name"), CALLS)
def test_a_guest_that_is_killed(target: Target, work: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task keeps neither its memory nor a zombie, and the error says what happened."""

    def kill(guest: Guest) -> None:
        by_another_process(lambda pid: os.kill(pid, signal.SIGKILL), guest)

    with before_call(name, kill, monkeypatch), pytest.raises(IOReturnError, match="was killed") as caught:
        WORK[work](target.pid)
    assert caught.value.code == IOReturn.kIOReturnError


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM, signal.SIGSEGV], ids=lambda one: one.name)
@pytest.mark.parametrize(("work", "name"), [CALLS[3], CALLS[6]])
def test_a_guest_that_gets_a_signal(
    target: Target, work: str, name: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a stop of the process nor a signal that would end it reaches the guest or the task."""

    def send(guest: Guest) -> None:
        by_another_process(lambda pid: os.kill(pid, number), guest)

    with before_call(name, send, monkeypatch):
        WORK[work](target.pid)


def drain(pid: int) -> None:
    with socket.socket(fileno=steal(pid, FAR)) as far:
        while far.recv(4096, socket.MSG_DONTWAIT):
            pass


def test_a_stolen_message(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest does not wait for the message, which would make the command unkillable."""

    def attack(guest: Guest) -> None:
        with contextlib.suppress(BlockingIOError):
            by_another_process(drain, guest)

    begin = time.monotonic()
    with before_call("recvfrom", attack, monkeypatch):
        code = code_of(lambda: allocate(target.pid))
    assert code == IOReturn.kIOReturnError
    assert time.monotonic() - begin < 5


def take(pid: int) -> None:
    with contextlib.suppress(BlockingIOError):
        drain(pid)


def forge(pid: int) -> None:
    """Replace the arguments of a pin: the first struct iovec then contains another address."""
    with socket.socket(fileno=steal(pid, FAR)) as far, socket.socket(fileno=steal(pid, NEAR)) as near:
        data = bytearray(far.recv(4096, socket.MSG_DONTWAIT))
        at = next(at for at in range(0, len(data), 8) if any(data[at : at + 8]))
        address = int.from_bytes(data[at : at + 8], "little")
        data[at : at + 8] = (address - PAGE_SIZE).to_bytes(8, "little")
        near.send(data)


def test_arguments_of_a_pin_that_are_stolen(
    target: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The memory is locked instead, and the reason is named."""
    caplog.set_level(logging.DEBUG, "iobmd")
    with before_call("recvfrom", lambda guest: by_another_process(take, guest), monkeypatch):
        memory = prepared_stack(target.pid)
    assert memory.wiring is Wiring.RESIDENT
    assert f"cannot pin memory of task {target.pid}: recvfrom in task" in caplog.text
    memory.complete()


def test_arguments_of_a_pin_that_are_forged(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other memory than was asked for is not called pinned."""
    with (
        before_call("recvfrom", lambda guest: by_another_process(forge, guest), monkeypatch),
        pytest.raises(iobmd.CannotWireError, match="overwrote the arguments"),
    ):
        prepared_stack(target.pid)


def fill(pid: int) -> None:
    with socket.socket(fileno=steal(pid, NEAR)) as near, contextlib.suppress(BlockingIOError):
        while True:
            near.send(bytes(1024), socket.MSG_DONTWAIT)


def shut(pid: int) -> None:
    with socket.socket(fileno=steal(pid, NEAR)) as near:
        near.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("attack", [fill, shut])
def test_a_socket_that_accepts_nothing(
    target: Target, attack: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process does not wait until the socket pair has room, and no signal kills it (SIGPIPE)."""
    real = Guest.fetch

    def fetch(self: Guest, fd: int) -> int:
        by_another_process(attack, self)
        return real(self, fd)

    monkeypatch.setattr(Guest, "fetch", fetch)
    before, begin = signal.signal(signal.SIGPIPE, signal.SIG_DFL), time.monotonic()
    try:
        code = code_of(lambda: allocate(target.pid))
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert code == IOReturn.kIOReturnError
    assert time.monotonic() - begin < 5


def test_memory_of_another_process_in_place_of_that_of_this_one(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest maps what it receives; what was mapped is compared with what was sent."""
    real = Channel.send

    def send(self: Channel, fd: int) -> None:
        pid, header = self.guest.pid, self._header()

        def inject() -> None:
            with socket.socket(fileno=steal(pid, NEAR)) as near, memfd(SIZE) as memory:
                near.send(header)
                socket.send_fds(near, [b"."], [memory])

        in_child(inject, uid=NOBODY)
        real(self, fd)

    monkeypatch.setattr(Channel, "send", send)
    code = code_of(lambda: iobmd.allocate(SIZE, task=target.pid, wired=False))
    assert code == IOReturn.kIOReturnError
