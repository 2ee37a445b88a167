"""Purgeable private memory: IOKit's states, and correct reports of the pages that the kernel reclaimed."""

import ctypes
import errno
import os
import random
import signal
import threading
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, deny_calls, forked, in_child
from support.errors import code_of
from support.purging import (
    DENIALS,
    EMPTY,
    KEEP_CURRENT,
    LIFO,
    NON_VOLATILE,
    OBSOLETE,
    VOLATILE,
    discard,
    page_out,
    purgeable,
    reads_zero,
)
from support.requirements import may_lock
from support.threads import run_all, running

import iobmd
from iobmd import IOBufferMemoryDescriptor as Buffer
from iobmd import IOMultiMemoryDescriptor, IOPurgeable, IOReturn, IOReturnError, IOSubMemoryDescriptor
from iobmd._native import mman
from iobmd.errors import BusyError
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE

INOUT = iobmd.kIODirectionInOut
MIB = 1 << 20
PAGES = pytest.mark.parametrize("huge", [False, True], ids=["small", "THP"])
WAYS = pytest.mark.parametrize("deny", DENIALS.values(), ids=DENIALS)


# --- states


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_every_transition(shared: bool) -> None:
    """Change each of the three states by each of the four words: the old state, the new state, and the bytes."""
    reach = {NON_VOLATILE: [NON_VOLATILE], VOLATILE: [NON_VOLATILE, VOLATILE], EMPTY: [EMPTY]}
    for before, way in reach.items():
        for word in (KEEP_CURRENT, NON_VOLATILE, VOLATILE, EMPTY):
            buffer, data = purgeable(5 * kernel.PAGE + 7, shared=shared)
            with buffer:
                for step in way:
                    buffer.setPurgeable(step)
                assert buffer.setPurgeable(word) is before
                # Empty memory without pages has nothing that could become volatile, and remains Empty (as in XNU).
                stays = word is KEEP_CURRENT or (before is EMPTY and word is VOLATILE)
                assert buffer.setPurgeable(KEEP_CURRENT) is (before if stays else word)
                buffer.setPurgeable(NON_VOLATILE)
                lost = before is EMPTY or word is EMPTY
                assert bytes(buffer) == (bytes(len(data)) if lost else data)


def test_old_state_is_a_plain_state() -> None:
    buffer, data = purgeable(kernel.PAGE)
    with buffer:
        assert buffer.setPurgeable(VOLATILE | LIFO | IOPurgeable.kIOMemoryPurgeableVolatileGroup3) is NON_VOLATILE
        assert buffer.setPurgeable(VOLATILE) is VOLATILE
        assert buffer.setPurgeable(int(NON_VOLATILE)) is VOLATILE
        assert bytes(buffer) == data


@pytest.mark.parametrize("word", [0, 5, 15, 2 | 0x80, 3 | 0x800, 3 | 0x10, 1 << 16, -1])
def test_bad_states(word: int) -> None:
    buffer, data = purgeable(kernel.PAGE)
    with buffer:
        assert code_of(lambda: buffer.setPurgeable(word)) == IOReturn.kIOReturnBadArgument
        assert buffer.setPurgeable(KEEP_CURRENT) is NON_VOLATILE
        assert bytes(buffer) == data


def test_only_what_was_made_purgeable() -> None:
    with iobmd.allocate(PAGE_SIZE, wired=False) as pageable, iobmd.allocate(PAGE_SIZE) as wired:
        for buffer in (pageable, wired):
            assert code_of(lambda: buffer.setPurgeable(KEEP_CURRENT)) == IOReturn.kIOReturnUnsupported  # noqa: B023
            assert buffer.lazily_freed == 0
    assert code_of(lambda: iobmd.allocate(PAGE_SIZE, purgeable=True)) == IOReturn.kIOReturnBadArgument
    options = iobmd.kIOMemoryPageable | iobmd.kIOMemoryPurgeable
    with Buffer.withOptions(options, 100) as buffer:
        assert buffer.setPurgeable(KEEP_CURRENT) is NON_VOLATILE
    with pytest.raises(ValueError, match="released"):
        buffer.setPurgeable(KEEP_CURRENT)


@pytest.mark.usefixtures("nothing_left")
def test_obsolete_drops_at_once() -> None:
    buffer, _ = purgeable(4 * MIB)
    with buffer:
        assert kernel.present(buffer.getBytesNoCopy(), 4 * MIB) == 4 * MIB // kernel.PAGE
        assert buffer.setPurgeable(VOLATILE | OBSOLETE) is NON_VOLATILE
        assert kernel.present(buffer.getBytesNoCopy(), 4 * MIB) == 0
        assert buffer.setPurgeable(NON_VOLATILE) is EMPTY


def test_empty_memory_that_is_filled_again_can_be_volatile() -> None:
    buffer, _ = purgeable(4 * kernel.PAGE)
    with buffer:
        buffer.setPurgeable(EMPTY)
        buffer.writeBytes(0, b"new")
        assert buffer.setPurgeable(VOLATILE) is EMPTY
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        assert buffer.readBytes(0, 4) == b"new\0"


# --- the truth


