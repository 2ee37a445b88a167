"""`IOInterleavedMemoryDescriptor`: portions that are added one by one, cleared, and added again."""

import gc
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import kernel
from support.errors import code_of
from support.kernel import frames

import iobmd
from iobmd import IOInterleavedMemoryDescriptor, IOMapOptions, IOReturn, Wiring

PAGE = kernel.PAGE
INOUT, IN = iobmd.kIODirectionInOut, iobmd.kIODirectionIn
empty = IOInterleavedMemoryDescriptor.withCapacity


@pytest.mark.usefixtures("nothing_left")
def test_portions_are_seen_as_one() -> None:
    with iobmd.allocate(2 * PAGE, shared=True) as first, iobmd.allocate(3 * PAGE, shared=True, wired=False) as second:
        first.writeBytes(0, one := os.urandom(2 * PAGE))
        second.writeBytes(0, two := os.urandom(3 * PAGE))
        whole = empty(4, IN)
        assert (len(whole), whole.getDirection(), whole.segments()) == (0, IN, [])
        assert whole.setMemoryDescriptor(first, PAGE, PAGE)
        assert whole.setMemoryDescriptor(second, 0, 2 * PAGE)
        assert whole.setMemoryDescriptor(first, 0, PAGE)
        assert whole.setMemoryDescriptor(second, 9, 0)
        assert whole.readBytes(0, len(whole)) == one[PAGE:] + two[: 2 * PAGE] + one[:PAGE]
        whole.prepare()
        assert (whole.wiring, second.wiring) == (Wiring.PINNED,) * 2
        assert kernel.pinned(5 * PAGE) == 5 * PAGE, "each page once: that of the wired buffer, and the other buffer"
        if os.geteuid() == 0:
            actual = frames(first.getBytesNoCopy(), 2 * PAGE)
            assert whole.getPhysicalSegment(5)[0] == actual[1] * PAGE + 5
            assert whole.getPhysicalSegment(3 * PAGE)[0] == actual[0] * PAGE
        whole.complete()
        assert second.wiring is Wiring.PAGEABLE
        with whole.map(IOMapOptions.kIOMapGuardedSmall) as mapped:
            assert bytes(mapped) == one[PAGE:] + two[: 2 * PAGE] + one[:PAGE]
        whole.free()


@pytest.mark.usefixtures("nothing_left")
def test_cleared_and_filled_again() -> None:
    before = kernel.maps_of_iobmd()
    buffer = iobmd.allocate(2 * PAGE, wired=False, shared=True)
    whole = empty(2, INOUT)
    whole.setMemoryDescriptor(buffer, 0, 5)
    whole.setTag(7)
    buffer.free()
    assert kernel.maps_of_iobmd() == before + 1, "it retains the memory"
    whole.prepare()
    whole.prepare()
    assert kernel.pinned(2 * PAGE) == 2 * PAGE
    whole.clearMemoryDescriptors(IN)
    assert kernel.pinned() == 0, "it was completed"
    assert kernel.maps_of_iobmd() == before, "and the memory had no other user"
    assert (len(whole), whole.getTag(), whole.getDirection()) == (0, 0, IN)
    with iobmd.allocate(PAGE) as other:
        for _ in range(2):
            whole.setMemoryDescriptor(other, 1, 2)
        assert (len(whole), whole.getDirection()) == (4, IN)
        whole.clearMemoryDescriptors()
        assert whole.getDirection() == IN
        assert whole.initWithCapacity(1, INOUT)
        assert whole.setMemoryDescriptor(other, 0, PAGE)
        assert code_of(lambda: whole.setMemoryDescriptor(other, 0, 1)) == IOReturn.kIOReturnNoResources
        whole.free()


