"""Sub-ranges and concatenations: bytes and frames by pagemap, guard pages, pins by VmPin, and lifetimes."""

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import kernel
from support.child import in_child, sleeping
from support.errors import code_of
from support.faulting import faults
from support.kernel import frames, physical_ranges
from support.targets import need_ptrace
from support.threads import running

import iobmd
from iobmd import (
    IOBufferMemoryDescriptor,
    IOMapOptions,
    IOMultiMemoryDescriptor,
    IOReturn,
    IOReturnError,
    IOSubMemoryDescriptor,
    Wiring,
    kernel_task,
)
from iobmd.errors import BusyError
from iobmd.remote import session
from iobmd.remote.mapping import RemoteMapping

PAGE = kernel.PAGE
INOUT = iobmd.kIODirectionInOut
ANYWHERE, UNIQUE, READ_ONLY = IOMapOptions.kIOMapAnywhere, IOMapOptions.kIOMapUnique, IOMapOptions.kIOMapReadOnly
SMALL, LARGE = IOMapOptions.kIOMapGuardedSmall, IOMapOptions.kIOMapGuardedLarge
NON_VOLATILE, VOLATILE, EMPTY, KEEP = 2, 3, 4, 1
sub, multi = IOSubMemoryDescriptor.withSubRange, IOMultiMemoryDescriptor.withDescriptors


def filled(pages: int, *, shared: bool = True, wired: bool = False, **how: bool) -> IOBufferMemoryDescriptor:
    buffer = iobmd.allocate(pages * PAGE, shared=shared, wired=wired, **how)
    buffer.writeBytes(0, os.urandom(pages * PAGE))
    return buffer


# --- bytes, frames and maps


Bytes = list[tuple[IOBufferMemoryDescriptor, int, int]]
"""A part: its buffer, its offset, and its length."""


def cut(of: Bytes, offset: int, length: int) -> Bytes:
    found = []
    for buffer, start, size in of:
        low, high = max(offset, 0), min(offset + length, size)
        if low < high:
            found.append((buffer, start + low, high - low))
        offset -= size
    return found


def content(of: Bytes) -> bytes:
    return b"".join(buffer.readBytes(start, size) for buffer, start, size in of)


def places(of: Bytes) -> list[list[int]]:
    return physical_ranges((buffer.getBytesNoCopy() + start, size) for buffer, start, size in of)


