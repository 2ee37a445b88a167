"""`Task`: identity, and reading and writing another process, by system call and by /proc/PID/mem."""

import array
import contextlib
import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support import kernel, rawmemory
from support.child import NOBODY, in_child, started
from support.source_process import SourceProcess

import iobmd
from iobmd import IOReturn, IOReturnError, Task, current_task, get_task_map, kernel_task, pagemap, procfs
from iobmd._native import crosstask
from iobmd.pagemap.range import resolve
from iobmd.units import PAGE_SIZE

Start = Callable[..., SourceProcess]
NO_SUCH_PID = 2**22 + 5  # above the kernel's largest pid_max
BLOCKED = {"process_vm_readv": errno.EPERM, "process_vm_writev": errno.ENOSYS}


def test_this_process() -> None:
    assert current_task() is kernel_task
    assert kernel_task.pid == os.getpid()
    assert kernel_task.is_current
    assert kernel_task.alive
    assert Task(os.getpid()) == kernel_task
    assert len({Task(os.getpid()), kernel_task, get_task_map(psutil.Process())}) == 1


def test_kernel_task_follows_a_fork() -> None:
    parent = Task(os.getpid())
    assert in_child(lambda: (kernel_task.pid == os.getpid(), parent.is_current, parent.alive)) == (True, False, True)


def test_a_dead_task_stays_dead() -> None:
    child = subprocess.Popen(["sleep", "60"])
    task, process = Task(child.pid), psutil.Process(child.pid)
    assert task.alive
    assert not task.is_current
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not task.alive, "a zombie has exited"
    asked_before = Task(child.pid)
    assert asked_before.process == process
    child.wait()
    assert not task.alive
    assert asked_before.process == process
    with pytest.raises(ProcessLookupError):
        _ = task.process
    for again in (child.pid, process):
        with pytest.raises(ProcessLookupError) as caught:
            Task(again)
        assert caught.value.code == IOReturn.kIOReturnNotFound


@pytest.mark.needs("root")
def test_a_reused_pid_is_another_task(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    task, process = Task(child.pid), psutil.Process(child.pid)
    child.kill()
    child.wait()
    time.sleep(0.05)  # the kernel counts start times in hundredths of a second
    for _ in range(50):  # another process may get the pid first
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(child.pid - 1))
        second = subprocess.Popen(["sleep", "60"])
        if second.pid == child.pid:
            break
        second.kill()
        second.wait()
    try:
        assert second.pid == task.pid
        assert not task.alive
        assert Task(second.pid) != task
        with pytest.raises(ProcessLookupError):
            _ = task.process
        with pytest.raises(ProcessLookupError):
            task.read(0x400000, 1)
        with pytest.raises(ProcessLookupError):
            Task(process)
        code = next(procfs.maps(second.pid)).start
        for look in (pagemap.areas, pagemap.spans, pagemap.runs, pagemap.described):
            with pytest.raises(ProcessLookupError):
                list(look(task))
        with pytest.raises(ProcessLookupError):
            list(pagemap.spans(task, code, PAGE_SIZE))
        with pytest.raises(ProcessLookupError):
            list(resolve(task).areas())
        with pytest.raises(ProcessLookupError):
            pagemap.save(task, tmp_path / "file")
    finally:
        second.kill()
        second.wait()


@pytest.mark.parametrize("pid", [0, -1, 2**31, True, None])
def test_not_a_pid(pid: object) -> None:
    with pytest.raises(ValueError, match=r"not a process id|task is required") as caught:
        Task(pid)  # type: ignore[arg-type]
    assert caught.value.code == IOReturn.kIOReturnBadArgument


def test_no_such_pid() -> None:
    with pytest.raises(ProcessLookupError) as caught:
        Task(NO_SUCH_PID)
    assert caught.value.code == IOReturn.kIOReturnNotFound


