"""/proc of another pid namespace, restricted, hidden or not mounted: the results and messages of iobmd."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import mmap
import os
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from support.child import NOBODY, in_child, sleeping
from support.errors import refusal
from support.namespaces import SleepingChild, in_namespaces, mount_proc, unmount_proc

import iobmd
from iobmd import IOMemoryDescriptor, IOReturn, Task, Wiring, cli, host, kernel_task, pagemap, procfs
from iobmd._internal import pidns
from iobmd.cli import doctor as _doctor  # noqa: F401 (before a test makes the interpreter's files inaccessible)
from iobmd.host import privilege
from iobmd.pagemap.self import resident_and_dirty
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.needs("root")


def report() -> tuple[int, dict[str, Any]]:
    """Return the exit code of `iobmd doctor`, and its row on /proc."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(["doctor", "--json"])
    (fact,) = (fact for fact in json.loads(out.getvalue())["facts"] if fact["name"] == "/proc")
    return code, fact


def raw_entries(address: int, pages: int) -> list[int]:
    """Return entries that this process reads from its own pagemap."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        return list(struct.unpack(f"={pages}Q", os.pread(file.fileno(), pages * 8, address // PAGE_SIZE * 8)))


def numbers(pages: Iterator[pagemap.Page]) -> list[tuple[bool, int | None]]:
    return [(page.present, page.pfn) for page in pages]


def expected(entries: list[int]) -> list[tuple[bool, int | None]]:
    frame = (1 << 55) - 1
    return [(bool(entry >> 63), (entry & frame or None) if entry >> 63 else None) for entry in entries]


# --- /proc of another pid namespace


@pytest.fixture(params=["the init process of its namespace", "a pid that belongs to another process in /proc"])
def foreign(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Run a function in a pid namespace whose pids belong to other processes in /proc."""
    with sleeping() as hidden:
        first = hidden.pid if request.param.startswith("a pid") else None

        def run(function: Callable[[], Any], **restrict: Any) -> Any:
            def checked() -> Any:
                assert Path(f"/proc/{os.getpid()}/comm").read_text() != Path("/proc/self/comm").read_text()
                return function()

            return in_namespaces(checked, first=first, **restrict)

        yield run


