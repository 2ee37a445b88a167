"""Memory that cannot be read or pinned, in this process or another: the code, the first byte, and the reason."""

import contextlib
import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import areas, kernel, rawmemory
from support.areas import Area
from support.child import NOBODY, in_child, started
from support.errors import error_of
from support.targets import need_ptrace

import iobmd
from iobmd import IOMemoryDescriptor, IOReturn, Task, Wiring, kernel_task

PAGE = kernel.PAGE
OUT, INOUT = 2, 3
VM_ERROR, UNSUPPORTED = IOReturn.kIOReturnVMError, IOReturn.kIOReturnUnsupported
CANNOT_WIRE, NO_RESOURCES = IOReturn.kIOReturnCannotWire, IOReturn.kIOReturnNoResources

PINNED = {  # kind: the code of prepare(), and a pattern of its message
    "past the end of a private file": (VM_ERROR, "past the end of its file, of 4106 bytes"),
    "past the end of a shared file": (VM_ERROR, "past the end of its file, of 4106 bytes"),
    "past the end of a memfd": (VM_ERROR, "past the end of its file, of 4106 bytes"),
    "guard": (VM_ERROR, "guard page"),
    "read-only": (CANNOT_WIRE, "is not writable.*withCopy"),
    "shared file": (CANNOT_WIRE, "shared mapping of a file.*withCopy"),
    "secret": (UNSUPPORTED, "memfd_secret"),
    "device": (UNSUPPORTED, "mapping of a device"),
    "hugetlb": (NO_RESOURCES, r"pool of 2 MiB pages.*free 0.*nr_hugepages"),
}
READABLE = ("read-only", "shared file", "hugetlb")  # absent hugetlb pages read as zeros
READ = {kind: why for kind, (_code, why) in PINNED.items() if kind not in READABLE}
WITHOUT_REMEDY = ("past the end of a memfd", "guard", "secret", "device")


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prepare the host for a kind of area, or skip."""

    def prepare(kind: str) -> None:
        if kind == "hugetlb":
            if not Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists():
                pytest.skip("no hugetlb pages of 2 MiB")
            free = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
            if free:
                pytest.skip(f"{free} free pages in the pool, which belong to others")
        if kind == "shared file":
            found = subprocess.run(["stat", "-f", "-c", "%T", areas.DISK], capture_output=True, text=True, check=True)
            if found.stdout.strip() in ("tmpfs", "ramfs"):
                pytest.skip(f"{areas.DISK} is kept in memory")
        if kind in ("guard", "secret"):
            with_probe(kind)

    return prepare


def with_probe(kind: str) -> None:
    def check() -> None:
        areas.KINDS[kind]()

    try:
        in_child(check)
    except OSError as error:
        # The only kinds that depend on the kernel: 6.13, and 5.14 if secretmem is enabled.
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        pytest.skip(f"this kernel has no {kind} memory: {error}")


def present(pid: int | str, area: Area) -> bytes:
    """Return which pages of an area are present, according to its task's pagemap."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        raw = os.pread(pagemap.fileno(), area.size // PAGE * 8, area.address // PAGE * 8)
    return bytes(entry >> 7 for entry in raw[7::8])