def test_a_thread_is_no_task() -> None:
    program = "import threading,time;t=threading.Thread(target=time.sleep,args=(60,),daemon=True);t.start();"
    program += "print(t.native_id,flush=True);time.sleep(60)"
    with started([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        thread = int(child.stdout.readline())
        with pytest.raises(IOReturnError) as caught:
            Task(thread)
    assert caught.value.code in (IOReturn.kIOReturnBadArgument, IOReturn.kIOReturnNotFound)


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("deny", [{}, BLOCKED], ids=["by the call", "by /proc/PID/mem"])
@pytest.mark.usefixtures("nothing_left")
def test_read_and_write(start_source: Start, tmp_path: Path, deny: dict[str, int]) -> None:
    source = start_source(20 << 20)
    address, size = source["anonymous"]
    before = source.dump("anonymous", tmp_path / "before")
    patch = os.urandom(10_001)

    def work() -> None:
        task = Task(source.pid)
        assert task.read(address, size) == before
        assert task.read(address + 4095, 3) == before[4095:4098]
        assert task.read(address, 0) == b""
        room = array.array("d", bytes(8 * 1000))
        assert task.readinto(address + 8, room) == 8000
        assert room.tobytes() == before[8:8008]
        assert task.write(address + 777, patch) == len(patch)

    in_child(work, deny=deny)
    after = source.dump("anonymous", tmp_path / "after")
    assert after == before[:777] + patch + before[777 + len(patch) :]


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("deny", [{}, BLOCKED], ids=["by the call", "by /proc/PID/mem"])
def test_protections_hold(start_source: Start, tmp_path: Path, deny: dict[str, int]) -> None:
    """/proc/PID/mem by itself would read inaccessible memory, and overwrite a program's text."""
    source = start_source()
    read_only, no_access = source["readonly"].address, source["no-access"].address
    before = source.dump("readonly", tmp_path / "before")

    def refused(access: Callable[[], object]) -> tuple[IOReturn, int | None]:
        with pytest.raises(IOReturnError) as caught:
            access()
        return caught.value.code, caught.value.address

    def work() -> list[tuple[IOReturn, int | None]]:
        task = Task(source.pid)
        assert task.read(read_only, PAGE_SIZE) == before[:PAGE_SIZE]
        return [refused(lambda: task.read(no_access, PAGE_SIZE)), refused(lambda: task.write(read_only + 5, b"no"))]

    assert in_child(work, deny=deny) == [
        (IOReturn.kIOReturnVMError, no_access),
        (IOReturn.kIOReturnVMError, read_only + 5),
    ]
    assert source.dump("readonly", tmp_path / "after") == before


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("deny", [{}, BLOCKED], ids=["by the call", "by /proc/PID/mem"])
@pytest.mark.parametrize("size", [1 << 20, 20 << 20])
def test_scattered_holes(start_source: Start, deny: dict[str, int], size: int) -> None:
    source = start_source(size, "only-anonymous")
    address = source["anonymous"].address
    holes = [size // 16 * number for number in (3, 7, 8, 15)]
    for hole in holes:
        source.command(f"unmap anonymous {hole} {kernel.PAGE}")

    def first_bad(start: int) -> int | None:
        with pytest.raises(IOReturnError) as caught:
            Task(source.pid).read(address + start, size - start)
        assert caught.value.code == IOReturn.kIOReturnVMError
        return caught.value.address

    starts = (0, holes[0] + kernel.PAGE, holes[1] + kernel.PAGE + 1, holes[2] + kernel.PAGE)
    found = in_child(lambda: [first_bad(start) for start in starts], deny=deny)
    assert found == [address + holes[0], address + holes[1], address + holes[2], address + holes[3]]


@pytest.mark.parametrize("deny", [{}, {"ioctl": errno.ENOTTY}], ids=["scanned", "without ioctl"])
def test_absent_pages_do_not_count_as_unmapped(deny: dict[str, int]) -> None:
    """The quick read returns another errno for pages that it leaves to the slow read, and populates no page."""

    def read() -> list[tuple[int, int]]:
        device, found = Path("/proc").stat().st_dev, []
        ours = rawmemory.map_memory(kernel.PAGE)
        kinds = [(3, rawmemory.PRIVATE), (3, rawmemory.SHARED), (0, rawmemory.PRIVATE)]
        areas = [rawmemory.map_memory(kernel.PAGE, access, kind | rawmemory.ANONYMOUS) for access, kind in kinds]
        for theirs in (*areas, kernel.PAGE):
            number = crosstask.move_present(
                b"/proc/self", device, os.getpid(), -1, False, False, theirs, ours, 8, kernel.PAGE
            )
            found.append((number, sum(entry >> 63 for entry in kernel.entries(theirs, kernel.PAGE))))
        return found

    unmapped = errno.EAGAIN if deny else errno.EFAULT
    assert in_child(read, deny=deny) == [(errno.EAGAIN, 0)] * 3 + [(unmapped, 0)]


@pytest.mark.needs("root")
def test_another_users_process() -> None:
    def read() -> bytes:
        return Task(1).read(0x400000, 16)

    for deny in ({}, BLOCKED):
        with pytest.raises(PermissionError, match=rf"belongs to uid 0, this process to uid {NOBODY}") as caught:
            in_child(read, uid=NOBODY, deny=deny)
        assert caught.value.code == IOReturn.kIOReturnNotPermitted


@pytest.mark.usefixtures("nothing_left")
def test_no_pidfd_in_the_sandbox() -> None:
    child = subprocess.Popen(["sleep", "60"])

    def look() -> tuple[bool, bool]:
        task = Task(child.pid)
        before = task.alive
        child.kill()
        os.kill(child.pid, 9)
        return before, task.alive

    try:
        before, _ = in_child(look, deny={"pidfd_open": errno.ENOSYS})
        assert before
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

        def dead() -> bool:
            return Task(child.pid).alive

        assert not in_child(dead, deny={"pidfd_open": errno.ENOSYS})
    finally:
        child.wait()


@pytest.mark.usefixtures("nothing_left")
def test_tasks_release_their_descriptors() -> None:
    child = subprocess.Popen(["sleep", "60"])
    for _ in range(2000):
        Task(child.pid)
        with pytest.raises(ProcessLookupError):
            Task(NO_SUCH_PID)
    child.kill()
    child.wait()


def test_one_descriptor_too_few_for_a_write() -> None:
    """One is free for the task and one for its pagemap, but none for the child that may wait."""
    page = array.array("B", b"x")
    address, _length = page.buffer_info()

    def write() -> IOReturn:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for fd in taken[-2:]:
            os.close(fd)
        with pytest.raises(IOReturnError, match="ulimit -n") as caught:
            iobmd.Task(os.getppid()).write(address, b"x", timeout=2)
        return caught.value.code

    assert in_child(write) == IOReturn.kIOReturnNoResources


def test_descriptors_exhausted() -> None:
    def exhaust() -> IOReturn:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # open descriptors remain open
        with pytest.raises(IOReturnError, match="ulimit -n") as caught:
            iobmd.Task(os.getppid())
        return caught.value.code

    assert in_child(exhaust) == IOReturn.kIOReturnNoResources