@PAGES
@WAYS
@pytest.mark.parametrize("lost", ["none", "first", "one", "half", "last", "all"])
def test_loss_is_told(lost: str, deny: dict[str, int], huge: bool) -> None:
    size = 2 * HUGE_PAGE_SIZE + 5 * kernel.PAGE
    spans = {
        "none": (0, 0),
        "first": (0, kernel.PAGE),
        "one": (HUGE_PAGE_SIZE + 3 * kernel.PAGE, kernel.PAGE),
        "half": (0, HUGE_PAGE_SIZE),
        "last": (size - kernel.PAGE, kernel.PAGE),
        "all": (0, size),
    }

    def look() -> tuple[list[IOPurgeable], bool, int, int]:
        buffer, data = purgeable(size, huge=huge)
        with buffer:
            address = buffer.getBytesNoCopy()
            assert kernel.smaps(address)["AnonHugePages"] == (2 * HUGE_PAGE_SIZE if huge else 0)
            buffer.setPurgeable(VOLATILE)
            offset, length = spans[lost]
            if length:
                discard(buffer, offset, length)
            there = kernel.present(address, size)
            states = [buffer.setPurgeable(KEEP_CURRENT)]
            if states == [EMPTY]:
                assert reads_zero(buffer), "all or nothing"
            states += [buffer.setPurgeable(NON_VOLATILE), buffer.setPurgeable(KEEP_CURRENT)]
            for _ in range(2):
                page_out(buffer, 0, size)  # without swap, non-volatile memory cannot be reclaimed
            intact = bytes(buffer) == data
            assert intact or reads_zero(buffer)
            return states, intact, there, kernel.status("VmLck")

    states, intact, there, locked = in_child(look, deny=deny)
    assert (there < size // kernel.PAGE) == (lost != "none"), "the kernel did not reclaim the requested pages"
    expected = VOLATILE if lost == "none" else EMPTY
    assert states == [expected, expected, NON_VOLATILE]
    assert intact == (lost == "none")
    assert locked == 0


@PAGES
@WAYS
def test_readers_do_not_hide_a_loss(deny: dict[str, int], huge: bool) -> None:
    """Reading a lost page maps the zero page, which mincore reports as resident."""

    def look() -> tuple[bytes, IOPurgeable]:
        buffer, _ = purgeable(4 * MIB, huge=huge)
        with buffer, memoryview(buffer) as view:
            buffer.setPurgeable(VOLATILE)
            discard(buffer, 2 * MIB, 2 * MIB)
            seen = bytes(view[2 * MIB :])
            assert 0 not in mman.incore(buffer.getBytesNoCopy(), 1024, kernel.PAGE), (
                "reading makes all pages resident"
            )
            return seen, buffer.setPurgeable(NON_VOLATILE)

    assert in_child(look, deny=deny) == (bytes(2 * MIB), EMPTY)


@PAGES
@WAYS
def test_stores_do_not_hide_a_loss(deny: dict[str, int], huge: bool) -> None:
    """A store through a view to a lost page allocates a new page: all pages are present, but bytes are lost."""

    def look() -> IOPurgeable:
        buffer, _ = purgeable(4 * MIB, huge=huge)
        with buffer:
            with memoryview(buffer) as view:
                buffer.setPurgeable(VOLATILE)
                discard(buffer, 2 * MIB, 2 * MIB)
                view[2 * MIB :: kernel.PAGE] = b"x" * 512
            assert kernel.present(buffer.getBytesNoCopy(), 4 * MIB) == 4 * MIB // kernel.PAGE
            state = buffer.setPurgeable(NON_VOLATILE)
            assert reads_zero(buffer)
            return state

    assert in_child(look, deny=deny) is EMPTY


@WAYS
def test_writes_by_the_descriptor_while_volatile(deny: dict[str, int]) -> None:
    def look() -> list[object]:
        found: list[object] = []
        buffer, data = purgeable(64 * kernel.PAGE)
        with buffer:
            buffer.setLength(20 * kernel.PAGE)
            buffer.setPurgeable(VOLATILE)
            buffer.writeBytes(3 * kernel.PAGE - 1, b"ab")
            assert buffer.appendBytes(b"cd") == 2
            found.append(buffer.setPurgeable(KEEP_CURRENT))
            page_out(buffer, 0, 64 * kernel.PAGE)  # pages that were written to are safe, the others are reclaimed
            assert bytes(memoryview(buffer)[3 * kernel.PAGE - 1 : 3 * kernel.PAGE + 1]) == b"ab"
            found.append(buffer.setPurgeable(NON_VOLATILE))
            buffer.setLength(64 * kernel.PAGE)
            assert not any(bytes(buffer))
            buffer.writeBytes(0, data)
            buffer.setPurgeable(VOLATILE)
            buffer.writeBytes(kernel.PAGE, b"ef")
            found.append(buffer.setPurgeable(NON_VOLATILE))
            assert bytes(buffer) == data[: kernel.PAGE] + b"ef" + data[kernel.PAGE + 2 :]
            buffer.setPurgeable(VOLATILE)
            discard(buffer, 5 * kernel.PAGE, kernel.PAGE)
            buffer.writeBytes(5 * kernel.PAGE, b"new")  # to the page that was lost
            found.append(buffer.setPurgeable(NON_VOLATILE))
            assert buffer.readBytes(5 * kernel.PAGE, 4) == b"new\0"
            assert sum(map(bool, bytes(buffer))) == 3, "the rest was dropped"
        return found

    assert in_child(look, deny=deny) == [VOLATILE, EMPTY, VOLATILE, EMPTY]


@pytest.mark.usefixtures("nothing_left")
def test_volatile_again_frees_what_was_written_meanwhile() -> None:
    buffer, data = purgeable(64 * kernel.PAGE)
    with buffer:
        buffer.setPurgeable(VOLATILE)
        buffer.writeBytes(0, data[: 32 * kernel.PAGE])
        assert buffer.lazily_freed == 32 * kernel.PAGE
        assert buffer.setPurgeable(VOLATILE) is VOLATILE
        assert buffer.lazily_freed == 64 * kernel.PAGE
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        assert bytes(buffer) == data


def test_untouched_pages_are_no_loss() -> None:
    """A buffer that was never completely filled is intact if the filled part is."""
    with iobmd.allocate(64 * kernel.PAGE, wired=False, purgeable=True) as buffer:
        buffer.writeBytes(10 * kernel.PAGE, b"here")
        buffer.readBytes(30 * kernel.PAGE, 10 * kernel.PAGE)  # maps the zero page
        buffer.setPurgeable(VOLATILE)
        assert buffer.lazily_freed == kernel.PAGE
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        assert buffer.readBytes(10 * kernel.PAGE, 4) == b"here"
        buffer.setPurgeable(VOLATILE)
        discard(buffer, 10 * kernel.PAGE, kernel.PAGE)
        assert buffer.setPurgeable(NON_VOLATILE) is EMPTY


@pytest.mark.needs("swap")
@pytest.mark.usefixtures("swap")
@WAYS
def test_swapped_pages_stay_in_swap(deny: dict[str, int]) -> None:
    """MADV_FREE discards swapped pages, and is not called for them."""

    def look() -> tuple[int, int, list[IOPurgeable]]:
        buffer, data = purgeable(8 * MIB, huge=False)
        with buffer:
            address = buffer.getBytesNoCopy()
            page_out(buffer, 0, 2 * MIB)
            swapped = kernel.swapped(address, 8 * MIB)
            buffer.setPurgeable(VOLATILE)
            still = kernel.swapped(address, 8 * MIB)
            states = [buffer.setPurgeable(NON_VOLATILE)]
            assert bytes(buffer) == data
            buffer.setPurgeable(VOLATILE)
            page_out(buffer, 4 * MIB, MIB)
            assert kernel.swapped(address + 4 * MIB, MIB) < 64, "lazily freed pages are discarded, not swapped"
            states.append(buffer.setPurgeable(NON_VOLATILE))
            assert reads_zero(buffer)
            return swapped, still, states

    swapped, still, states = in_child(look, deny=deny)
    assert swapped > 400
    assert still == swapped
    assert states == [VOLATILE, EMPTY]


@pytest.mark.needs("swap")
@pytest.mark.usefixtures("swap")
@WAYS
def test_a_store_that_went_through_swap_does_not_hide_a_loss(deny: dict[str, int]) -> None:
    """A page that was lost, written to, swapped out and read back is present and clean, but has other contents."""

    def look() -> tuple[IOPurgeable, bool]:
        buffer, _ = purgeable(64 * kernel.PAGE)
        with buffer:
            buffer.setPurgeable(VOLATILE)
            discard(buffer, 0, kernel.PAGE)
            with memoryview(buffer) as view:
                view[0] = 7
                while not kernel.swapped(buffer.getBytesNoCopy(), kernel.PAGE):
                    page_out(buffer, 0, kernel.PAGE)
                assert view[0] == 7
            return buffer.setPurgeable(NON_VOLATILE), reads_zero(buffer)

    assert in_child(look, deny=deny) == (EMPTY, True)


@pytest.mark.needs("swap")
@pytest.mark.usefixtures("swap")
def test_empty_memory_that_is_filled_and_swapped_out_has_content() -> None:
    buffer, data = purgeable(64 * kernel.PAGE)
    with buffer:
        buffer.setPurgeable(EMPTY)
        buffer.writeBytes(0, data)
        while kernel.present(buffer.getBytesNoCopy(), 64 * kernel.PAGE):
            page_out(buffer, 0, 64 * kernel.PAGE)
        assert buffer.setPurgeable(VOLATILE) is EMPTY
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        assert bytes(buffer) == data


def test_windows_beside_locked_memory() -> None:
    """smaps would show a window and adjacent locked memory as one area, but must list the window separately."""

    def look() -> list[IOPurgeable]:
        kept: list[Buffer] = []
        states = []
        with iobmd.allocate(2 * MIB, wired=False) as source:
            for _ in range(4):
                kept.append(iobmd.copy(os.getpid(), source.getBytesNoCopy(), 2 * MIB))
                kept.append(purgeable(2 * MIB)[0])
        for buffer in kept[1::2]:
            buffer.setPurgeable(VOLATILE)
            states.append(buffer.setPurgeable(NON_VOLATILE))
        for buffer in kept:
            buffer.free()
        return states

    if not may_lock(64 * MIB):
        pytest.skip("may not lock this much memory")
    assert in_child(look, deny=DENIALS["no userfaultfd"]) == [VOLATILE] * 4


@pytest.mark.needs("swap")
@pytest.mark.usefixtures("swap")
def test_nothing_is_lost_after_the_move_back() -> None:
    """Non-volatile memory is swapped out and in like any other memory."""
    buffer, data = purgeable(8 * MIB, huge=False)
    with buffer:
        buffer.setPurgeable(VOLATILE)
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        for _ in range(2):  # the first reclaim only marks the pages as candidates for swapping
            page_out(buffer, 0, 8 * MIB)
        assert kernel.swapped(buffer.getBytesNoCopy(), 8 * MIB) > 1000
        assert bytes(buffer) == data


# --- counts


@PAGES
def test_page_counts_of_lazily_freed_memory(huge: bool) -> None:
    size = 4 * MIB
    buffer, _ = purgeable(size, huge=huge)
    with buffer:
        address = buffer.getBytesNoCopy()
        assert buffer.getPageCounts() == (1024, 1024)
        assert buffer.lazily_freed == 0
        buffer.setPurgeable(VOLATILE)
        assert buffer.getPageCounts() == (1024, 0)
        assert buffer.lazily_freed == size
        # The kernel counts pages that wait in a per-CPU batch shortly afterwards.
        assert size - kernel.smaps(address)["LazyFree"] < 128 * kernel.PAGE
        assert kernel.smaps(address)["Rss"] >= size, "they still count as resident"
        with memoryview(buffer) as view:
            view[0] = 1
        assert buffer.getPageCounts() in ((1024, 1), (1024, 512 if huge else 1))
        buffer.setPurgeable(NON_VOLATILE)


@pytest.mark.parametrize("deny", list(DENIALS.values())[1:], ids=list(DENIALS)[1:])
def test_page_counts_without_tracking(deny: dict[str, int]) -> None:
    def look() -> tuple[tuple[int, int], int]:
        buffer, _ = purgeable(4 * MIB, huge=False)
        with buffer:
            buffer.setPurgeable(VOLATILE)
            for _ in range(100):  # the last pages are freed lazily with a short delay, perhaps between two checks
                counts, lazily_freed = buffer.getPageCounts(), buffer.lazily_freed
                if counts[1] == 1024 - lazily_freed // kernel.PAGE:
                    break
            return counts, lazily_freed

    (resident, dirty), lazily_freed = in_child(look, deny=deny)
    assert resident == 1024
    assert dirty == 1024 - lazily_freed // kernel.PAGE < 128


# --- wiring


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_prepared_memory_is_not_volatile(shared: bool) -> None:
    buffer, data = purgeable(16 * kernel.PAGE, shared=shared)
    with buffer:
        buffer.prepare()
        buffer.prepare()
        for word in (VOLATILE, EMPTY, VOLATILE | OBSOLETE):
            assert code_of(lambda: buffer.setPurgeable(word)) == IOReturn.kIOReturnBusy  # noqa: B023
        assert buffer.setPurgeable(NON_VOLATILE) is NON_VOLATILE
        buffer.complete()
        assert code_of(lambda: buffer.setPurgeable(VOLATILE)) == IOReturn.kIOReturnBusy
        buffer.complete()
        assert buffer.setPurgeable(VOLATILE) is NON_VOLATILE
        assert code_of(buffer.prepare) == IOReturn.kIOReturnNotReady
        assert kernel.nothing_is_pinned()
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        buffer.prepare()
        buffer.complete()
        assert bytes(buffer) == data


# --- limits


@PAGES
@pytest.mark.parametrize("limit", [kernel.PAGE, 64 << 10])
@WAYS
def test_with_little_to_lock(limit: int, deny: dict[str, int], huge: bool) -> None:
    def look() -> tuple[list[IOPurgeable], int]:
        # smaps is read once per window without tracking: use fewer windows then
        few, many = (16 * kernel.PAGE, 2 * MIB) if deny else (64 * kernel.PAGE, 4 * MIB)
        size = many if limit > kernel.PAGE else few
        buffer, data = purgeable(size, huge=huge)
        with buffer:
            buffer.setPurgeable(VOLATILE)
            states = [buffer.setPurgeable(NON_VOLATILE)]
            assert bytes(buffer) == data
            buffer.setPurgeable(VOLATILE)
            discard(buffer, size - kernel.PAGE, kernel.PAGE)
            states.append(buffer.setPurgeable(NON_VOLATILE))
            assert reads_zero(buffer)
            return states, kernel.status("VmLck")

    assert in_child(look, uid=NOBODY, memlock=limit, deny=deny) == ([VOLATILE, EMPTY], 0)


def test_no_page_may_be_locked() -> None:
    """The change back is refused without changes of state and bytes, and succeeds when the limit permits it."""

    def look() -> tuple[list[IOReturn], str, IOPurgeable]:
        import resource

        buffer, data = purgeable(64 * kernel.PAGE)
        with buffer:
            buffer.setPurgeable(VOLATILE)
            codes = []
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 64 << 10))
            for action in (lambda: buffer.setPurgeable(NON_VOLATILE), lambda: buffer.writeBytes(0, b"x")):
                with pytest.raises(IOReturnError) as caught:
                    action()
                codes.append(caught.value.code)
            assert buffer.setPurgeable(KEEP_CURRENT) is VOLATILE
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
            state = buffer.setPurgeable(NON_VOLATILE)
            assert bytes(buffer) == data
            return codes, str(caught.value), state

    codes, message, state = in_child(look, uid=NOBODY, memlock=64 << 10)
    assert codes == [IOReturn.kIOReturnCannotWire] * 2
    assert "RLIMIT_MEMLOCK" in message
    assert state is VOLATILE