@pytest.mark.needs("frames")
def test_any_nesting() -> None:
    """Trees of sub-ranges and concatenations of shared and private memory: correct bytes and addresses."""
    leaves = [filled(3), filled(2, shared=False), filled(1, wired=True)]

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        known = [(leaf, [(leaf, 0, len(leaf))]) for leaf in leaves]
        for _ in range(data.draw(st.integers(1, 6))):
            if data.draw(st.booleans()):
                of, made_of = data.draw(st.sampled_from(known))
                offset = data.draw(st.integers(0, len(of)))
                length = data.draw(st.integers(0, len(of) - offset))
                known.append((sub(of, offset, length, INOUT), cut(made_of, offset, length)))
            else:
                chosen = data.draw(st.lists(st.sampled_from(known), max_size=3))
                joined = [piece for _, made_of in chosen for piece in made_of]
                known.append((multi([one for one, _ in chosen], INOUT), joined))
        one, made_of = known[-1]
        assert len(one) == sum(size for _, _, size in made_of)
        assert one.readBytes(0, len(one)) == content(made_of)
        offset = data.draw(st.integers(0, len(one)))
        length = data.draw(st.integers(0, len(one) - offset))
        if length:
            one.writeBytes(offset + length - 1, b"\xa5")
            ((leaf, place, _),) = cut(made_of, offset + length - 1, 1)
            assert leaf.readBytes(place, 1) == b"\xa5"
            assert one.readBytes(offset, length) == content(cut(made_of, offset, length))
        one.prepare()
        assert [list(segment) for segment in one.segments(offset, length)] == places(cut(made_of, offset, length))
        one.verify()
        one.complete()

    check()
    assert kernel.pinned(PAGE) == PAGE, "the pin of the wired one"
    for leaf in leaves:
        leaf.free()


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("options", "guard"), [(UNIQUE, 0), (SMALL, PAGE), (LARGE, 64 << 10)])
def test_concatenation_is_one_range_of_addresses(options: IOMapOptions, guard: int) -> None:
    with filled(4) as first, filled(2) as second, filled(3) as third:
        inner = multi([sub(first, PAGE + 9, 3 * PAGE - 9, INOUT), second], INOUT)
        with multi([inner, sub(third, 0, PAGE + 1, INOUT)], INOUT) as whole, whole.map(options) as mapped:
            start = mapped.getAddress()
            assert start % PAGE == 9
            model = first.readBytes(PAGE + 9, 3 * PAGE - 9) + bytes(second) + third.readBytes(0, PAGE + 1)
            assert bytes(mapped) == model
            seen = frames(start, len(mapped))
            wanted = [(first, 1), (first, 2), (first, 3), (second, 0), (second, 1), (third, 0), (third, 1)]
            assert seen == [frames(of.getBytesNoCopy(), len(of))[page] for of, page in wanted]
            with memoryview(mapped) as view:
                view[4 * PAGE] ^= 0xFF
            assert second.readBytes(PAGE + 9, 1)[0] == model[4 * PAGE] ^ 0xFF
            first_byte, end = start - 9, start - 9 + 7 * PAGE
            for outside in (first_byte - 1, first_byte - guard, end, end + guard - 1) if guard else ():
                assert faults(outside)
            assert not faults(first_byte, write=True)
            assert not faults(end - 1, write=True)


@pytest.mark.usefixtures("nothing_left")
def test_sub_range_has_the_addresses_of_its_memory() -> None:
    with filled(4, shared=False) as private, sub(private, 4097, 5000, INOUT) as part:
        with part.map() as mapped, part.createMappingInTask(kernel_task, 0, ANYWHERE, 3, 7) as inside:
            assert mapped.getAddress() == private.getBytesNoCopy() + 4097
            assert inside.getAddress() == private.getBytesNoCopy() + 4100
            assert bytes(mapped) == private.readBytes(4097, 5000)
            assert bytes(inside) == private.readBytes(4100, 7)
            assert part.getDMAMapLength() == (2 * PAGE, 1)
            assert code_of(part.free) == IOReturn.kIOReturnBusy
        assert code_of(lambda: part.map(UNIQUE)) == IOReturn.kIOReturnUnsupported
        twice = multi([part, part], INOUT)
        assert twice.readBytes(4999, 2) == part.readBytes(4999, 1) + part.readBytes(0, 1)
        assert code_of(twice.map) == IOReturn.kIOReturnUnsupported
        twice.free()


@pytest.mark.usefixtures("nothing_left")
def test_sub_range_of_shared_memory_at_a_second_place() -> None:
    with (
        filled(6) as buffer,
        sub(buffer, 2 * PAGE + 5, 2 * PAGE, INOUT) as part,
        part.map(UNIQUE | READ_ONLY) as seen,
    ):
        assert seen.getAddress() % PAGE == 5
        assert bytes(seen) == buffer.readBytes(2 * PAGE + 5, 2 * PAGE)
        again = part.map(UNIQUE | READ_ONLY)
        assert again.getAddress() != seen.getAddress()
        again.unmap()
        place = iobmd._native.mapping.Mapping.reserve(16 * PAGE, PAGE)
        address = place.address
        place.close()
        fixed = part.createMappingInTask(kernel_task, address + 5, 0)
        inner = part.createMappingInTask(kernel_task, address + PAGE, 0, PAGE - 5, 9)
        assert (fixed.getAddress(), inner.getAddress()) == (address + 5, address + PAGE)
        assert bytes(inner) == buffer.readBytes(3 * PAGE, 9)
        fixed.unmap()
        inner.unmap()


