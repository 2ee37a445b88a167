"""Memory that is unmapped under a descriptor: an error with the address, in a process that continues to run."""

import contextlib
import ctypes
import errno
import faulthandler
import os
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import rawmemory
from support.child import NOBODY, in_child
from support.errors import error_of
from support.rawmemory import PAGE, READ, SHARED, WRITE
from support.threads import running

import iobmd
from iobmd import (
    IODMACommand,
    IOMemoryDescriptor,
    IOMultiMemoryDescriptor,
    IOReturn,
    IOReturnError,
    IOSubMemoryDescriptor,
    host,
    kernel_task,
    kIOMemoryIncoherentIOFlush,
    kIOMemoryIncoherentIOStore,
)
from iobmd._native import mapping
from iobmd._native.mapping import FaultError, Mapping
from iobmd.physical.hugetlb import PoolBlocks

INOUT = 3
SIZE = 64 * PAGE
GOOD = 40 * PAGE  # the rest of it

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(mapping.BEST_FLUSH == mapping.NO_FLUSH, reason="this processor lacks cache line instructions"),
]


# --- ways to lose memory; each function takes (address, file)

WAYS: dict[str, Callable[[int, int], None]] = {
    "unmapped": lambda address, _fd: rawmemory.unmap(address + GOOD, SIZE - GOOD),
    "protected": lambda address, _fd: rawmemory.protect(address + GOOD, SIZE - GOOD, 0),
    "truncated": lambda _address, fd: os.ftruncate(fd, GOOD),
    "truncated inside a page": lambda _address, fd: os.ftruncate(fd, GOOD - 100),
}


class ExistingMemory:
    """Memory with or without a file, and a descriptor of it."""

    def __init__(self, *, file: bool) -> None:
        self.file = tempfile.TemporaryFile() if file else None  # noqa: SIM115 (closed below)
        if self.file:
            self.file.truncate(SIZE)
        flags = SHARED if file else rawmemory.PRIVATE | rawmemory.ANONYMOUS
        self.address = rawmemory.map_memory(SIZE, READ | WRITE, flags, self.fd)
        ctypes.memset(self.address, 1, SIZE)
        self.md = IOMemoryDescriptor.withAddressRange(self.address, SIZE, INOUT, kernel_task)

    @property
    def fd(self) -> int:
        return self.file.fileno() if self.file else -1

    def close(self) -> None:
        self.md.free()
        rawmemory.unmap(self.address, SIZE)
        if self.file:
            self.file.close()


