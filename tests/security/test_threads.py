"""The native layer in several threads: memory that is freed during its use, and tables that all threads read.

Runs for a few seconds in the suite; `make test-tsan` runs it under the thread sanitizer, for `SECONDS`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import struct
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import requirements
from support.fuzzing import SECONDS
from support.kernel import Footprint
from support.lazy import Source
from support.threads import run_all

import iobmd
from iobmd import IOReturnError
from iobmd._native import crosstask, mapping, maps, pagemap, uring
from iobmd.memory import shmem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE, MIB = mmap.PAGESIZE, 1 << 20
THREADS = 4


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def all_at_once(*works: Callable[[], object], seconds: float = 0.25) -> None:
    """Run each of several functions repeatedly in threads for a time; the first error is raised here."""
    begin = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def repeat(work: Callable[[], object]) -> None:
        begin.wait()
        end = time.monotonic() + (SECONDS / 13 or seconds)
        try:
            while not errors:
                work()
                if time.monotonic() > end:
                    break
        except BaseException as error:
            errors.append(error)

    before = Footprint.settled()
    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    after = Footprint.settled()
    assert after.descriptors <= before.descriptors
    assert after.locked <= before.locked
    if not requirements.missing("own_footprint"):
        assert after.mappings - before.mappings < 40


def shared_object(size: int) -> int:
    fd = os.memfd_create("threads", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


IN_CHILDREN = pytest.mark.needs("children_in_memory")


@pytest.mark.parametrize("kind", ["private", "shared", pytest.param("revocable", marks=IN_CHILDREN)])
def test_unmapped_beside_its_use(kind: str) -> None:
    """`close` is refused during a copy or while a view exists; a use after it is refused; no byte is misplaced."""
    size = 4 * MIB
    fd = shared_object(size)
    if kind == "shared":
        shmem.seal(fd)

    def mapped() -> mapping.Mapping:
        if kind == "private":
            return mapping.Mapping.anonymous(size, PAGE)
        return mapping.Mapping.view([(fd, 0, size)], 0, True, 0, PAGE)

    current = [mapped()]

    def use(number: int) -> None:
        one = current[0]
        place = random.randrange(0, MIB - 8)
        length = random.choice([8, 5000, 300_000])  # with and without the GIL
        start = number * MIB + min(place, MIB - length)
        with contextlib.suppress(ValueError):  # it is closed
            one.write(start, bytes([number]) * length)
            assert set(one.read(start, length)) <= {0, number}  # 0: of the mapping after it

    def replace() -> None:
        old, current[0] = current[0], mapped()
        while True:
            with contextlib.suppress(BufferError):
                old.close()
                break
        assert old.users == 0

    try:
        all_at_once(*(partial(use, number) for number in range(1, THREADS)), replace)
    finally:
        current[0].close()
        os.close(fd)


def test_redirected_beside_its_use() -> None:
    """One mapping is redirected between two objects, and closed concurrently."""
    fds = [shared_object(MIB), shared_object(MIB)]
    for number, fd in enumerate(fds, 1):
        os.pwrite(fd, bytes([number]) * MIB, 0)
    current = [mapping.Mapping.view([(fds[0], 0, MIB)], 0, True, 0, PAGE)]

    def redirect() -> None:
        with contextlib.suppress(ValueError):
            half = MIB // 2
            current[0].redirect([(fd, offset, half) for fd in random.sample(fds, 1) for offset in (0, half)])

    def read() -> None:
        with contextlib.suppress(ValueError):
            assert set(current[0].read(random.randrange(MIB // 2), MIB // 2)) <= {1, 2}
            assert current[0].lost() in (None, current[0].address)

    def replace() -> None:
        old, current[0] = current[0], mapping.Mapping.view([(fds[0], 0, MIB)], 0, True, 0, PAGE)
        while True:
            with contextlib.suppress(BufferError):
                old.close()
                break

    try:
        all_at_once(redirect, read, read, replace)
    finally:
        current[0].close()
        for fd in fds:
            os.close(fd)


def test_tables_of_the_kernel() -> None:
    """Walks, runs and frames of one open file, by separate objects in each thread, and one table that all read."""
    memory = mmap.mmap(-1, 4 * MIB)
    memory[::PAGE] = b"x" * (4 * MIB // PAGE)
    opened = os.open("/proc/self/pagemap", os.O_RDONLY)
    text = Path("/proc/self/maps").read_bytes()
    own = maps.parse(text)
    start = max((area[1] - area[0], area[0]) for area in own if area[2].startswith("rw"))[1]
    end = start + 4 * MIB
    table = pagemap.read_runs(opened, start, end - start, PAGE)

    def walks() -> None:
        walker = pagemap.Walk(opened, PAGE, 2 * MIB, 0, 0, False, True)
        tally = walker.total(start, end)
        assert tally.present <= end - start
        with contextlib.suppress(OSError):  # no PAGEMAP_SCAN
            found = pagemap.scan(opened, start, end, pagemap.PAGE_IS_PRESENT, 0)
            assert all(start <= first < last <= end for first, last in found)

    def reads() -> None:
        found = pagemap.read_runs(opened, start, end - start, PAGE)
        table.common(found)
        table.difference(found)
        table.holds(opened, PAGE)
        pagemap.describe(opened, -1, -1, start // PAGE, 512)

    def parses() -> None:
        assert maps.parse(text) == own

    try:
        all_at_once(walks, walks, reads, reads, parses)
    finally:
        os.close(opened)
        memory.close()


def test_locks() -> None:
    """One thread at a time is inside, and a reentry by the same thread is reported."""
    lock = mapping.Guard()
    inside = [0]

    def enter() -> None:
        with lock:
            inside[0] += 1
            assert inside[0] == 1
            with pytest.raises(RuntimeError):
                lock.enter()
            inside[0] -= 1
        if lock.enter_if_free():
            assert lock.mine
            lock.leave()

    all_at_once(*[enter] * THREADS)


def test_actions_that_wait_for_a_lock() -> None:
    """Each is called once, from inside; none is left once no thread is inside."""
    lock = mapping.Guard()
    deferred = itertools.count()
    called: list[bool] = []

    def enter() -> None:
        with lock:
            begun = len(called)
            lock.when_free(partial(act, next(deferred)))
            assert len(called) == begun
        lock.when_free(partial(act, next(deferred)))

    def act(_number: int) -> None:
        called.append(lock.mine)

    all_at_once(*[enter] * THREADS)
    assert called == [True] * next(deferred)


def test_an_action_that_fails_concerns_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exception is reported, and the thread that is inside continues."""
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reported.append(report.exc_type))
    called: list[int] = []
    lock = mapping.Guard()
    with lock:
        lock.when_free(partial(called.append, 1))
        lock.when_free(lambda: 1 // 0)
        lock.when_free(partial(called.append, 2))
    lock.when_free(lambda: 1 // 0)
    assert reported == [ZeroDivisionError] * 2
    assert sorted(called) == [1, 2]
    assert lock.enter_if_free()
    lock.leave()


def test_pins() -> None:
    """Slots of one table are each used by a single thread at a time."""
    try:
        table = uring.Table(8)
    except OSError as error:
        pytest.skip(f"no io_uring with a sparse table: {error}")
    memory = mapping.Mapping.anonymous(64 * PAGE, PAGE)

    def pin(number: int) -> None:
        with contextlib.suppress(MemoryError, OSError):  # RLIMIT_MEMLOCK
            slot = table.pin(memory.address + number * 16 * PAGE, 16 * PAGE)
            if slot is not None and random.random() < 0.9:
                slot.release()
                slot.release()

    try:
        all_at_once(*(partial(pin, number) for number in range(THREADS)))
    finally:
        table.close()
        memory.close()


def test_transfers_of_shared_pages() -> None:
    """The zero page of the kernel is one: a small read opens the memory file, in each thread at once."""
    size = 4 * MIB
    memory = mapping.Mapping.anonymous(size, PAGE)
    for page in range(0, size, PAGE):
        memory.read(page, 1)
    room = [bytearray(b"x" * size) for _ in range(THREADS)]

    def read(number: int) -> None:
        start = random.randrange(0, size // 2, PAGE)
        assert iobmd.kernel_task.read(memory.address + start, PAGE + 1) == bytes(PAGE + 1)
        room[number][:] = b"x" * size
        iobmd.kernel_task.readinto(memory.address, room[number])
        assert not room[number].strip(b"\0")

    try:
        all_at_once(*(partial(read, number) for number in range(THREADS)))
    finally:
        memory.close()


@pytest.mark.needs("memlock")
def test_slabs() -> None:
    """Small wired buffers of one page belong to several threads, which others free or trim: no byte is misplaced."""

    def use(number: int) -> None:
        buffers = [iobmd.allocate(random.choice([1, 64, 256, 2048])) for _ in range(20)]
        for index, buffer in enumerate(buffers):
            assert not any(buffer.readBytes(0, len(buffer)))
            buffer.writeBytes(0, bytes([number * 50 + index]) * len(buffer))
        for index, buffer in enumerate(buffers):
            assert buffer.readBytes(0, len(buffer)) == bytes([number * 50 + index]) * len(buffer)
            buffer.free()

    all_at_once(*(partial(use, number) for number in range(1, THREADS)), iobmd.trim)


def test_census(tmp_path: Path) -> None:
    """One file of page flags, counted by a separate object in each thread."""
    words = random.Random(1).choices([0, 1 << 10, 1 << 5 | 1 << 12, 1 << 17, 1 << 26], k=100_000)
    path = tmp_path / "kpageflags"
    path.write_bytes(struct.pack(f"={len(words)}Q", *words))
    opened = os.open(path, os.O_RDONLY)

    def count() -> tuple[object, ...]:
        census = pagemap.Census(opened, 512, 64, PAGE)
        census.begin(0, 0)
        census.read(len(words))
        census.finish()
        return census.collect()

    expected = count()

    def check() -> None:
        assert count() == expected

    try:
        all_at_once(*[check] * THREADS)
    finally:
        os.close(opened)


@pytest.mark.needs("lazy_copies")
def test_lazy_copies() -> None:
    """Threads touch, read and await pages that the native thread fetches, and free the copy at any moment."""
    size = 16 * MIB
    with Source(size) as source:

        def use() -> None:
            copy = source.copied()
            address, contents = copy.getBytesNoCopy(), source.contents

            def touch() -> None:
                for offset in random.sample(range(0, size, PAGE), 50):
                    assert ctypes.string_at(address + offset, 8) == contents[offset : offset + 8]

            def read() -> None:
                offset = random.randrange(size - MIB)
                assert copy.readBytes(offset, MIB) == contents[offset : offset + MIB]
                assert 0 <= copy.fetched <= size

            run_all(touch, touch, read, read, copy.fetch if random.random() < 0.5 else touch)
            copy.free()

        all_at_once(use)


@IN_CHILDREN
def test_transfers() -> None:
    """Transfers between parts of this process, by the kernel and by children that share its memory."""
    memory = mapping.Mapping.anonymous(8 * MIB, PAGE)
    address = memory.address

    def transfer(number: int) -> None:
        theirs, ours = address + 2 * number * MIB, address + (2 * number + 1) * MIB
        crosstask.copy_here(theirs, address, 0)
        memory.write(2 * number * MIB, bytes([number]) * MIB)
        half = MIB // 2
        attempt = crosstask.Attempt([(theirs, half)], task=os.getpid(), room=half)
        for start in (0, half):
            if start:
                attempt.again([(theirs + start, half // 2), (theirs + start + half // 2, half // 2)])
            attempt.start()
            while not attempt.wait(1000):
                pass
            assert attempt.error == 0
            assert attempt.moved == half
            crosstask.copy_here(ours + start, attempt.address, half)
        with pytest.raises(ValueError, match="room"):
            attempt.again([(theirs, half + 1)])
        attempt.end()
        assert memory.read((2 * number + 1) * MIB, MIB) == bytes([number]) * MIB

    try:
        all_at_once(*(partial(transfer, number) for number in range(THREADS)))
    finally:
        memory.close()


@IN_CHILDREN
def test_buffers() -> None:
    """Buffers are freed, resized, viewed, mapped and copied concurrently: only IOReturnError is raised."""
    current = [iobmd.allocate(MIB, wired=False, shared=True)]

    def use() -> None:
        buffer = current[0]
        with contextlib.suppress(IOReturnError, ValueError, BufferError):
            buffer.writeBytes(random.randrange(MIB), b"x")
            assert len(buffer.readBytes(0, 100_000)) == 100_000
            with buffer.map() as mapped, memoryview(mapped) as view:
                assert len(view) in (MIB // 2, MIB)
            buffer.setLength(random.choice([MIB, MIB // 2]))
            buffer.prepare()
            buffer.complete()

    def copy() -> None:
        with contextlib.suppress(IOReturnError):
            address = current[0].getBytesNoCopy()
            with iobmd.copy(iobmd.kernel_task, address, MIB, wired=False) as copied:
                assert len(copied) == MIB

    def replace() -> None:
        old, current[0] = current[0], iobmd.allocate(MIB, wired=False, shared=True)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(IOReturnError):
                old.free()
                return
        raise AssertionError("it remains busy")

    try:
        all_at_once(use, use, copy, replace)
    finally:
        current[0].free()