def test_a_refusal_midway_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If locking a later window fails, the windows before it are restored, and the rest is still volatile."""
    from iobmd._native import mman

    buffer, data = purgeable(64 * kernel.PAGE)
    real, calls = mman.restore, 0

    def restore(tracker: int, pagemap: int, start: int, end: int) -> tuple[bool, int, int]:
        nonlocal calls
        if end - start > 16 * kernel.PAGE:
            return False, mman.LOCKING, errno.ENOMEM
        calls += 1
        return (False, mman.LOCKING, errno.EPERM) if calls > 2 else real(tracker, pagemap, start, end)

    with buffer:
        buffer.setPurgeable(VOLATILE)
        with monkeypatch.context() as patch:
            patch.setattr(mman, "restore", restore)
            assert code_of(lambda: buffer.setPurgeable(NON_VOLATILE)) == IOReturn.kIOReturnCannotWire
        assert buffer.setPurgeable(KEEP_CURRENT) is VOLATILE
        assert buffer.lazily_freed == 32 * kernel.PAGE
        assert bytes(buffer) == data
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE


def test_memory_that_others_locked() -> None:
    """After mlockall, memory is unlocked when it becomes volatile: locked memory cannot be freed lazily."""

    def look() -> tuple[int, int, IOPurgeable]:
        buffer, data = purgeable(4 * kernel.PAGE)
        assert ctypes.CDLL(None).mlockall(1) == 0
        before = kernel.smaps(buffer.getBytesNoCopy())["Locked"]
        buffer.setPurgeable(VOLATILE)
        after = kernel.smaps(buffer.getBytesNoCopy())["Locked"]
        old = buffer.setPurgeable(NON_VOLATILE)
        assert bytes(buffer) == data
        buffer.free()
        return before, after, old

    if not may_lock(256 * MIB):
        pytest.skip("may not lock the whole process")
    assert in_child(look) == (4 * kernel.PAGE, 0, VOLATILE)


def test_own_pagemap_not_readable() -> None:
    """A process that is not dumpable cannot read its pagemap, and is refused before anything is freed."""

    def look() -> tuple[IOReturn, bool]:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        buffer, data = purgeable(4 * kernel.PAGE)
        code = code_of(lambda: buffer.setPurgeable(VOLATILE))
        return code, bytes(buffer) == data and buffer.setPurgeable(KEEP_CURRENT) is NON_VOLATILE

    if os.geteuid():
        pytest.skip("needs root to change to another user")
    assert in_child(look) == (IOReturn.kIOReturnNotPrivileged, True)


# --- forks


@WAYS
def test_fork_while_volatile(deny: dict[str, int]) -> None:
    """The child has its own volatile copy and reports its state correctly; the parent's copy is not affected."""

    def look() -> list[tuple[IOPurgeable, bool]]:
        found = []
        for child_first in (True, False):
            buffer, data = purgeable(64 * kernel.PAGE)
            buffer.setPurgeable(VOLATILE)

            def child(buffer: Buffer = buffer, data: bytes = data) -> tuple[IOPurgeable, bool]:
                state = buffer.setPurgeable(NON_VOLATILE)
                right = bytes(buffer) == (data if state is VOLATILE else bytes(len(data)))
                buffer.writeBytes(0, b"child")
                buffer.setPurgeable(VOLATILE)
                again = buffer.setPurgeable(NON_VOLATILE)
                right &= again is EMPTY or buffer.readBytes(0, 5) == b"child"
                return state, right

            if child_first:
                found.append(in_child(child))
            state = buffer.setPurgeable(NON_VOLATILE)
            found.append((state, bytes(buffer) == data))
            if not child_first:
                buffer.setPurgeable(VOLATILE)
                discard(buffer, 0, kernel.PAGE)
                found.append(in_child(child))
                assert buffer.setPurgeable(NON_VOLATILE) is EMPTY
            buffer.free()
        return found

    first_child, first, second, last_child = in_child(look, deny=deny)
    assert first == second == (VOLATILE, True)
    assert first_child[1]
    assert last_child == (EMPTY, True)