@contextlib.contextmanager
def area_of_another_process(kind: str) -> Iterator[tuple[int, Area]]:
    """An area in a separate process, and the pid of that process."""
    environment = os.environ | {"PYTHONPATH": str(Path(areas.__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-m", "support.areas", kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as program:
        try:
            assert program.stdout
            yield program.pid, Area(*map(int, program.stdout.readline().split()))
            assert program.poll() is None, "the process continues to run"
        finally:
            program.kill()


@pytest.mark.parametrize("kind", PINNED)
def test_prepare(kind: str, make: Callable[[str], None]) -> None:
    make(kind)
    code, why = PINNED[kind]

    def check() -> None:
        area = areas.KINDS[kind]()
        with IOMemoryDescriptor.withAddressRange(area.address, area.size, OUT, kernel_task) as md:
            error = error_of(md.prepare)
            assert (error.code, error.address) == (code, area.address + area.bad), error
            assert md.wiring is Wiring.PAGEABLE
            assert kernel.status("VmPin") == 0
        assert re.search(why, str(error)), error
        assert "RLIMIT_MEMLOCK" not in str(error)
        assert kind not in WITHOUT_REMEDY or "withCopy" not in str(error)

    in_child(check)


@pytest.mark.parametrize("kind", PINNED)
def test_prepare_in_another_task(kind: str, make: Callable[[str], None]) -> None:
    need_ptrace()
    make(kind)
    code, why = PINNED[kind]
    with area_of_another_process(kind) as (pid, area):
        md = IOMemoryDescriptor.withAddressRange(area.address, area.size, OUT, pid)
        if kind in ("read-only", "shared file"):  # not pinned but locked, and completely resident
            md.prepare()
            assert md.wiring is Wiring.RESIDENT
            assert set(present(pid, area)) == {1}
            assert kernel.status("VmLck", pid) >= area.size
            md.complete()
        else:
            error = error_of(md.prepare)
            assert (error.code, error.address) == (code, area.address + area.bad), error
            assert re.search(why, str(error)), error
            assert "RLIMIT_MEMLOCK" not in str(error)
            assert md.wiring is Wiring.PAGEABLE
        end = time.monotonic() + 5
        while kernel.status("VmPin", pid) and time.monotonic() < end:
            time.sleep(0.005)
        assert not kernel.status("VmPin", pid)
        assert kernel.status("VmLck", pid) == (area.size if kind == "secret" else 0)
        md.free()


@pytest.mark.parametrize("there", [False, True], ids=["here", "there"])
@pytest.mark.parametrize("kind", READ)
def test_read(kind: str, there: bool, make: Callable[[str], None]) -> None:
    make(kind)

    def check(pid: int, area: Area) -> None:
        error = error_of(lambda: Task(pid).read(area.address, area.size))
        assert (error.code, error.address) == (VM_ERROR, area.address + area.bad)
        assert re.search(READ[kind], str(error)), error
        error = error_of(lambda: Task(pid).read(area.address + area.bad + 5, 3))
        assert error.address == area.address + area.bad + 5

    if there:
        with area_of_another_process(kind) as (pid, area):
            check(pid, area)
    else:
        in_child(lambda: check(os.getpid(), areas.KINDS[kind]()))


@pytest.mark.parametrize("kind", ["read-only", "hugetlb"])
def test_write(kind: str, make: Callable[[str], None]) -> None:
    make(kind)
    with area_of_another_process(kind) as (pid, area):
        error = error_of(lambda: Task(pid).write(area.address + area.bad, b"bytes"))
        assert (error.code, error.address) == (VM_ERROR, area.address + area.bad)
        assert re.search("without write permission" if kind == "read-only" else PINNED[kind][1], str(error)), error


def test_a_file_is_found_without_privilege() -> None:
    """The file is found by its name or a descriptor, because map_files requires CAP_CHECKPOINT_RESTORE."""

    def check() -> None:
        fd = os.memfd_create("gone")
        os.ftruncate(fd, 2 * PAGE)
        address = rawmemory.map_memory(2 * PAGE, flags=rawmemory.SHARED, fd=fd)
        os.ftruncate(fd, PAGE)
        error = error_of(lambda: kernel_task.read(address, 2 * PAGE))
        assert f"past the end of its file, of {PAGE} bytes" in str(error)
        assert error.address == address + PAGE
        os.close(fd)
        error = error_of(lambda: kernel_task.read(address, 2 * PAGE))
        assert error.address == address + PAGE
        assert "could not fault it in" in str(error), "the cause can no longer be determined"

    in_child(check, uid=NOBODY)


def test_a_range_that_begins_in_a_page() -> None:
    def check() -> None:
        area = areas.KINDS["read-only"]()
        md = IOMemoryDescriptor.withAddressRange(area.address + PAGE + 7, 20, OUT, kernel_task)
        assert error_of(md.prepare).address == area.address + PAGE + 7

    in_child(check)


def test_what_cannot_be_reached_comes_before_what_cannot_be_pinned() -> None:
    def check() -> None:
        area = areas.KINDS["past the end of a shared file"]()
        rawmemory.protect(area.address, PAGE, rawmemory.READ)
        md = IOMemoryDescriptor.withAddressRange(area.address, area.size, OUT, kernel_task)
        assert error_of(md.prepare).address == area.address + 2 * PAGE

    in_child(check)


def test_the_explanation_is_that_of_the_moment_it_is_asked_for() -> None:
    def check() -> None:
        address = rawmemory.map_memory(PAGE)
        rawmemory.unmap(address, PAGE)
        first, second = (error_of(lambda: kernel_task.read(address, 8)) for _ in range(2))
        assert "no memory is mapped there" in str(first)
        assert rawmemory.map_memory(PAGE, at=address) == address
        assert "no memory is mapped there" in str(first), "the message was already composed"
        assert "could not fault it in at that time" in str(second)
        assert hex(address) in str(second)

    in_child(check)


def test_the_explanation_of_a_task_that_is_gone() -> None:
    with started(["sleep", "100"]) as program:
        task = Task(program.pid)
        error = error_of(lambda: task.read(PAGE, 8))
        program.kill()
    assert error.code == VM_ERROR
    assert "it has exited since" in str(error)


def test_a_failure_does_not_pay_for_its_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    found = iobmd.task.obstacles.find
    monkeypatch.setattr(iobmd.task.obstacles, "find", lambda *args, **how: (asked.append(1), found(*args, **how))[1])
    error = error_of(lambda: kernel_task.read(PAGE, 8))
    assert (error.code, error.errno, error.address) == (VM_ERROR, errno.EFAULT, PAGE)
    assert not asked
    assert "no memory is mapped there" in str(error)
    assert "no memory is mapped there" in repr(error)
    assert len(asked) == 1