ACTIONS: dict[str, Callable[[IOMemoryDescriptor], object]] = {
    "flush": lambda md: md.performOperation(kIOMemoryIncoherentIOFlush, 0, SIZE),
    "store": lambda md: md.performOperation(kIOMemoryIncoherentIOStore, 5, SIZE - 5),
    "store one line": lambda md: md.performOperation(kIOMemoryIncoherentIOStore, GOOD, 1),
    "read": lambda md: md.readBytes(0, SIZE),
    "read into": lambda md: md.readBytesInto(0, bytearray(SIZE)),
    "write": lambda md: md.writeBytes(0, bytes(SIZE)),
    "flush a part": lambda md: IOSubMemoryDescriptor.withSubRange(md, PAGE, SIZE - PAGE, INOUT).performOperation(
        kIOMemoryIncoherentIOFlush, 0, SIZE - PAGE
    ),
    "flush a concatenation": lambda md: IOMultiMemoryDescriptor.withDescriptors([md], INOUT).performOperation(
        kIOMemoryIncoherentIOFlush, 0, SIZE
    ),
    "prepare": lambda md: md.prepare(),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_an_error_with_the_address(way: str, action: Callable[[IOMemoryDescriptor], object]) -> None:
    def check() -> None:
        faulthandler.enable()
        handlers = Path("/proc/self/status").read_text().partition("SigBlk")[2].partition("Cap")[0]
        existing = ExistingMemory(file=way.startswith("truncated"))
        WAYS[way](existing.address, existing.fd)
        error = error_of(lambda: action(existing.md))
        assert error.code == IOReturn.kIOReturnVMError
        assert error.address == existing.address + GOOD
        assert hex(existing.address + GOOD) in str(error)
        assert Path("/proc/self/status").read_text().partition("SigBlk")[2].partition("Cap")[0] == handlers
        existing.close()

    in_child(check)


@pytest.mark.needs("frames")
@pytest.mark.parametrize("way", ["unmapped", "protected"])
def test_commands(way: str) -> None:
    def check() -> None:
        existing = ExistingMemory(file=False)
        existing.md.prepare()
        coherent = IODMACommand.withSpecification(64)
        coherent.setMemoryDescriptor(existing.md)
        coherent.synchronize(0, True)  # the whole range now uses a bounce buffer
        other = IODMACommand.withSpecification(64, 0, IODMACommand.kNonCoherent)
        other.setMemoryDescriptor(existing.md)
        unprepared = IODMACommand.withSpecification(64, 0, IODMACommand.kNonCoherent)
        unprepared.setMemoryDescriptor(existing.md, autoPrepare=False)
        WAYS[way](existing.address, -1)
        for action in (
            lambda: coherent.synchronize(iobmd.kIODirectionOut),
            lambda: coherent.synchronize(iobmd.kIODirectionIn),
            coherent.complete,
            other.complete,
            unprepared.prepare,
            lambda: IODMACommand.withSpecification(64, 0, IODMACommand.kNonCoherent).setMemoryDescriptor(existing.md),
        ):
            error = error_of(action)
            assert (error.code, error.address) == (IOReturn.kIOReturnVMError, existing.address + GOOD)
        for command in (coherent, other, unprepared):  # the transfers have ended nevertheless
            command.clearMemoryDescriptor()
        existing.md.complete()
        existing.close()

    in_child(check)


BOUNCED: dict[str, Callable[[IOMemoryDescriptor], IOMemoryDescriptor]] = {
    "memory": lambda md: md,
    "part": lambda md: IOSubMemoryDescriptor.withSubRange(md, PAGE, SIZE - PAGE, INOUT),
    "concatenation": lambda md: IOMultiMemoryDescriptor.withDescriptors([md], INOUT),
}


@pytest.mark.needs("frames")
@pytest.mark.parametrize("make", BOUNCED.values(), ids=BOUNCED)
def test_no_bounce_buffer_stands_in_for_what_is_gone(
    make: Callable[[IOMemoryDescriptor], IOMemoryDescriptor],
) -> None:
    """The kernel may map the copy at the unmapped addresses, from which it would then be copied."""

    def check() -> None:
        existing = ExistingMemory(file=False)
        command = IODMACommand.withSpecification(64)
        memory = make(existing.md)
        memory.prepare()
        command.setMemoryDescriptor(memory)
        rawmemory.unmap(existing.address, SIZE)
        error = error_of(lambda: command.synchronize(0, True))
        assert error.code == IOReturn.kIOReturnVMError
        assert error.address is not None
        assert existing.address <= error.address <= existing.address + PAGE
        command.clearMemoryDescriptor()

    in_child(check)


OWN_COPIES: dict[str, Callable[[int], object]] = {
    "read": lambda at: kernel_task.read(at, LARGE),
    "copy": lambda at: iobmd.copy(kernel_task, at, LARGE),
    "pageable copy": lambda at: iobmd.copy(kernel_task, at, LARGE, wired=False),
    "shared copy": lambda at: iobmd.copy(kernel_task, at, LARGE, shared=True),
}
LARGE = 4 << 20
"""Return a number of bytes for which malloc(3) also maps memory."""


@pytest.fixture
def gone() -> Iterator[int]:
    """Return an unmapped address, in the gap in which the kernel will map large memory next."""
    kinds = READ | WRITE, rawmemory.PRIVATE | rawmemory.ANONYMOUS, -1
    fill = [rawmemory.map_memory(LARGE, *kinds) for _ in range(64)]
    address = rawmemory.map_memory(3 * LARGE, *kinds)
    rawmemory.unmap(address, 3 * LARGE)
    yield address + 2 * LARGE
    for one in fill:
        rawmemory.unmap(one, LARGE)


@pytest.mark.parametrize("copy", OWN_COPIES.values(), ids=OWN_COPIES)
def test_a_copy_of_what_is_gone_is_none_of_itself(gone: int, copy: Callable[[int], object]) -> None:
    error = error_of(lambda: copy(gone))
    assert (error.code, error.address) == (IOReturn.kIOReturnVMError, gone)


def test_what_is_gone_is_a_hole_of_a_copy(gone: int) -> None:
    with iobmd.copy(kernel_task, gone, LARGE, unreadable="zero", wired=False) as buffer:
        assert buffer.holes == [(0, LARGE)]


@pytest.mark.needs("root")
@pytest.mark.parametrize("name", ["flush", "store", "flush a concatenation"])
def test_it_goes_away_in_the_middle(name: str) -> None:
    """All memory is mapped when the operation begins, and its end is unmapped before the operation reaches it.

    Reads and writes access pages that may require waiting last, so that they may already have accessed the end.
    """

    def check() -> None:
        existing = ExistingMemory(file=False)
        pause = rawmemory.Pause(existing.address + 20 * PAGE)
        found: list[IOReturnError] = []

        def act() -> None:
            found.append(error_of(lambda: ACTIONS[name](existing.md)))

        thread = threading.Thread(target=act)
        thread.start()
        pause.when_reached(lambda: WAYS["unmapped"](existing.address, -1))
        thread.join(30)
        assert [(error.code, error.address) for error in found] == [
            (IOReturn.kIOReturnVMError, existing.address + GOOD)
        ]
        pause.close()
        existing.close()

    in_child(check)


def test_it_comes_and_goes_under_several_threads() -> None:
    def check() -> None:
        existing = ExistingMemory(file=False)
        end = time.monotonic() + 0.5
        done, failed = [0], [0]

        def flush() -> None:
            while time.monotonic() < end or (not (done[0] and failed[0]) and time.monotonic() < end + 20):
                try:
                    existing.md.performOperation(kIOMemoryIncoherentIOFlush, 0, SIZE)
                    done[0] += 1
                except IOReturnError as error:
                    assert error.code == IOReturn.kIOReturnVMError
                    assert error.address is not None
                    assert existing.address + GOOD <= error.address < existing.address + SIZE
                    failed[0] += 1

        with running(flush, flush, flush) as threads:
            while any(thread.is_alive() for thread in threads):
                rawmemory.protect(existing.address + GOOD, SIZE - GOOD, 0)
                time.sleep(0.001)
                rawmemory.protect(existing.address + GOOD, SIZE - GOOD, READ | WRITE)
                time.sleep(0.001)
        assert done[0]
        assert failed[0]
        existing.close()

    in_child(check)


# --- the child process that performs the operation


@contextlib.contextmanager
def borrowed(size: int = SIZE) -> Iterator[Mapping]:
    address = rawmemory.map_memory(size)
    ctypes.memset(address, 1, size)
    yield Mapping.borrow(address, size, True)
    rawmemory.unmap(address, size)


def test_the_program_sees_no_child() -> None:
    def check() -> None:
        signals: list[int] = []
        signal.signal(signal.SIGCHLD, lambda number, _frame: signals.append(number))
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        descriptors = sorted(path.name for path in Path("/proc/self/fd").iterdir())
        with borrowed() as memory:
            for _ in range(100):
                memory.write_back(0, SIZE, True)
                with pytest.raises(ChildProcessError):
                    os.waitpid(-1, os.WNOHANG)
        assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == descriptors
        assert not signals
        assert signal.pthread_sigmask(signal.SIG_SETMASK, blocked) == blocked | {signal.SIGUSR2}
        assert not Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()

    in_child(check)


def test_signals_of_the_program_are_handled_once() -> None:
    """A signal handler that also ran in the child would run twice in the same memory."""
    sent = 200

    def check() -> int:
        os.setpgid(0, 0)
        reading, writing = os.pipe2(os.O_NONBLOCK)
        signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # one byte for each run of the handler in C
        group, pid = os.getpgid(0), os.fork()
        if not pid:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            for _ in range(sent):
                os.killpg(group, signal.SIGUSR1)
                time.sleep(0.002)
            os._exit(0)
        flushed = 0
        with borrowed(1 << 20) as memory:
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                memory.write_back(0, 1 << 20, True)
                flushed += 1
        assert flushed
        return len(os.read(reading, 1 << 16))

    assert 0 < in_child(check) <= sent


def test_bytes_past_and_around_a_hole() -> None:
    """Small and large copies to and from revocable memory report the first inaccessible byte."""

    def check() -> None:
        size = 8 << 20
        with borrowed(size) as memory:
            plain = bytearray(os.urandom(size))
            memory.write(0, plain)
            assert memory.read(0, size) == plain
            hole = 5 << 20
            rawmemory.protect(memory.address + hole, 3 << 20, 0)
            for offset, length in ((0, size), (hole - 1, 2), (hole - 3, 4 << 20 >> 1), (hole, 1), (hole + 77, 3)):
                for action in (
                    lambda: memory.read(offset, length),  # noqa: B023
                    lambda: memory.read_into(offset, bytearray(length)),  # noqa: B023
                    lambda: memory.write(offset, plain[offset : offset + length]),  # noqa: B023
                    lambda: memory.write_back(offset, length, False),  # noqa: B023
                ):
                    with pytest.raises(FaultError) as caught:
                        action()
                    assert caught.value.address == memory.address + max(hole, offset)
            assert memory.read(0, hole) == plain[:hole]
            rawmemory.protect(memory.address + hole, 3 << 20, READ | WRITE)

    in_child(check)


def test_no_process_can_be_started() -> None:
    def check() -> None:
        with borrowed() as memory:
            md = IOMemoryDescriptor.withAddressRange(memory.address, SIZE, INOUT, kernel_task)
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            error = error_of(lambda: md.performOperation(kIOMemoryIncoherentIOFlush, 0, SIZE))
            assert error.code == IOReturn.kIOReturnNoResources
            assert error.errno == errno.EAGAIN
            assert "RLIMIT_NPROC" in str(error)
            assert md.readBytes(0, 4) == b"\1" * 4
            md.free()

    in_child(check, uid=NOBODY)


def test_a_sandbox_without_process_vm_readv() -> None:
    def check() -> None:
        with borrowed() as memory:
            memory.write(3, b"through a child")
            assert memory.read(3, 15) == b"through a child"
            rawmemory.protect(memory.address + GOOD, SIZE - GOOD, 0)
            with pytest.raises(FaultError):
                memory.read(GOOD, 8)

    in_child(check, deny={"process_vm_readv": errno.EPERM, "process_vm_writev": errno.EPERM})


@pytest.mark.parametrize("mode", [1, 2, 4])
def test_cache_modes_of_such_memory(mode: int) -> None:
    with borrowed() as memory:
        memory.cache = mode
        data = os.urandom(SIZE - 7)
        memory.write(5, data)
        assert memory.read(5, SIZE - 7) == data
        assert memory.read(0, 5) == b"\1" * 5


# --- memory of iobmd that another process could truncate


@contextlib.contextmanager
def opened(buffer: iobmd.IOBufferMemoryDescriptor) -> Iterator[int]:
    """Return a descriptor of a buffer's memory, as a peer has."""
    shared = buffer._memory().require_backing().shared
    assert shared
    fd = os.open(f"/proc/self/fd/{shared.fd.fileno()}", os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("task", [kernel_task, None], ids=["here", "nowhere"])
def test_nobody_can_cut_a_memfd_away(task: iobmd.Task | None) -> None:
    with (
        iobmd.allocate(1 << 16, task=task, shared=True, wired=False) as buffer,
        opened(buffer) as fd,
        pytest.raises(PermissionError),
    ):
        os.ftruncate(fd, 0)


@pytest.mark.needs("collapse")
def test_nobody_can_cut_contiguous_memory_away() -> None:
    """Memory of an ordinary user is in a memfd."""

    def check() -> None:
        buffer = iobmd.allocate(2 << 20, shared=True, contiguous=True)
        with opened(buffer) as fd, pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        buffer.free()

    in_child(check, uid=NOBODY)


@pytest.mark.needs("hugetlb")
@pytest.mark.usefixtures("hugetlb_pool")
def test_nobody_can_cut_hugetlb_memory_away() -> None:
    pool = next(pool for pool in host.hugetlb_pools() if pool.size == 2 << 20)
    with contextlib.closing(PoolBlocks(pool, reserve=False)) as blocks:
        places = list(blocks.more(1, 2 << 20).values())
        with contextlib.closing(blocks.share(places, 2 << 20)) as shared, pytest.raises(PermissionError):
            os.ftruncate(shared.fd.fileno(), 0)


@pytest.mark.needs("root")
@pytest.mark.parametrize("name", ["flush", "store", "read", "read into", "write"])
@pytest.mark.parametrize("task", [kernel_task, None], ids=["here", "nowhere"])
def test_memory_in_huge_pages_that_a_peer_cuts_away(name: str, task: iobmd.Task | None) -> None:
    """A file of a tmpfs cannot be sealed."""

    def check() -> bool:
        buffer = iobmd.allocate(2 << 20, task=task, shared=True, wired=False)
        buffer.writeBytes(0, b"\1" * SIZE)
        with opened(buffer) as fd:
            try:
                os.ftruncate(fd, GOOD)
            except PermissionError:  # the object is a sealed memfd
                return False
            error = error_of(lambda: ACTIONS[name](buffer))
            assert error.code == IOReturn.kIOReturnVMError
            assert error.address is not None
            assert not task or error.address == buffer.getBytesNoCopy() + GOOD
            os.ftruncate(fd, 2 << 20)
        buffer.free()
        return True

    if not in_child(check):
        pytest.skip("shared memory in huge pages is a sealed memfd here")