def test_fork_after_which_the_parent_goes_on() -> None:
    """A sleeping child shares the parent's pages; the parent's memory can be retained and lost as before."""
    buffer, data = purgeable(64 * kernel.PAGE)
    with buffer:
        leave_read, leave_write = os.pipe()
        if not (pid := os.fork()):
            os.read(leave_read, 1)
            os._exit(0)
        try:
            for lost in (False, True, False, True):
                buffer.setPurgeable(VOLATILE)
                if lost:
                    discard(buffer, 5 * kernel.PAGE, kernel.PAGE)
                gone = kernel.present(buffer.getBytesNoCopy(), 64 * kernel.PAGE) < 64
                assert buffer.setPurgeable(NON_VOLATILE) is (EMPTY if gone else VOLATILE)
                assert bytes(buffer) == (bytes(len(data)) if gone else data)
                buffer.writeBytes(0, data)
        finally:
            os.write(leave_write, b"x")
            os.waitpid(pid, 0)
            os.close(leave_read)
            os.close(leave_write)


# --- lifetime


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_freed_while_volatile(shared: bool) -> None:
    for _ in range(200):
        buffer, _ = purgeable(16 * kernel.PAGE, shared=shared)
        buffer.setPurgeable(VOLATILE)
        buffer.free()
    assert iobmd.purge() == 0