@pytest.mark.usefixtures("nothing_left")
def test_redirect_to_a_concatenation() -> None:
    with filled(4) as first, filled(2) as second, filled(2) as third, first.map(UNIQUE) as mapped:
        with multi([third, second], INOUT) as whole, sub(whole, 0, 4 * PAGE - 1, INOUT) as shorter:
            mapped.redirect(whole)
            assert bytes(mapped) == bytes(third) + bytes(second)
            assert code_of(lambda: mapped.redirect(shorter)) == IOReturn.kIOReturnBadArgument
            mapped.redirect(first)
            assert bytes(mapped) == bytes(first)
        odd, part = first.createMappingInTask(kernel_task, 0, ANYWHERE | UNIQUE, 5, PAGE), sub(second, 5, PAGE, INOUT)
        odd.redirect(part)
        assert bytes(odd) == bytes(second)[5 : PAGE + 5]
        odd.redirect(first, 0, PAGE + 5)
        assert bytes(odd) == bytes(first)[PAGE + 5 : 2 * PAGE + 5]
        assert code_of(lambda: odd.redirect(second, 0, 6)) == IOReturn.kIOReturnBadArgument
        odd.unmap()


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_parts_that_meet_within_a_page_are_not_mapped() -> None:
    with filled(2) as first, filled(2) as second:
        for parts in ([sub(first, 0, 100, INOUT), second], [first, sub(second, 7, 100, INOUT)]):
            with multi(parts, INOUT) as whole:
                assert code_of(lambda: whole.map(UNIQUE)) == IOReturn.kIOReturnBadArgument
                whole.createMappingInTask(kernel_task, 0, ANYWHERE, 0, 50).unmap()
        for other in (second, sub(first, PAGE, PAGE, INOUT)):
            with multi([sub(first, 0, 100, INOUT), sub(other, 100, 100, INOUT)], INOUT) as elsewhere:
                assert code_of(lambda: elsewhere.map(UNIQUE)) == IOReturn.kIOReturnBadArgument
        pieces = [(0, 100), (100, 1), (101, PAGE - 101), (PAGE, 7), (PAGE + 7, 9)]
        with multi([*(sub(first, *piece, INOUT) for piece in pieces), sub(first, 9, 9, INOUT)], INOUT) as meeting:
            assert code_of(lambda: meeting.map(UNIQUE)) == IOReturn.kIOReturnBadArgument
            with meeting.createMappingInTask(kernel_task, 0, ANYWHERE, 50, PAGE - 40) as mapped:
                assert bytes(mapped) == first.readBytes(50, PAGE - 40), "these continue in the same pages"
                assert frames(mapped.getAddress(), len(mapped)) == frames(first.getBytesNoCopy(), 2 * PAGE)


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_concatenation_in_another_task() -> None:
    need_ptrace()
    with sleeping() as program, filled(3) as first, filled(2) as second:
        before = Path(f"/proc/{program.pid}/maps").read_text().count("\n")
        with multi([second, sub(first, PAGE, PAGE, INOUT), second], INOUT) as whole:
            with whole.createMappingInTask(program.pid, 0, ANYWHERE | SMALL | IOMapOptions.kIOMapPrefault) as there:
                task = iobmd.Task(program.pid)
                assert task.read(there.getAddress(), len(there)) == whole.readBytes(0, len(whole))
                seen = frames(there.getAddress(), len(there), program.pid)
                one, two = frames(first.getBytesNoCopy(), 3 * PAGE), frames(second.getBytesNoCopy(), 2 * PAGE)
                assert seen == [*two, one[1], *two]
                task.write(there.getAddress() + 2 * PAGE, b"theirs")
                assert first.readBytes(PAGE, 6) == b"theirs"
            assert Path(f"/proc/{program.pid}/maps").read_text().count("\n") == before