def own_memory() -> None:
    """This process reads its own memory, through /proc/self, which is correct in any /proc."""
    page = mmap.mmap(-1, 4 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page[:] = b"x" * len(page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    assert numbers(pagemap.pages(kernel_task, address, len(page))) == expected(raw_entries(address, 4))
    assert numbers(pagemap.pages(os.getpid(), address, len(page))) == expected(raw_entries(address, 4))
    assert sum(span.length for span in pagemap.spans(page)) == len(page)
    assert any(area.vma.start <= address < area.vma.end for area in pagemap.areas(os.getpid()))
    assert procfs.find_vma(os.getpid(), address)
    assert procfs.start_time(os.getpid()) == procfs.start_time()
    with iobmd.allocate(1 << 20) as buffer:
        assert buffer.getPageCounts() == (256, 256)
        frames = [pfn for _present, pfn in expected(raw_entries(buffer.getBytesNoCopy(), 256))]
        assert [buffer.getPhysicalSegment(page * PAGE_SIZE)[0] // PAGE_SIZE for page in range(256)] == frames
    for shared in (False, True):
        with iobmd.allocate(4 << 20, contiguous=True, shared=shared) as buffer:
            assert buffer.layout().contiguous
    existing = IOMemoryDescriptor.withAddressRange(address, len(page), 3, kernel_task)
    existing.prepare()
    (first, *_others) = (pfn for _present, pfn in expected(raw_entries(address, 1)))
    assert existing.getPhysicalAddress() == (first or 0) * PAGE_SIZE
    existing.complete()
    assert kernel_task == Task(os.getpid())
    with iobmd.copy(kernel_task, address, len(page)) as copied:
        assert bytes(copied) == page[:]


@pytest.mark.needs("frames")
def test_own_memory(foreign: Callable[..., Any]) -> None:
    foreign(own_memory)


@pytest.mark.needs("frames")
def test_own_memory_of_a_child_and_of_a_thread(foreign: Callable[..., Any]) -> None:
    def in_child_and_thread() -> None:
        own_memory()  # cached results must not be used in a child
        in_child(own_memory)
        failures: list[BaseException] = []

        def run() -> None:
            try:
                own_memory()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]

    foreign(in_child_and_thread)


@pytest.mark.needs("frames")
def test_a_child_in_a_namespace_below(foreign: Callable[..., Any]) -> None:
    """The parent matches its /proc, and has the same pid as its child, whose /proc does not."""

    def parent() -> None:
        mount_proc()
        assert not pidns.is_foreign()
        assert in_namespaces(lambda: (own_memory(), os.getpid(), pidns.is_foreign())) == (None, 1, True)

    foreign(parent)


def test_other_tasks_are_those_of_the_callers_numbers(foreign: Callable[..., Any]) -> None:
    def reader() -> None:
        with SleepingChild(b"bytes of the child") as other:
            task = Task(other.pid)
            assert task.read(other.address, 18) == b"bytes of the child"
            assert numbers(pagemap.pages(task, other.address, PAGE_SIZE)) == expected([other.entry])
            assert next(procfs.areas(other.pid, other.address, other.address + 1)).start <= other.address
            assert procfs.status(other.pid)["NSpid"].split()[-1] == str(other.pid)
            assert procfs.start_time(other.pid) > procfs.start_time() - 1
            assert resident_and_dirty(task, other.address, PAGE_SIZE) == (1, 1)
            with iobmd.copy(other.pid, other.address, PAGE_SIZE, wired=False) as buffer:
                assert buffer.readBytes(0, 18) == b"bytes of the child"
            large = iobmd.copy(other.pid, other.large, 8 << 20, wired=False)  # also through /proc/PID/mem
            assert large.readBytes(0, 16) == b"y" * 16
            large.free()
            assert other.pid in pidns.pids()
            assert os.getpid() in pidns.pids()
            assert len(pidns.pids()) <= 4
            code, message = refusal(lambda: Task(other.pid + 1000))
            assert code == IOReturn.kIOReturnNotFound, message

    foreign(reader)


@pytest.mark.needs("frames")
def test_who_maps_a_frame(foreign: Callable[..., Any]) -> None:
    def search() -> None:
        with SleepingChild(b"x") as other:
            frame = other.entry & (1 << 55) - 1
            found = list(pagemap.users(frame * PAGE_SIZE, PAGE_SIZE))
            assert [(use.pid, use.virtual) for use in found] == [(other.pid, other.address)]

    foreign(search)


def test_a_child_whose_main_thread_has_exited(foreign: Callable[..., Any]) -> None:
    def reader() -> None:
        with SleepingChild(b"still here", without_main_thread=True) as other:
            task = Task(other.pid)
            assert task.read(other.address, 10) == b"still here"
            assert numbers(pagemap.pages(task, other.address, PAGE_SIZE)) == expected([other.entry])
            assert procfs.find_vma(other.pid, other.address)
            assert procfs.memory_id(other.pid) not in (0, other.pid)

    foreign(reader)


def test_what_needs_the_same_numbers_is_refused(foreign: Callable[..., Any]) -> None:
    """Operations that stop a task are refused, and psutil, which would read one process and signal another."""

    def refused() -> list[tuple[IOReturn, str]]:
        with SleepingChild(b"x") as other:
            calls: list[Callable[[], object]] = [
                lambda: iobmd.allocate(PAGE_SIZE, task=other.pid),
                lambda: iobmd.copy(other.pid, other.address, PAGE_SIZE, freeze=True),
                lambda: IOMemoryDescriptor.withAddressRange(other.address, PAGE_SIZE, 3, other.pid).prepare(),
                lambda: Task(other.pid).process,
                lambda: kernel_task.process,
                lambda: Task(psutil_process()),
            ]
            return [refusal(call) for call in calls]

    def psutil_process() -> psutil.Process:
        found = psutil.Process.__new__(psutil.Process)
        found._pid = os.getpid()
        return found

    for code, message in foreign(refused):
        assert code == IOReturn.kIOReturnUnsupported
        assert "another pid namespace" in message
        assert "mount -t proc proc /proc" in message


def test_without_pidfd_open_other_tasks_are_refused(foreign: Callable[..., Any]) -> None:
    """Behind a seccomp filter, it cannot be determined which process of /proc is meant."""

    def denied() -> tuple[IOReturn, str]:
        with SleepingChild(b"x") as other:
            return in_child(lambda: refusal(lambda: Task(other.pid)), deny={"pidfd_open": errno.EPERM})

    code, message = foreign(denied)
    assert code == IOReturn.kIOReturnUnsupported
    assert "pidfd_open" in message
    exit_code, fact = foreign(lambda: in_child(report, deny={"pidfd_open": errno.EPERM}))
    assert exit_code == 1
    assert fact["status"] == "no"
    assert "pidfd_open" in fact["summary"] and "pidfd_open" in fact["remedy"]


def test_doctor_reports_the_namespace(foreign: Callable[..., Any]) -> None:
    code, fact = foreign(report)
    assert code == 0
    assert fact["status"] == "limited"
    assert fact["value"] == {"mounted": True, "foreign": True}
    assert fact["remedy"].startswith("mount -t proc proc /proc")


# --- not mounted


def test_wired_memory_without_proc() -> None:
    def work() -> None:
        with iobmd.allocate(1 << 20) as buffer, iobmd.allocate(PAGE_SIZE) as small:
            assert (buffer.wiring, small.wiring) == (Wiring.PINNED, Wiring.PINNED)
            buffer.writeBytes(5, b"written")
            assert buffer.readBytes(0, 13) == b"\0" * 5 + b"written\0"
            for call in (buffer.getPhysicalAddress, buffer.layout, buffer.getPageCounts, buffer.verify):
                check_refused(call)
        with iobmd.allocate(1 << 20, shared=True) as buffer:
            assert not any(bytes(buffer))
        with iobmd.allocate(64 << 20) as large:
            assert large.wiring is Wiring.PINNED

    def check_refused(call: Callable[[], object]) -> None:
        code, message = refusal(call)
        assert code == IOReturn.kIOReturnUnsupported, message
        assert "is not mounted" in message and "mount -t proc proc /proc" in message

    in_namespaces(work, proc=unmount_proc)


def test_the_limit_is_named_without_proc() -> None:
    def work() -> tuple[IOReturn, str]:
        return refusal(lambda: iobmd.allocate(16 << 20))

    code, message = in_namespaces(work, proc=unmount_proc, uid=NOBODY, memlock=8 << 20)
    assert code == IOReturn.kIOReturnCannotWire
    assert f"RLIMIT_MEMLOCK is {8 << 20}" in message


def test_tasks_without_proc() -> None:
    def work() -> list[tuple[IOReturn, str]]:
        with SleepingChild(b"x") as other:
            unmount_proc()
            assert kernel_task.read(other.address, 1) == b"\1"
            assert hash(kernel_task) == hash(Task(os.getpid()))
            assert Task(os.getpid()).is_current
            calls: list[Callable[[], object]] = [
                lambda: Task(other.pid),
                lambda: iobmd.copy(other.pid, other.address, PAGE_SIZE),
                lambda: iobmd.allocate(PAGE_SIZE, task=other.pid),
                lambda: iobmd.allocate(4 << 20, contiguous=True),
                lambda: list(pagemap.pages(kernel_task, other.address, PAGE_SIZE)),
                lambda: list(pagemap.areas(kernel_task)),
                lambda: list(pagemap.spans(kernel_task)),
                lambda: list(pagemap.users(0, PAGE_SIZE)),
                lambda: kernel_task.process,
                lambda: IOMemoryDescriptor.withAddressRange(other.address, PAGE_SIZE, 3, kernel_task),
            ]
            nobody = refusal(lambda: Task(1 << 22))
            assert nobody[0] == IOReturn.kIOReturnNotFound, nobody
            return [refusal(call) for call in calls]

    for code, message in in_namespaces(work):
        assert code == IOReturn.kIOReturnUnsupported, message
        assert "is not mounted" in message and "mount -t proc proc /proc" in message


def test_doctor_without_proc() -> None:
    code, fact = in_namespaces(report, proc=unmount_proc)
    assert code == 1
    assert (fact["status"], fact["value"]) == ("no", {"mounted": False})
    assert fact["remedy"].startswith("mount -t proc proc /proc")


def test_capabilities_are_unknown_without_proc() -> None:
    """Root has them, and "run as root" would not help."""

    def facts() -> list[tuple[str, str]]:
        return [(fact.summary, fact.remedy) for fact in map(privilege.capability, privilege.Capability)]

    assert in_namespaces(facts, proc=unmount_proc) == [("unknown without /proc", "")] * 3


# --- hidden and restricted


@pytest.mark.parametrize("option", ["hidepid=1", "hidepid=2", "hidepid=4"])
def test_hidden_processes(option: str) -> None:
    def work() -> tuple[list[tuple[IOReturn, str]], int, dict[str, Any]]:
        assert not os.access("/proc/1/stat", os.R_OK)
        with SleepingChild(b"of the same user") as other:
            assert Task(other.pid).read(other.address, 16) == b"of the same user"
        assert refusal(lambda: Task(1 << 22))[0] == IOReturn.kIOReturnNotFound
        return [refusal(lambda: Task(1)), refusal(lambda: iobmd.copy(1, PAGE_SIZE, 1))], *report()

    refusals, code, fact = in_namespaces(work, proc=lambda: mount_proc(option), uid=NOBODY)
    for name, message in refusals:
        assert name == IOReturn.kIOReturnNotPermitted
        assert "hidepid=" in message and "mount -o remount,hidepid=0 /proc" in message and "ProtectProc" in message
    assert code == 0  # processes of the same user can be copied from
    assert fact["status"] == "limited"
    assert "hidepid=" in fact["summary"] and "remount,hidepid=0" in fact["remedy"]


def test_root_sees_what_hidepid_hides() -> None:
    def work() -> tuple[str, str]:
        return repr(Task(1)), report()[1]["status"]

    assert in_namespaces(work, proc=lambda: mount_proc("hidepid=2")) == ("<Task 1 this process>", "yes")


@pytest.mark.needs("frames")
def test_proc_of_processes_only() -> None:
    """With `ProcSubset=pid` there is no meminfo, and there are no sysctls."""

    def work() -> tuple[int, dict[str, Any]]:
        assert not Path("/proc/meminfo").exists()
        own_memory()
        with iobmd.allocate(PAGE_SIZE, physical_mask=(1 << 40) - 1) as low:
            assert low.getPhysicalAddress() < 1 << 40
        with iobmd.allocate(64 << 20) as large:
            assert large.wiring is Wiring.PINNED
        with SleepingChild(b"x") as other:
            assert Task(other.pid).read(other.address, 1) == b"x"
        return report()

    code, fact = in_namespaces(work, proc=lambda: mount_proc("subset=pid"))
    assert code == 0
    assert fact["status"] == "limited"
    assert fact["value"]["subset"] == "pid"
    assert "ProcSubset=all" in fact["remedy"]


def test_here_proc_is_as_it_should_be() -> None:
    assert not pidns.is_foreign()
    assert host.proc_options().get("subset") is None
    assert report()[1]["status"] == "yes"
    assert set(pidns.pids()) >= {1, os.getpid()}