@pytest.mark.usefixtures("nothing_left")
def test_nonvolatile_context() -> None:
    buffer, data = purgeable(16 * kernel.PAGE)
    with buffer:
        buffer.setPurgeable(VOLATILE | LIFO)
        with buffer.nonvolatile() as intact:
            assert intact is True
            with buffer.nonvolatile() as inner:
                assert inner is True
            assert buffer.setPurgeable(KEEP_CURRENT) is NON_VOLATILE, "the inner one does not end the outer one"
        discard(buffer, 0, kernel.PAGE)
        with buffer.nonvolatile() as intact:
            assert intact is False
            buffer.writeBytes(0, data)
        assert buffer.setPurgeable(KEEP_CURRENT) is VOLATILE
        iobmd.purge()
        with buffer.nonvolatile() as intact:
            assert intact is False
            buffer.writeBytes(0, data)
        assert buffer.setPurgeable(KEEP_CURRENT) is VOLATILE, "although it was found Empty before"
        discard(buffer, 0, kernel.PAGE)
        with pytest.raises(KeyError), buffer.nonvolatile() as intact:
            buffer.writeBytes(0, b"half of i")
            raise KeyError
        assert buffer.setPurgeable(NON_VOLATILE) is EMPTY, "it was not filled again"
        with buffer.nonvolatile() as intact:
            assert intact is True
        assert buffer.setPurgeable(KEEP_CURRENT) is NON_VOLATILE, "as before"