# --- prepared


@pytest.mark.usefixtures("nothing_left")
def test_prepare_is_passed_on_each_time() -> None:
    with filled(4, shared=False) as buffer, filled(1) as other:
        part = sub(buffer, 5, 10, INOUT)
        whole = multi([part, other, part], INOUT)
        whole.prepare()
        assert (buffer.wiring, other.wiring, whole.wiring) == (Wiring.PINNED,) * 3
        assert kernel.pinned(5 * PAGE) == 5 * PAGE
        part.prepare()
        whole.complete()
        assert (buffer.wiring, other.wiring) == (Wiring.PINNED, Wiring.PAGEABLE)
        assert kernel.pinned(4 * PAGE) == 4 * PAGE
        assert code_of(buffer.free) == IOReturn.kIOReturnBusy
        assert code_of(part.free) == IOReturn.kIOReturnBusy
        assert code_of(whole.complete) == IOReturn.kIOReturnNotReady
        part.complete()
        assert kernel.pinned() == 0
        whole.free()
        part.free()


def test_prepared_through_a_part_of_wired_memory() -> None:
    with filled(1, wired=True) as buffer, sub(buffer, 0, 10, INOUT) as part:
        assert part.wiring is Wiring.PINNED
        part.prepare()
        assert code_of(buffer.free) == IOReturn.kIOReturnBusy
        part.complete()


@pytest.mark.usefixtures("nothing_left")
def test_all_is_prepared_or_nothing() -> None:
    with filled(1) as good, filled(1, shared=False, purgeable=True) as bad:
        bad.setPurgeable(VOLATILE)
        with multi([good, sub(good, 0, 5, INOUT), bad], INOUT) as whole:
            assert code_of(whole.prepare) == IOReturn.kIOReturnNotReady
            assert kernel.pinned() == 0
            assert code_of(good.complete) == IOReturn.kIOReturnNotReady
            bad.setPurgeable(NON_VOLATILE)
            whole.prepare()
            low = lambda: whole.prepare(iobmd.kIODirectionPrepareNoFault | iobmd.kIODirectionPrepareToPhys32)  # noqa: E731
            if os.geteuid() == 0 and max(frames(good.getBytesNoCopy(), PAGE)) >= 1 << 20:
                assert code_of(low) == IOReturn.kIOReturnNoResources
            whole.complete()
            assert code_of(good.complete) == IOReturn.kIOReturnNotReady
            assert kernel.pinned() == 0
    with iobmd.allocate(2 * PAGE, wired=False) as untouched, sub(untouched, 0, 1, INOUT) as part:
        assert code_of(lambda: part.prepare(iobmd.kIODirectionPrepareNoFault)) == IOReturn.kIOReturnCannotWire
        assert kernel.present(untouched.getBytesNoCopy(), 2 * PAGE) == 0


# --- purgeable


@pytest.mark.usefixtures("nothing_left")
def test_purgeable_state_is_that_of_all_the_memory() -> None:
    with filled(2, shared=False, purgeable=True) as first, filled(2, purgeable=True) as second, filled(1) as other:
        whole = multi([sub(first, 0, 9, INOUT), sub(first, PAGE, 9, INOUT), second], INOUT)
        assert whole.setPurgeable(VOLATILE) == NON_VOLATILE, "although it contains the first one twice"
        assert (first.setPurgeable(KEEP), second.setPurgeable(KEEP), whole.setPurgeable(KEEP)) == (VOLATILE,) * 3
        assert whole.lazily_freed == first.lazily_freed == 2 * PAGE
        assert iobmd.purge(PAGE) > 0
        assert whole.setPurgeable(NON_VOLATILE) == EMPTY
        assert {first.setPurgeable(KEEP), second.setPurgeable(KEEP)} == {NON_VOLATILE}
        first.prepare()
        for state in (VOLATILE, EMPTY):
            assert code_of(lambda: whole.setPurgeable(state)) == IOReturn.kIOReturnBusy  # noqa: B023
        first.complete()
        second.prepare()
        second.writeBytes(0, b"here")
        for state in (VOLATILE, EMPTY):
            assert code_of(lambda: whole.setPurgeable(state)) == IOReturn.kIOReturnBusy  # noqa: B023
            assert first.setPurgeable(KEEP) == NON_VOLATILE, "it was undone"
        second.complete()
        assert second.readBytes(0, 4) == b"here"
        mixed = multi([first, other], INOUT)
        assert code_of(lambda: mixed.setPurgeable(VOLATILE)) == IOReturn.kIOReturnUnsupported
        assert first.setPurgeable(KEEP) == NON_VOLATILE
        mixed.free()
        whole.free()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("states", [*itertools.product((NON_VOLATILE, VOLATILE, EMPTY), repeat=2)])