@pytest.mark.usefixtures("nothing_left")
def test_refused_without_a_change() -> None:
    with iobmd.allocate(2 * PAGE, shared=True, wired=False) as buffer:
        whole = empty(9, INOUT)
        whole.setMemoryDescriptor(buffer, 0, PAGE)
        for offset, length in ((0, 2 * PAGE + 1), (-1, 1), (2 * PAGE, 1), (0, -1)):
            wrong = lambda: whole.setMemoryDescriptor(buffer, offset, length)  # noqa: B023, E731
            assert code_of(wrong) == IOReturn.kIOReturnBadArgument
        add = lambda: whole.setMemoryDescriptor(buffer, PAGE, PAGE)  # noqa: E731
        with whole.map():
            assert code_of(add) == code_of(whole.clearMemoryDescriptors) == IOReturn.kIOReturnBusy
        whole.prepare()
        assert code_of(add) == IOReturn.kIOReturnBusy
        assert code_of(lambda: whole.clearMemoryDescriptors(9)) == IOReturn.kIOReturnBadArgument
        with whole.map():
            assert code_of(whole.clearMemoryDescriptors) == IOReturn.kIOReturnBusy
            assert kernel.pinned(2 * PAGE) == 2 * PAGE, "nothing was completed"
        whole.complete()
        part = iobmd.IOSubMemoryDescriptor.withSubRange(whole, 0, 9, INOUT)
        assert add()
        assert len(part) == 9
        assert len(whole) == 2 * PAGE
        prepared = iobmd.IOSubMemoryDescriptor.withSubRange(whole, 0, 9, INOUT)
        prepared.prepare()
        whole.prepare()
        assert code_of(whole.clearMemoryDescriptors) == IOReturn.kIOReturnBusy
        prepared.complete()
        prepared.free()
        whole.complete()  # it was not completed by the refused call
        whole.clearMemoryDescriptors()
        assert part.readBytes(0, 9) == bytes(9), "a dependent keeps the memory that it describes"
        part.free()
        for capacity in (0, -1):
            assert code_of(lambda: empty(capacity, INOUT)) == IOReturn.kIOReturnBadArgument  # noqa: B023
        with pytest.raises(TypeError, match="descriptor"):
            whole.setMemoryDescriptor("memory", 0, 1)  # type: ignore[arg-type]
        whole.free()
        assert code_of(lambda: whole.setMemoryDescriptor(buffer, 0, 1)) == IOReturn.kIOReturnNotOpen


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("unique", [0, IOMapOptions.kIOMapUnique])
@pytest.mark.parametrize("pages", [1, 32])
def test_a_view_keeps_it_prepared(unique: int, pages: int) -> None:
    """Its memory ends with its last portion, which a view of a map that has ended prevents."""
    size = pages * PAGE
    with empty(2, INOUT) as whole:
        with iobmd.allocate(2 * size, wired=False, shared=True) as buffer:
            whole.setMemoryDescriptor(buffer, size, size)
        whole.prepare()
        with whole.map(unique) as mapped:
            view = memoryview(mapped)
        before = whole.segments() if os.geteuid() == 0 else []
        assert code_of(whole.clearMemoryDescriptors) == IOReturn.kIOReturnBusy
        assert whole.wiring is Wiring.PINNED
        assert kernel.pinned(2 * size) == 2 * size, "all of the memory"
        assert not before or whole.segments() == before
        view[0] = 1
        assert whole.readBytes(0, 1) == b"\x01"
        view.release()
        whole.clearMemoryDescriptors()
        assert len(whole) == 0


@pytest.mark.usefixtures("nothing_left")
def test_forgotten_while_prepared() -> None:
    with iobmd.allocate(PAGE, wired=False) as buffer:
        whole = empty(1, INOUT)
        whole.setMemoryDescriptor(buffer, 0, PAGE)
        whole.prepare()
        with pytest.warns(ResourceWarning, match="never completed"):
            del whole
            gc.collect()
        assert kernel.pinned() == 0


@given(st.lists(st.tuples(st.integers(0, 2 * PAGE), st.integers(0, 2 * PAGE)), max_size=6), st.data())
def test_any_portions(portions: list[tuple[int, int]], data: st.DataObject) -> None:
    with iobmd.allocate(4 * PAGE, wired=False) as buffer:
        buffer.writeBytes(0, content := os.urandom(4 * PAGE))
        whole = empty(7, INOUT)
        for offset, length in portions:
            whole.setMemoryDescriptor(buffer, offset, length)
        model = b"".join(content[offset : offset + length] for offset, length in portions)
        start = data.draw(st.integers(0, len(model)))
        length = data.draw(st.integers(0, len(model) - start))
        assert whole.readBytes(start, length) == model[start : start + length]
        whole.free()