def test_nonvolatile_of_threads_at_the_same_time() -> None:
    """Half-filled memory is never reported as intact, and a failure is visible to other threads that are inside."""
    buffer, data = purgeable(16 * kernel.PAGE)
    with buffer:
        buffer.setPurgeable(VOLATILE)
        iobmd.purge()
        first, second = buffer.nonvolatile(), buffer.nonvolatile()
        assert first.__enter__() is False
        buffer.writeBytes(0, data[:100])
        assert second.__enter__() is False
        first.__exit__(KeyError, KeyError(), None)
        second.__exit__(None, None, None)
        with buffer.nonvolatile() as intact:
            assert intact is False, "one of them failed"
            buffer.writeBytes(0, data)
            with buffer.nonvolatile() as other:
                assert other is False, "the thread that fills it has not left"
        with buffer.nonvolatile() as intact:
            assert intact is True
        assert bytes(buffer) == data


def test_nonvolatile_of_parts_at_the_same_time() -> None:
    """Blocks of several descriptors of the same memory: only the last one to end makes it volatile."""
    buffer, data = purgeable(16 * kernel.PAGE)
    half = len(buffer) // 2
    with (
        buffer,
        IOSubMemoryDescriptor.withSubRange(buffer, 0, half, INOUT) as front,
        IOSubMemoryDescriptor.withSubRange(buffer, half, half, INOUT) as back,
        IOMultiMemoryDescriptor.withDescriptors([back, front], INOUT) as both,
    ):
        buffer.setPurgeable(VOLATILE | LIFO)
        for first, second in ((front, back), (both, buffer), (buffer, front), (back, both)):
            one, other = first.nonvolatile(), second.nonvolatile()
            assert one.__enter__()
            assert other.__enter__()
            one.__exit__(None, None, None)
            assert iobmd.purge() == 0
            assert bytes(buffer) == data
            other.__exit__(None, None, None)
            assert buffer.setPurgeable(KEEP_CURRENT) is VOLATILE


def refuse() -> int:
    raise BusyError("another process is changing the state")