def test_purgeable_parts_in_mixed_states(states: tuple[int, int]) -> None:
    """Empty if one part is, otherwise Volatile if one is, as in XNU; a block returns each part to its own state."""
    both = EMPTY if EMPTY in states else VOLATILE if VOLATILE in states else NON_VOLATILE
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(filled(1, shared=False, purgeable=True)) for _ in states]
        whole = stack.enter_context(multi(parts, INOUT))
        for part, state in zip(parts, states, strict=True):
            part.setPurgeable(state)
        assert whole.setPurgeable(KEEP) == both
        with whole.nonvolatile() as intact:
            assert intact is (both != EMPTY)
            assert {part.setPurgeable(KEEP) for part in parts} == {NON_VOLATILE}
        after = tuple(VOLATILE if state == VOLATILE else NON_VOLATILE for state in states)
        assert tuple(part.setPurgeable(KEEP) for part in parts) == after
        for part, state in zip(parts, states, strict=True):
            part.setPurgeable(state)
        assert whole.setPurgeable(VOLATILE) == both
        assert [part.setPurgeable(KEEP) for part in parts] == [EMPTY if s == EMPTY else VOLATILE for s in states]
        assert whole.setPurgeable(NON_VOLATILE) == (both if both == EMPTY else VOLATILE)
        assert [any(bytes(part)) for part in parts] == [state != EMPTY for state in states]


def test_page_counts() -> None:
    with filled(3, shared=False) as first, iobmd.allocate(2 * PAGE, wired=False) as second:
        part = sub(first, 0, 5, INOUT)
        assert part.getPageCounts() == (3, 3)
        assert multi([part, second, first], INOUT).getPageCounts() == (6, 6)


# --- lifetimes


@pytest.mark.usefixtures("nothing_left")
def test_children_keep_their_memory() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = filled(2, shared=False)
        data, address = bytes(buffer), buffer.getBytesNoCopy()
        part = sub(buffer, PAGE, 9, INOUT)
        whole = multi([part, buffer], INOUT)
        buffer.free()
        buffer.free()
        assert "released" in repr(buffer)
        for use in (buffer.getLength, buffer.prepare, buffer.map, buffer.getBytesNoCopy, buffer.__enter__):
            assert code_of(use) == IOReturn.kIOReturnNotOpen
        part.free()
        assert whole.readBytes(0, 9) == data[PAGE : PAGE + 9]
        del part, buffer
        gc.collect()
        whole.prepare()
        assert kernel.pinned(2 * PAGE) == 2 * PAGE
        whole.complete()
        assert whole.readBytes(9, 2 * PAGE) == data
        assert kernel.smaps(address)
        whole.free()
        iobmd.trim()
        assert not kernel.smaps(address)


