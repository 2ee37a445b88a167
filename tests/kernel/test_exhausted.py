"""Exhausted descriptors, address space and locks: IOKit's codes, and nothing left behind."""

import contextlib
import errno
import gc
import mmap
import os
import resource
import signal
import threading

import pytest
from support import kernel
from support.child import in_child, sleeping

import iobmd
from iobmd import IOMemoryDescriptor, IOReturn, IOReturnError, Task, Wiring, kernel_task
from iobmd._native.crosstask import HeldBuffer
from iobmd.task import transfer
from iobmd.task.job import Outcome
from iobmd.units import PAGE_SIZE

MIB = 1 << 20


def outcome(**keywords: object) -> IOReturn | Wiring:
    try:
        with iobmd.allocate(**keywords) as buffer:  # type: ignore[arg-type]
            buffer.getPhysicalAddress()
            return buffer.wiring
    except IOReturnError as error:
        assert "hides" not in str(error) or os.geteuid()
        return error.code


WISHES = (
    {"size": PAGE_SIZE},
    {"size": 65 * MIB},
    {"size": 64 << 10, "contiguous": True},
    {"size": 4 * MIB, "contiguous": True},
    {"size": PAGE_SIZE, "physical_mask": (1 << 46) - 1},
)
WITHOUT_A_RING = {
    # Memory whose ring cannot be created is resident, and has no physical address: kIOReturnNotReady.
    "anywhere": (IOReturn.kIOReturnNotReady, IOReturn.kIOReturnNoResources, Wiring.PINNED),
    # A search needs one more descriptor, that of pagemap.
    "searched": (IOReturn.kIOReturnNoResources, IOReturn.kIOReturnNoResources, IOReturn.kIOReturnCannotWire),
}
"""The expected results with no, one and two free descriptors."""


@pytest.mark.needs("frames", "memlock")
@pytest.mark.parametrize("free", [0, 1, 2])
@pytest.mark.parametrize("first", [True, False], ids=["first of the process", "with a ring"])
@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_no_file_descriptor(free: int, first: bool, wish: dict[str, object]) -> None:
    def full() -> tuple[object, object, int]:
        gc.collect()  # garbage of earlier tests may have descriptors, which would be closed later
        if not first:
            iobmd.allocate(PAGE_SIZE).free()
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        held = []
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        for _ in range(free):
            os.close(held.pop())
        found = outcome(**wish)
        for descriptor in held:
            os.close(descriptor)
        afterwards = outcome(size=PAGE_SIZE)
        iobmd.trim()  # wired pages are kept pinned
        return found, afterwards, kernel.pinned()

    found, afterwards, pinned = in_child(full)
    expected = WITHOUT_A_RING["anywhere" if len(wish) == 1 else "searched"][free] if first else Wiring.PINNED
    assert found == expected
    assert afterwards is Wiring.PINNED
    assert pinned == 0


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("alignment", [1 << 40, 1 << 50, 1 << 62])
def test_alignment_that_no_memory_has(alignment: int) -> None:
    with iobmd.policy(memory_budget=0), pytest.raises(IOReturnError) as caught:
        iobmd.allocate(PAGE_SIZE, alignment=alignment)
    assert caught.value.code == IOReturn.kIOReturnNoResources


@pytest.mark.needs("frames")
def test_no_address_space() -> None:
    def full() -> list[object]:
        size = int(open("/proc/self/statm").read().split()[0]) * PAGE_SIZE  # noqa: SIM115, PTH123
        resource.setrlimit(resource.RLIMIT_AS, (size + MIB, size + MIB))
        return [outcome(size=8 * MIB), outcome(size=8 * MIB, contiguous=True)]

    assert in_child(full) == [IOReturn.kIOReturnNoMemory] * 2


def test_lock_that_a_thread_of_the_parent_held() -> None:
    """A pageable buffer remains usable in a child that is forked while a thread is in prepare()."""
    with iobmd.allocate(PAGE_SIZE, wired=False) as buffer:
        taken, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with buffer._memory().guard:
                taken.set()
                leave.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        taken.wait()

        def child() -> Wiring:
            signal.alarm(10)
            buffer.prepare()
            wiring = buffer.wiring
            buffer.complete()
            buffer.free()
            return wiring

        try:
            assert in_child(child) is Wiring.PINNED
        finally:
            leave.set()
            thread.join()


def test_task_that_exits_is_gone_and_not_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a task exits, after releasing its memory, it seems to run, and the kernel returns EPERM or EACCES."""
    monkeypatch.setattr(transfer, "move", lambda _job: Outcome(0, errno.EACCES))
    monkeypatch.setattr(Task, "alive", True)
    size = transfer.QUICK + 1  # smaller sizes are transferred by one native call
    with sleeping() as child:
        task = Task(child.pid)
        with pytest.raises(PermissionError):
            task.read(0, size)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessLookupError):
            task.read(0, size)


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_lack_of_descriptors_is_not_taken_for_a_lack_of_memory(where: str) -> None:
    """Existing memory was reported as missing, or not permitted, if its maps could not be opened."""

    def look() -> IOReturn:
        page = mmap.mmap(-1, mmap.PAGESIZE)
        with HeldBuffer(page, True) as held, contextlib.ExitStack() as taken:
            task = Task(os.getppid()) if where == "there" else kernel_task
            address = held.address
            with contextlib.suppress(OSError):
                while True:
                    taken.callback(os.close, os.dup(0))
            with pytest.raises(IOReturnError) as caught:
                IOMemoryDescriptor.withAddressRange(address, 100, 3, task)
            assert "ulimit -n" in str(caught.value)
            return caught.value.code

    def limited() -> IOReturn:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        return look()

    assert in_child(limited) == IOReturn.kIOReturnNoResources
