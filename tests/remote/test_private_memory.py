"""Private memory in another task: what the kernel shows of it there, and whom it is charged to."""

import errno
import sys
from collections.abc import Iterator

import pytest
from support import kernel
from support.errors import code_of
from support.targets import Target

import iobmd
from iobmd import IOReturn, Task, Wiring, procfs
from iobmd.remote.fd_passing import Channel
from iobmd.remote.mapping import RemoteMapping
from iobmd.remote.pin import RemotePin

MIB = 1 << 20
SIZE = 64 << 10
# Executes Python code from its input, and prints the result.
PROGRAM = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

def in_child(work):
    near, far = os.pipe()
    if not (pid := os.fork()):
        os.write(far, repr(work()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return eval(os.read(near, 1000))

print("ready", flush=True)
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""


@pytest.fixture
def target() -> Iterator[Target]:
    """A process that evaluates expressions."""
    with Target([sys.executable, "-c", PROGRAM]) as started:
        yield started


def ask(target: Target, expression: str) -> object:
    target.tell(expression)
    return eval(target.line())


def area(address: int, pid: int) -> procfs.VMA | None:
    return next((one for one in procfs.maps(pid) if one.start <= address < one.end), None)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("wired", [False, True], ids=["pageable", "wired"])
def test_the_memory_is_private_and_anonymous(target: Target, wired: bool) -> None:
    """Only the task maps its pages. Untouched pageable memory does not exist, nor after it is read."""
    with iobmd.allocate(MIB, task=target.pid, wired=wired) as buffer:
        address = buffer.getBytesNoCopy()
        assert not any(buffer.readBytes(0, MIB))
        found = kernel.smaps(address, target.pid)
        assert found["Rss"] == found["Anonymous"] == (MIB if wired else 0)
        buffer.writeBytes(MIB // 2, b"x" * (MIB // 2))
        found = kernel.smaps(address, target.pid)
        resident = MIB if wired else MIB // 2
        assert found["Private_Dirty"] == found["Anonymous"] == found["Rss"] == resident
        assert found["Shared_Dirty"] == found["Shared_Clean"] == 0
        assert buffer.getPageCounts() == (resident // kernel.PAGE, resident // kernel.PAGE)
        (flags,) = [flags for one, flags in procfs.vm_flags(target.pid) if one.start <= address < one.end]
        assert "sh" not in flags
        assert "lo" not in flags
        assert not [one for one in procfs.maps() if one.name in ("/dev/zero", "/memfd:iobmd (deleted)")]
        assert buffer.wiring is (Wiring.PINNED if wired else Wiring.PAGEABLE)
    assert area(address, target.pid) is None


def test_a_child_of_the_task_gets_a_copy(target: Target) -> None:
    for shared, expected in ((False, b"ours"), (True, b"kid!")):
        with iobmd.allocate(SIZE, task=target.pid, wired=False, shared=shared) as buffer:
            buffer.writeBytes(0, b"ours")
            address = buffer.getBytesNoCopy()
            work = f"in_child(lambda: (ctypes.memmove({address}, b'kid!', 4), ctypes.string_at({address}, 4))[1])"
            assert ask(target, work) == b"kid!"
            assert buffer.readBytes(0, 4) == expected


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_its_frames_are_those_of_the_task(target: Target) -> None:
    with iobmd.allocate(SIZE, task=target.pid) as buffer:
        there = kernel.frames(buffer.getBytesNoCopy(), SIZE, target.pid)
        assert all(there)
        assert list(buffer.page_addresses()) == [frame * kernel.PAGE for frame in there]
        buffer.verify()
    with iobmd.allocate(SIZE, task=target.pid, wired=False, protection="r") as buffer:
        buffer.prepare()
        assert list(buffer.page_addresses()) == [
            frame * kernel.PAGE for frame in kernel.frames(buffer.getBytesNoCopy(), SIZE, target.pid)
        ]
        assert code_of(buffer.free) == IOReturn.kIOReturnBusy
        buffer.complete()
        assert (one := area(buffer.getBytesNoCopy(), target.pid)) is not None
        assert one.perms == "r--p"


def test_a_pin_needs_no_further_stop(target: Target) -> None:
    """The process that maps the memory pins it too. A stop is several sleeps of the thread (voluntary switches)."""

    def sleeps(*, wired: bool) -> int:
        before = int(procfs.status(target.pid)["voluntary_ctxt_switches"])
        with iobmd.allocate(SIZE, task=target.pid, wired=wired) as buffer:
            after = int(procfs.status(target.pid)["voluntary_ctxt_switches"])
            assert buffer.wiring is (Wiring.PINNED if wired else Wiring.PAGEABLE)
        return after - before

    pageable, pinned = (min(sleeps(wired=wired) for _ in range(5)) for wired in (False, True))
    assert pageable >= 4, "the control"
    assert pinned < pageable * 1.5


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_a_program_is_executed_after_it_is_pinned(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is mapped and pinned again, in the new program."""
    pin = RemoteMapping._pin_by

    def execute(self: RemoteMapping, channel: Channel) -> None:
        pin(self, channel)
        target.tell("os.execv(sys.executable, sys.orig_argv)")
        assert target.line() == "ready"

    monkeypatch.setattr(RemoteMapping, "_pin_by", execute)
    with iobmd.allocate(SIZE, task=target.pid) as buffer:
        address = buffer.getBytesNoCopy()
        buffer.writeBytes(0, b"again")
        assert ask(target, f"ctypes.string_at({address}, 5)") == b"again"
        there = kernel.frames(address, SIZE, target.pid)
        assert list(buffer.page_addresses()) == [frame * kernel.PAGE for frame in there]
        buffer.verify()


@pytest.mark.usefixtures("nothing_left")
def test_what_requires_a_shared_object_is_refused(target: Target) -> None:
    with iobmd.allocate(SIZE, task=target.pid, wired=False) as buffer:
        for refused in (buffer.map, lambda: memoryview(buffer), lambda: iobmd.share(buffer)):
            with pytest.raises(iobmd.UnsupportedError, match="shared=True"):
                refused()
        with buffer.createMappingInTask(target.pid, 0, iobmd.IOMapOptions.kIOMapAnywhere) as own:
            assert own.getAddress() == buffer.getBytesNoCopy()


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_what_this_process_must_map_is_a_shared_object(target: Target) -> None:
    """It searches for physical addresses, purges, and writes cache lines back through its own mapping."""
    for keywords in (
        {"contiguous": True},
        {"physical_mask": (1 << 46) - 1},
        {"wired": False, "purgeable": True},
        {"cache": "writethru"},
        {"node": 0},
    ):
        with iobmd.allocate(SIZE, task=target.pid, **keywords) as buffer:  # type: ignore[arg-type]
            assert (one := area(buffer.getBytesNoCopy(), target.pid)) is not None
            assert one.perms == "rw-s", keywords


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("wired", [False, True], ids=["pageable", "wired"])
def test_memory_that_the_task_replaced_is_not_touched(target: Target, wired: bool) -> None:
    """The task maps other memory at the address, also a private mapping of /dev/zero, as that of the buffer is."""
    buffer = iobmd.allocate(SIZE, task=target.pid, wired=wired)
    address = buffer.getBytesNoCopy()
    half = address + SIZE // 2
    ask(
        target,
        f"libc.mmap({half}, {SIZE // 2}, 3, mmap.MAP_PRIVATE | 0x10, os.open('/dev/zero', os.O_RDWR), 0) "
        f"and ctypes.memmove({half}, b'task', 4)",
    )
    assert buffer.writeBytes(0, b"ours") == 4
    for refused in (lambda: buffer.writeBytes(SIZE // 2, b"bad"), lambda: buffer.readBytes(0, SIZE)):
        with pytest.raises(iobmd.VMError, match="unmapped or replaced") as caught:
            refused()
        assert caught.value.address == half
    buffer.free()
    assert area(address, target.pid) is None
    assert Task(target.pid).read(half, 4) == b"task"
    assert ask(target, f"libc.munmap({half}, {SIZE // 2})") == 0


def test_memory_is_not_unmapped_during_a_transfer(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that went on afterwards would change memory that the task has mapped there since."""
    write, codes = Task.write, []

    def interrupted(self: Task, address: int, data: bytes) -> int:
        codes.append(code_of(buffer.free))
        return write(self, address, data)

    with iobmd.allocate(SIZE, task=target.pid, wired=False) as buffer:
        monkeypatch.setattr(Task, "write", interrupted)
        buffer.writeBytes(0, b"whole")
        assert codes == [IOReturn.kIOReturnBusy]
        assert ask(target, f"ctypes.string_at({buffer.getBytesNoCopy()}, 5)") == b"whole"


@pytest.mark.usefixtures("nothing_left")
def test_a_pin_that_is_refused(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is then locked in the task, and unlocked there if it is left behind."""

    def refuse(_pin: RemotePin, _guest: object) -> None:
        raise OSError(errno.EPERM, "io_uring_setup")

    monkeypatch.setattr(RemotePin, "_pin", refuse)
    with iobmd.allocate(SIZE, task=target.pid) as buffer:
        address = buffer.getBytesNoCopy()
        assert buffer.wiring is Wiring.RESIDENT
        assert kernel.smaps(address, target.pid)["Locked"] == SIZE
        with pytest.raises(iobmd.NotReadyError, match="cannot pin memory of task"):
            buffer.segments()
        assert code_of(buffer.prepare) == IOReturn.kIOReturnCannotWire
        monkeypatch.undo()
        buffer.prepare()
        assert buffer.wiring is Wiring.PINNED
        buffer.complete()
        assert buffer.wiring is Wiring.RESIDENT
        assert kernel.smaps(address, target.pid)["Locked"] == SIZE
        buffer.leave()
    assert kernel.smaps(address, target.pid)["Locked"] == 0
    assert kernel.smaps(address, target.pid)["Rss"] == SIZE
    assert ask(target, f"libc.munmap({address}, {SIZE})") == 0
