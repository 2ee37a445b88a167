"""`iobmd.pagemap` on running programs: their own and shared memory, and changes and exits during the read."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support import page_states
from support.page_states import PAGE, PageStateProcess, quiet

from iobmd import IOReturn, IOReturnError, pagemap

pytestmark = pytest.mark.needs("root", "frames", "compiler")

IDLE = {
    "sleep": ["120"], "cat": [], "bash": ["-c", "read line"], "sh": ["-c", "read line"], "sqlite3": [":memory:"],
    "tail": ["-f", "/dev/null"], "perl": ["-e", "my $text = 'x' x 30000000; <STDIN>"], "awk": ["{ print }"],
    "sed": ["p"], "sort": [], "bc": ["-q"], "gdb": ["-q", "-nx"], "tee": [], "wc": [], "grep": ["x"],
    "timeout": ["120", "sleep", "120"], "od": [], "head": ["-n", "1000"], "cut": ["-c", "1"], "tr": ["a", "b"],
    "uniq": [], "xargs": ["echo"],
}  # fmt: skip
"""Programs that wait for their input, and their arguments; the installed ones are started."""
PYTHON = "import json, sqlite3, decimal; memory = [bytes(1000) for _ in range(50000)]; input()"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_states.build(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def programs() -> Iterator[list[int]]:
    """At least twenty sleeping programs."""
    commands = [[path, *arguments] for name, arguments in IDLE.items() if (path := shutil.which(name))]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in [*commands, [sys.executable, "-c", PYTHON]]
    ]
    for one in started:
        wait(one.pid, is_asleep)
    yield [one.pid for one in started]
    for one in started:
        one.kill()
        one.communicate()


def wait(pid: int, until: Callable[[int], bool]) -> None:
    end = time.monotonic() + 60
    while not until(pid):
        assert time.monotonic() < end, Path(f"/proc/{pid}/stat").read_text()
        time.sleep(0.02)


def is_asleep(pid: int) -> bool:
    """Return whether a process sleeps, and uses no processor time for a short interval."""

    def look() -> tuple[str, list[str]]:
        # A process may choose any name.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return state, fields[10:12] + fields[6:8]  # its processor times and page faults

    before = look()
    time.sleep(0.02)
    return before[0] == "S" and look() == before


def rollup(pid: int) -> dict[str, int]:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {name: int(number) << 10 for name, number in re.findall(r"(\w+):\s+(\d+) kB", text)}
    found["Rss"] += found["Shared_Hugetlb"] + found["Private_Hugetlb"]
    return {name: found[name] for name in ("Rss", "Swap", "LazyFree")}


def compare(pid: int, details: bool, patience: float = 20) -> None:
    theirs, ours = quiet(lambda: rollup(pid), lambda: list(pagemap.areas(pid, details=details)), patience)
    resident = sum(area.resident for area in ours)
    assert abs(resident - theirs["Rss"]) <= theirs["Rss"] // 100, (pid, resident, theirs)
    assert sum(area.swapped or 0 for area in ours) == theirs["Swap"], (pid, theirs)
    assert not details or None not in {area.swapped for area in ours}


@pytest.mark.parametrize("details", [True, False])
def test_programs_hold_what_the_kernel_adds_up(programs: list[int], details: bool) -> None:
    for pid in programs:
        compare(pid, details)
    seen = len(programs)
    for entry in Path("/proc").glob("[1-9]*"):  # programs that already run on this host
        pid = int(entry.name)
        if pid == os.getpid() or seen >= 40:
            continue
        # A program that exits, wakes up or allocates concurrently proves nothing; those started above must agree.
        with contextlib.suppress(OSError, IOReturnError, AssertionError):
            if is_asleep(pid) and rollup(pid)["Rss"]:
                compare(pid, details, patience=0)
                seen += 1
    assert seen >= 20


@pytest.fixture
def family(program: Path) -> Iterator[PageStateProcess]:
    """Three processes: the target and two children. One has the shared memory at another address."""
    with PageStateProcess(program, "forked", "zero") as target:
        yield target


def frame(target: PageStateProcess, kind: str, page: int) -> int:
    address = target[kind][0] + page * PAGE
    return page_states.entries(target.pid, [(address, address + PAGE)])[address] & (1 << 55) - 1


def users(physical: int, length: int = PAGE, pids: Container[int] | None = None) -> set[tuple[int, int, int, int]]:
    """Return the users of frames; of pages that all processes map only `pids`, because others start and exit."""
    found = [use for use in pagemap.users(physical, length) if pids is None or use.pid in pids]
    assert all(use.area.start <= use.virtual and use.virtual + use.length <= use.area.end for use in found)
    assert all(use.process == Path(f"/proc/{use.pid}/status").read_text().split()[1] for use in found)
    unique = {(use.pid, use.virtual, use.physical, use.length) for use in found}
    assert len(unique) == len(found)
    return unique


def users_of(
    target: PageStateProcess, kind: str, page: int, length: int = PAGE
) -> tuple[int, set[tuple[int, int, int, int]]]:
    """Return the physical address of a page, and the users of its memory; the kernel may move it at any time."""

    def physical() -> int:
        return frame(target, kind, page) * PAGE

    return quiet(physical, lambda: users(physical(), length))


def test_users_of_shared_memory_are_all_found(family: PageStateProcess) -> None:
    physical, found = users_of(family, "shared", 5)
    (child, child_pid), (moved, moved_pid) = family["child"], family["moved-child"]
    theirs = {(family.pid, family["shared"][0]), (child_pid, child), (moved_pid, moved)}
    assert family["shared"][0] == child != moved
    assert found == {(pid, address + 5 * PAGE, physical, PAGE) for pid, address in theirs}


def test_users_of_memory_that_fork_shares(family: PageStateProcess) -> None:
    pids = (family.pid, family["child"][1], family["moved-child"][1])
    physical, found = users_of(family, "forked", 100)
    assert found == {(pid, family["forked"][0] + 100 * PAGE, physical, PAGE) for pid in pids}
    # In the first half of a huge page, which one child still maps by small pages, and in the second, which no child
    # maps.
    for page, mappers in ((100, pids[:2]), (400, pids[:1])):
        physical, found = users_of(family, "half-shared", page, 3 * PAGE)
        address = family["half-shared"][0] + page * PAGE
        assert found == {(pid, address, physical, 3 * PAGE) for pid in mappers}


def test_private_memory_has_one_user(family: PageStateProcess) -> None:
    """One child maps other memory at this address."""
    physical, found = users_of(family, "own", 2)
    assert family["own"][0] == family["moved-child"][0]
    assert found == {(family.pid, family["own"][0] + 2 * PAGE, physical, PAGE)}


def test_the_zero_page_has_no_neighbours(family: PageStateProcess) -> None:
    """One frame is mapped at many consecutive addresses, which are not contiguous in physical memory."""
    pids = (family.pid, family["child"][1], family["moved-child"][1])
    zero = frame(family, "zero", 1)
    assert family.pid in {pid for pid, *_ in users(zero * PAGE, pids=pids)}
    assert not users((zero + 1) * PAGE, pids=pids)


def spans(pid: int) -> Iterator[object]:
    return pagemap.spans(pid)


def detailed(pid: int) -> Iterator[object]:
    return pagemap.areas(pid, details=True)


def bare(pid: int) -> Iterator[object]:
    return pagemap.areas(pid, details=False, folios=True)


READERS: list[Callable[[int], Iterator[object]]] = [spans, detailed, bare, pagemap.runs, pagemap.described]


@pytest.mark.parametrize("read", READERS)
def test_reading_while_the_target_maps_and_unmaps(program: Path, read: Callable[[int], Iterator[object]]) -> None:
    with PageStateProcess(program, "thp", "anonymous", "tiny") as target:
        target.command("flap")
        refused = 0
        end = time.monotonic() + 0.4
        for _read in range(200):
            try:
                assert sum(1 for _found in read(target.pid))
                pagemap.counts(target.pid, *target["thp"])
            except IOReturnError:
                refused += 1
            if time.monotonic() > end:
                break
        assert not refused, "it is alive, but access is refused"
        assert target.process.poll() is None, "the target did not survive"


@pytest.mark.parametrize("kind", ["anonymous", "sparse"])
def test_a_target_that_exits_in_between_is_not_found(program: Path, kind: str) -> None:
    """The unread rest no longer exists: ending without an error would report it as empty."""
    with PageStateProcess(program, kind, "tiny") as target:
        address, size = target[kind]
        readers = [
            *(partial(read, target.pid) for read in READERS),
            partial(pagemap.spans, target.pid, address, size),
            partial(pagemap.runs, target.pid, address, size),
            partial(pagemap.pages, target.pid, address, min(size, 64 << 20)),
        ]
        whole = [total(read()) for read in readers]
        begun = [read() for read in readers]
        found = [total([next(reader)]) for reader in begun]  # in the middle of a large area
        target.process.kill()
        target.process.wait()
        refused = 0
        for index, reader in enumerate(begun):
            try:
                assert found[index] + total(reader) == whole[index], readers[index]
            except IOReturnError as error:
                assert error.code == IOReturn.kIOReturnNotFound, readers[index]
                refused += 1
        assert refused >= len(begun) - 1, "a reader may have read several runs before it yields the first"
        for read in READERS:
            with pytest.raises(IOReturnError) as caught:
                list(read(target.pid))
            assert caught.value.code == IOReturn.kIOReturnNotFound


@pytest.mark.parametrize("kind", ["anonymous", "sparse"])
def test_a_target_that_becomes_another_program(program: Path, kind: str) -> None:
    """The pages of both programs must not be mixed: the result is an error, or the memory of the first program."""
    with PageStateProcess(program, kind) as target:
        address, size = target[kind]
        theirs = page_states.entries(target.pid, [(address, address + size)])
        begun = pagemap.spans(target.pid, address, size)
        found = [next(begun)]
        target.tell("exec")
        wait(target.pid, lambda pid: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
        with contextlib.suppress(IOReturnError):
            found += list(begun)
            assert sum(span.length for span in found) == len(theirs) * PAGE, "truncated without an error"


@pytest.mark.parametrize("read", READERS)
def test_what_is_read_while_the_target_dies_is_whole_or_refused(
    program: Path, read: Callable[[int], Iterator[object]]
) -> None:
    for attempt in range(6):
        with PageStateProcess(program, "anonymous") as target:
            whole = total(read(target.pid))
            killer = threading.Timer(0.003 * attempt, os.kill, (target.pid, signal.SIGKILL))
            killer.start()
            end = time.monotonic() + 60
            try:
                while time.monotonic() < end:
                    gone = target.process.poll() is not None
                    assert total(read(target.pid)) >= whole, "truncated without an error"  # it may touch more
                    assert not gone, "it had exited, but was read"
            except IOReturnError as error:
                assert error.code == IOReturn.kIOReturnNotFound, error
            else:
                pytest.fail("it did not exit, or was read for a minute")
            finally:
                killer.join()


def total(found: Iterable[object]) -> int:
    """Add up the memory of all that a reader yields."""
    size = 0
    for one in found:
        if isinstance(one, pagemap.Area):
            size += one.tally.present
        elif isinstance(one, pagemap.Page):
            size += one.present * PAGE
        elif isinstance(one, pagemap.DescribedRun):
            size += one.run.length
        elif isinstance(one, pagemap.Run) or (isinstance(one, pagemap.Span) and one.present):
            size += one.length
    return size