def test_nonvolatile_of_a_part_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has changed then: the other parts are volatile again, also while the exception exists."""
    first, second = (purgeable(kernel.PAGE)[0] for _ in range(2))
    with first, second, IOMultiMemoryDescriptor.withDescriptors([first, second], INOUT) as both:
        both.setPurgeable(VOLATILE)
        memory = second._memory().require_purge_control().memory
        with monkeypatch.context() as patch, pytest.raises(BusyError) as caught:
            patch.setattr(memory, "make_nonvolatile", refuse)
            with both.nonvolatile():
                pass
        assert first.setPurgeable(KEEP_CURRENT) is second.setPurgeable(KEEP_CURRENT) is VOLATILE
        del caught


def test_nonvolatile_of_memory_that_never_was_volatile() -> None:
    buffer, _ = purgeable(kernel.PAGE)
    with buffer:
        buffer.setPurgeable(EMPTY)
        with buffer.nonvolatile() as intact:
            assert intact is False
        assert buffer.setPurgeable(KEEP_CURRENT) is NON_VOLATILE


def test_threads_see_one_order() -> None:
    """The old states that concurrent threads receive correspond to some sequential order."""
    buffer, _ = purgeable(16 * kernel.PAGE)
    seen: list[tuple[IOPurgeable, IOPurgeable]] = []
    start = threading.Barrier(4)

    def flip(seed: int) -> None:
        chance = random.Random(seed)
        start.wait()
        for _ in range(500):
            word = chance.choice((VOLATILE, NON_VOLATILE, EMPTY))
            seen.append((word, buffer.setPurgeable(word)))

    run_all(*(partial(flip, seed) for seed in range(4)))
    last = buffer.setPurgeable(KEEP_CURRENT)
    buffer.free()
    # A state is left as often as it is entered, except for the first and the last. Empty memory without pages remains
    # Empty if it is set to volatile; non-volatile memory without pages becomes volatile.
    entered = Counter(EMPTY if word is VOLATILE and old is EMPTY else word for word, old in seen) + Counter(
        [NON_VOLATILE]
    )
    left = Counter(old for _word, old in seen) + Counter([last])
    assert entered == left


# --- errors


def test_what_is_locked_is_not_half_dropped() -> None:
    """A purge that the kernel refuses changes nothing, and other memory is still purged."""

    def look() -> tuple[IOReturn, bool, int, IOPurgeable]:
        locked, data = purgeable(4 * kernel.PAGE)
        other, _ = purgeable(4 * kernel.PAGE)
        locked.setPurgeable(VOLATILE)
        other.setPurgeable(VOLATILE)
        mman.lock_on_fault(locked.getBytesNoCopy(), 4 * kernel.PAGE)  # mlock would write to the pages
        code = code_of(lambda: locked.setPurgeable(EMPTY))
        freed = iobmd.purge()
        mman.unlock(locked.getBytesNoCopy(), 4 * kernel.PAGE)
        state = locked.setPurgeable(NON_VOLATILE)
        return code, bytes(locked) == data, freed, state

    with pytest.MonkeyPatch.context() as patch:
        # as before Linux 5.18
        patch.setattr(mman, "MADV_DONTNEED_LOCKED", 12345)
        found = in_child(look)
    assert found == (IOReturn.kIOReturnUnsupported, True, 4 * kernel.PAGE, VOLATILE)


def test_what_is_locked_can_be_dropped_since_5_18() -> None:
    buffer, _ = purgeable(4 * kernel.PAGE)
    with buffer:
        mman.lock(buffer.getBytesNoCopy(), 4 * kernel.PAGE)
        assert buffer.setPurgeable(EMPTY) is NON_VOLATILE
        assert reads_zero(buffer)
        mman.unlock(buffer.getBytesNoCopy(), 4 * kernel.PAGE)


def test_populate_that_fails_loses_nothing() -> None:
    """If memory is exhausted in the last step, as after a fork, the state and the bytes are unchanged."""

    def look() -> tuple[IOReturn, IOPurgeable, bool]:
        buffer, data = purgeable(64 * kernel.PAGE)
        buffer.setPurgeable(VOLATILE)
        deny_calls({"madvise": errno.ENOMEM})
        code = code_of(lambda: buffer.setPurgeable(NON_VOLATILE))
        state = buffer.setPurgeable(KEEP_CURRENT)
        return code, state, bytes(buffer) == data

    assert in_child(look) == (IOReturn.kIOReturnNoMemory, VOLATILE, True)


@pytest.mark.needs("root")
@WAYS
def test_compaction_is_no_loss(deny: dict[str, int]) -> None:
    """A migrating page is neither present nor lost."""
    compact = Path("/proc/sys/vm/compact_memory")

    def look() -> Counter[str]:
        outcomes: Counter[str] = Counter()
        # Forked first: pages that a child shares are dirty, which smaps does not distinguish from written to.
        with forked(lambda: (compact.write_text("1"), time.sleep(0.1 if deny else 0))):
            buffer, data = purgeable(16 * MIB, huge=False)
            scattered = [purgeable(kernel.PAGE)[0] for _ in range(100)]
            del scattered[::2]
            buffer.setPurgeable(VOLATILE)
            end = time.monotonic() + 0.4
            while time.monotonic() < end:
                outcomes[buffer.setPurgeable(KEEP_CURRENT).name or ""] += 1
            state = buffer.setPurgeable(NON_VOLATILE)
            assert bytes(buffer) == (data if state is VOLATILE else bytes(len(data)))
            buffer.free()
        return outcomes

    warnings.simplefilter("ignore", ResourceWarning)
    outcomes = in_child(look, deny=deny)
    if not deny:  # without tracking, a migrating page, which MADV_FREE skips, stays dirty and counts as lost
        assert set(outcomes) == {VOLATILE.name}


# --- purge on request


@pytest.mark.usefixtures("nothing_left")
def test_purge_frees_memory_and_says_how_much() -> None:
    buffers = [purgeable(MIB)[0] for _ in range(8)]
    for buffer in buffers[:6]:
        buffer.setPurgeable(VOLATILE)
    discard(buffers[0], 0, MIB // 2)
    before = kernel.status("VmRSS")
    freed = iobmd.purge()
    assert freed == 5 * MIB + MIB // 2, "pages that the kernel had already reclaimed do not count"
    assert abs(before - kernel.status("VmRSS") - freed) < MIB // 2
    assert [buffer.setPurgeable(NON_VOLATILE) for buffer in buffers] == [EMPTY] * 6 + [NON_VOLATILE] * 2
    assert iobmd.purge() == 0
    assert code_of(lambda: iobmd.purge(-1)) == IOReturn.kIOReturnBadArgument
    for buffer in buffers:
        buffer.free()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_purge_order(shared: bool) -> None:
    """Obsolete memory, then groups 0 to 7; within a group FIFO, oldest first, then LIFO, most recent first."""
    group = {n: IOPurgeable(n << 8) for n in range(8)}
    plan = [
        (VOLATILE | group[7], 7),
        (VOLATILE | group[1] | LIFO, 5),
        (VOLATILE | group[1], 2),
        (VOLATILE | group[1] | LIFO, 4),
        (VOLATILE | group[1], 3),
        (VOLATILE, 1),
        (VOLATILE | group[2], 6),
    ]
    if shared:
        plan.append((VOLATILE | group[7] | OBSOLETE, 0))
    buffers = {}
    for word, place in plan:
        buffers[place], _ = purgeable(16 * kernel.PAGE, shared=shared)
        buffers[place].setPurgeable(word)
    for place in sorted(buffers):
        assert iobmd.purge(1) == 16 * kernel.PAGE
        empty = [one for one, buffer in sorted(buffers.items()) if buffer.setPurgeable(KEEP_CURRENT) is EMPTY]
        assert empty[-1] == place
        assert len(empty) == place + (1 if shared else 0)
    for buffer in buffers.values():
        buffer.free()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_purge_while_others_free_and_fill(shared: bool) -> None:
    """The purger skips a descriptor that is freed concurrently, and never accesses a closed one."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            buffer, data = purgeable(16 * kernel.PAGE, shared=shared)
            buffer.setPurgeable(VOLATILE)
            time.sleep(0)
            if buffer.setPurgeable(NON_VOLATILE) is VOLATILE:
                assert bytes(buffer) == data
            else:
                assert reads_zero(buffer)
            buffer.setPurgeable(VOLATILE)
            time.sleep(0)
            buffer.free()

    with running(churn, churn, churn):
        freed, begin = 0, time.monotonic()
        while time.monotonic() < begin + 0.5 or (not freed and time.monotonic() < begin + 20):
            freed += iobmd.purge()
        stop.set()
    assert freed > 0