@pytest.mark.usefixtures("nothing_left")
def test_memory_goes_when_the_last_child_is_collected() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = filled(2)
        address = buffer.getBytesNoCopy()
        parts = [sub(buffer, 0, 9, INOUT) for _ in range(3)]
        parts.append(sub(parts[0], 3, 3, INOUT))
        buffer.free()
        while parts:
            assert kernel.smaps(address)
            parts.pop()
            gc.collect()
        iobmd.trim()
        assert not kernel.smaps(address)


@pytest.mark.usefixtures("nothing_left")
def test_part_outlives_a_buffer_that_is_forgotten() -> None:
    """The buffer is collected with a warning; the memory and the pins of the part remain as long as the part."""
    buffer = filled(1, shared=False)
    data, address = bytes(buffer), buffer.getBytesNoCopy()
    part = sub(buffer, 5, 100, INOUT)
    part.prepare()
    buffer.prepare()
    with pytest.warns(ResourceWarning, match="never freed"):
        del buffer
    assert kernel.pinned(PAGE) == PAGE, "the part's"
    assert part.readBytes(0, 100) == data[5:105]
    part.complete()
    assert kernel.pinned() == 0, "the buffer's own pin is undone"
    assert kernel.smaps(address)
    part.free()
    iobmd.trim()
    assert not kernel.smaps(address)


def test_use_that_a_release_overtakes_is_refused() -> None:
    """A read during which another thread frees the memory raises an error, and never returns invented zeros."""
    buffer = filled(1)
    whole = multi([sub(buffer, 0, 9, INOUT), sub(buffer, 20, 9, INOUT)], INOUT)
    begun = whole._memory().require_backing()
    buffer.free()
    whole.free()
    assert code_of(lambda: begun.read(0, 18)) == IOReturn.kIOReturnNotOpen
    assert code_of(lambda: begun.write(0, bytes(18))) == IOReturn.kIOReturnNotOpen


def test_parents_know_children_weakly() -> None:
    buffer = filled(1)
    address = buffer.getBytesNoCopy()
    for _ in range(100):
        sub(buffer, 0, 1, INOUT)
    gc.collect()
    buffer.free()
    iobmd.trim()
    assert not kernel.smaps(address), "the memory had no other user"


@pytest.mark.usefixtures("nothing_left")
def test_memory_in_use_is_not_left_to_children() -> None:
    buffer = filled(2)
    part = sub(buffer, 0, 9, INOUT)
    with memoryview(buffer), pytest.raises(BufferError):
        buffer.free()
    with buffer.map(UNIQUE), pytest.raises(BufferError):
        buffer.free()
    assert buffer.readBytes(0, 9) == part.readBytes(0, 9)
    mapped = part.map()
    buffer.free()
    address = mapped.getAddress()
    assert code_of(part.free) == IOReturn.kIOReturnBusy
    assert bytes(mapped) == part.readBytes(0, 9)
    mapped.unmap()
    part.free()
    iobmd.trim()
    assert not kernel.smaps(address)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("nested", [False, True])
def test_a_refused_free_loses_no_part(*, nested: bool) -> None:
    """A copy of the last part is in progress, as in another thread: the others are neither released nor unusable."""
    first, last = filled(1), filled(1)
    data = bytes(first) + bytes(last)
    addresses = [one.getBytesNoCopy() for one in (first, last)]
    copied = last._memory().require_backing().exported()[0]
    both = multi([multi([first], INOUT), last] if nested else [first, last], INOUT)
    first.free()
    last.free()
    copied.hold()
    assert code_of(both.free) == IOReturn.kIOReturnBusy
    copied.release()
    assert all(kernel.smaps(address) for address in addresses)
    assert both.readBytes(0, 2 * PAGE) == data
    both.writeBytes(0, data[::-1])
    assert sub(both, 0, PAGE, INOUT).readBytes(0, PAGE) == data[::-1][:PAGE]
    both.free()
    assert not any(kernel.smaps(address) for address in addresses)


@pytest.mark.needs("root")
@pytest.mark.usefixtures("nothing_left")
def test_a_task_that_refuses_loses_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    need_ptrace()
    with sleeping() as program:
        there, here = iobmd.allocate(PAGE, task=program.pid, wired=False), filled(1)
        data = here.readBytes(0, PAGE)
        copied = here._memory().require_backing().exported()[0]
        both = multi([here, there, here], INOUT)
        address = there.getBytesNoCopy()
        there.free()
        here.free()
        with monkeypatch.context() as patched:
            patched.setattr(RemoteMapping, "close", refuse)
            assert code_of(both.free) == IOReturn.kIOReturnBusy
        assert both.readBytes(2 * PAGE, PAGE) == both.readBytes(0, PAGE) == data
        copied.hold()
        assert code_of(both.free) == IOReturn.kIOReturnBusy
        copied.release()
        assert kernel.smaps(address, program.pid), "unmapped there before the other part refused"
        both.free()
        assert not kernel.smaps(address, program.pid)


@pytest.mark.needs("root")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_parts_in_two_tasks_are_unmapped_in_both_or_none(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tracer holds one of the tasks, that of the first or of the second part."""
    need_ptrace()
    monkeypatch.setattr(session, "PATIENCE", 1)  # also for the task that is not held, to stop on a busy machine
    with sleeping() as one, sleeping() as other:
        parts = [iobmd.allocate(PAGE, task=program.pid, wired=False, shared=shared) for program in (one, other)]
        addresses = [part.getBytesNoCopy() for part in parts]
        both = multi(parts, INOUT)
        for part in parts:
            part.writeBytes(0, b"kept")
            part.free()
        for program in (one, other):
            with held_by_tracer(program.pid):
                assert code_of(both.free) == IOReturn.kIOReturnNotPermitted
            for start, mapped in zip(addresses, (one, other), strict=True):
                assert kernel.smaps(start, mapped.pid), "unmapped although the other task refused"
            assert both.readBytes(PAGE, 4) == both.readBytes(0, 4) == b"kept"
        both.free()
        assert not any(kernel.smaps(start, mapped.pid) for start, mapped in zip(addresses, (one, other), strict=True))


@contextlib.contextmanager
def held_by_tracer(pid: int) -> Iterator[None]:
    """Trace a process by another one, which does not stop it (ptrace(2), PTRACE_SEIZE)."""
    seize = f"assert ctypes.CDLL(None).ptrace(0x4206, {pid}, 0, 0) == 0; print(1, flush=True); sys.stdin.read()"
    program = [sys.executable, "-c", f"import ctypes, sys; {seize}"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdout
        assert tracer.stdout.readline() == b"1\n"
        yield
        assert tracer.stdin
        tracer.stdin.close()


def refuse(_mapping: RemoteMapping) -> None:
    raise BusyError("traced by another process")


def test_the_number_of_descriptors_is_not_an_argument() -> None:
    """In IOKit it precedes the direction: it would be taken for the direction, and that for `asReference`."""
    with filled(1) as first, filled(1) as second:
        with pytest.raises(TypeError, match="asReference"):
            multi([first, second], 2, INOUT)
        multi([first, second], INOUT, True).free()


def test_only_the_whole_completes_what_it_has_prepared() -> None:
    pinned = kernel.status("VmPin")
    with filled(1) as first, filled(1) as second:
        both = multi([first, second], INOUT)
        both.prepare()
        assert code_of(first.complete) == IOReturn.kIOReturnNotReady
        assert kernel.status("VmPin") == pinned + 2 * PAGE
        first.prepare()
        both.complete()
        assert kernel.status("VmPin") == pinned + PAGE
        first.complete()
        assert kernel.status("VmPin") == pinned
        both.free()


def test_forgotten_while_prepared() -> None:
    with filled(1) as buffer:
        part = sub(buffer, 0, 9, INOUT)
        part.prepare()
        part.prepare()
        with pytest.warns(ResourceWarning, match="never completed"):
            del part
        assert buffer.wiring is Wiring.PAGEABLE
        assert kernel.pinned() == 0


@pytest.mark.needs("root")
@pytest.mark.usefixtures("nothing_left")
def test_memory_in_another_task_is_kept_there() -> None:
    need_ptrace()
    with sleeping() as program:
        buffer = iobmd.allocate(PAGE, task=program.pid)
        address = buffer.getBytesNoCopy()
        part = sub(buffer, 4, 4, INOUT)
        buffer.free()
        part.writeBytes(0, b"kept")
        assert iobmd.Task(program.pid).read(address + 4, 4) == b"kept"
        part.free()
        assert not kernel.smaps(address, program.pid)


def test_freed_while_others_use_it() -> None:
    """A dependent remains usable after its parent is released."""
    for _ in range(60):
        buffer = filled(1)
        part = sub(buffer, 0, 100, INOUT)
        data, begun = part.readBytes(0, 100), threading.Event()

        def work() -> None:
            try:
                for _ in range(40):
                    assert part.readBytes(0, 100) == data  # noqa: B023
                    part.prepare()  # noqa: B023
                    part.complete()  # noqa: B023
                    begun.set()  # noqa: B023
            finally:
                begun.set()  # noqa: B023

        with running(work, work):
            begun.wait()
            while True:
                try:
                    buffer.free()
                    break
                except BufferError:  # it is prepared
                    pass
        part.free()


def test_fork() -> None:
    with filled(1) as shared, filled(1, shared=False) as private, filled(1, wired=True) as wired:
        whole = multi([sub(shared, 0, 4, INOUT), private], INOUT)

        def child() -> bytes:
            whole.writeBytes(0, b"seen....")
            whole.free()
            return shared.readBytes(0, 4)

        assert in_child(child) == b"seen"
        assert whole.readBytes(0, 4) == b"seen"
        assert whole.readBytes(4, 4) == private.readBytes(0, 4) != b"...."
        with sub(wired, 0, 4, INOUT) as part, pytest.raises(IOReturnError, match="fork"):
            in_child(lambda: part.readBytes(0, 1))
        whole.free()


# --- arguments


@pytest.mark.usefixtures("nothing_left")
def test_lengths_tags_directions() -> None:
    with filled(2) as buffer, filled(1) as other:
        buffer.setTag(7)
        part = sub(buffer, 10, 20, iobmd.kIODirectionOut)
        whole = multi([other, part], iobmd.kIODirectionIn)
        assert (part.getTag(), whole.getTag(), other.getTag()) == (7, 7, 0)
        assert (part.getDirection(), whole.getDirection()) == (iobmd.kIODirectionOut, iobmd.kIODirectionIn)
        assert (len(part), len(whole)) == (20, PAGE + 20)
        assert "IOSubMemoryDescriptor, length 20, direction out, open" in repr(part)
        buffer.setLength(15)
        assert part.readBytes(0, 5) == buffer.readBytes(10, 5)
        assert code_of(lambda: part.readBytes(0, 6)) == IOReturn.kIOReturnBadArgument
        for offset, length in ((0, 16), (-1, 1), (1, -1), (16, 0)):
            assert code_of(lambda: sub(buffer, offset, length, INOUT)) == IOReturn.kIOReturnBadArgument  # noqa: B023
        for options in (1 << 29, iobmd.kIOMemoryPageable):
            assert code_of(lambda: sub(buffer, 0, 1, options)) == IOReturn.kIOReturnBadArgument  # noqa: B023
            assert code_of(lambda: multi([buffer], options)) == IOReturn.kIOReturnBadArgument  # noqa: B023
        empty = multi([], INOUT)
        empty.prepare()
        empty.complete()
        assert (len(empty), empty.segments(), empty.getDMAMapLength()) == (0, [], (0, 0))
        for one in (part, whole, empty):
            one.free()
            assert code_of(one.getLength) == IOReturn.kIOReturnNotOpen