def test_a_signal_handler_cannot_purge_what_it_interrupted() -> None:
    """It purges other memory, and skips memory that this thread is changing: "Volatile" remains correct."""

    def loop(shared: bool) -> tuple[int, int]:
        buffer, data = purgeable(16 * kernel.PAGE, shared=shared)
        taken = refused = 0

        def purge(*_arguments: object) -> None:
            nonlocal taken, refused
            taken += iobmd.purge() > 0
            try:
                buffer.setPurgeable(EMPTY)
                buffer.setPurgeable(VOLATILE)
            except IOReturnError as error:
                assert error.code == IOReturn.kIOReturnBusy
                refused += 1

        signal.signal(signal.SIGALRM, purge)
        begin, turn = time.monotonic(), 0
        while time.monotonic() < begin + 0.4 or (not (taken and refused) and time.monotonic() < begin + 20):
            turn += 1  # at a different moment each time, because a periodic timer would synchronize with the loop
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + turn % 199 * 1e-6)
            buffer.setPurgeable(VOLATILE)
            state = buffer.setPurgeable(NON_VOLATILE)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            seen = bytes(buffer)
            # the handler may have run after the change, and purged the memory, which is then reported
            if state is VOLATILE and buffer.setPurgeable(KEEP_CURRENT) is NON_VOLATILE:
                assert seen == data
            buffer.setPurgeable(NON_VOLATILE)
            buffer.writeBytes(0, data)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.setitimer(signal.ITIMER_REAL, 0)
        return taken, refused

    for shared in (False, True):
        taken, refused = in_child(lambda shared=shared: loop(shared))  # type: ignore[misc]
        assert taken > 0
        assert refused > 0


def test_huge_pages_that_stay_huge() -> None:
    """A round trip does not split huge pages."""
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("transparent huge pages are off")
    if not may_lock(8 * MIB):
        pytest.skip("windows smaller than a huge page split it")
    buffer, data = purgeable(8 * MIB)
    with buffer:
        address = buffer.getBytesNoCopy()
        assert kernel.smaps(address)["AnonHugePages"] == 8 * MIB
        for _ in range(3):
            buffer.setPurgeable(VOLATILE)
            assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        assert kernel.smaps(address)["AnonHugePages"] == 8 * MIB
        assert bytes(buffer) == data
