"""Views and arrays own the memory: it is freed with the last of them, and errors at the end hide no other error."""

import contextlib
import ctypes
import gc
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from support import kernel
from support.memory_mark import MARK, is_there, mark

import iobmd
from iobmd.units import PAGE_SIZE

SIZE = 256 << 10


def locked() -> int:
    return kernel.status("VmLck")


KINDS: dict[str, Callable[[], iobmd.IOBufferMemoryDescriptor]] = {
    "wired": lambda: iobmd.allocate(SIZE),
    "pageable": lambda: iobmd.allocate(SIZE, wired=False),
    "purgeable": lambda: iobmd.allocate(SIZE, wired=False, purgeable=True),
    "shared": lambda: iobmd.allocate(SIZE, shared=True),
    "guarded": lambda: iobmd.IOBufferMemoryDescriptor.inTaskWithGuardPages(iobmd.kernel_task, 3, SIZE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_goes_with_the_last_view(kind: str) -> None:
    locked_before = locked()
    with KINDS[kind]() as buffer:
        address = mark(buffer)
        first, second = memoryview(buffer), memoryview(buffer)
        first[5] = 7
        locked_inside = locked()
    assert repr(buffer) == "<IOBufferMemoryDescriptor released>"
    with pytest.raises(iobmd.NotOpenError):
        buffer.readBytes(0, 1)
    first.release()
    assert is_there(address)
    assert second[5] == 7
    assert locked() == locked_inside  # still wired, if it was
    second.release()
    assert not is_there(address)
    assert locked() == locked_before


def test_pinned_memory_stays_pinned_while_a_view_exists() -> None:
    """The memory remains pinned, according to the kernel, because a device may have its address."""
    pins = kernel.status("VmPin")
    with iobmd.allocate(SIZE) as buffer:
        if buffer.wiring is not iobmd.Wiring.PINNED:
            pytest.skip("this kernel pins no memory here")
        view = memoryview(buffer)
    assert kernel.status("VmPin") == pins + SIZE
    view.release()
    assert kernel.pinned(pins) == pins


def test_free_still_refuses_a_view() -> None:
    buffer = iobmd.allocate(SIZE)
    view = memoryview(buffer)
    with pytest.raises(iobmd.BusyError, match="view count 1"):
        buffer.free()
    view.release()
    buffer.free()


def test_the_exception_of_the_block_is_the_one_that_is_raised() -> None:
    views = []
    with pytest.raises(ZeroDivisionError) as caught, iobmd.allocate(SIZE, wired=False) as buffer:
        address = mark(buffer)
        views.append(memoryview(buffer))
        _ = 1 // 0
    assert caught.value.__context__ is None
    views.pop().release()
    assert not is_there(address)


@pytest.mark.parametrize("mapped", [False, True])
def test_prepared_or_mapped_memory_does_not_hide_it_either(mapped: bool) -> None:
    """If an exception ends the block, the operations that it would have undone are undone."""
    locked_before = locked()
    made = []
    with pytest.raises(ZeroDivisionError) as caught, iobmd.allocate(SIZE, shared=True) as buffer:
        address = mark(buffer)
        if mapped:
            made.append(buffer.map())
        elif buffer.wiring is iobmd.Wiring.PINNED:
            buffer.prepare()
        else:
            pytest.skip("this kernel pins no memory here")
        _ = 1 // 0
    assert "also failed" in caught.value.__notes__[0]
    if mapped:
        made.pop().unmap()
    gc.collect()
    assert not is_there(address)
    assert locked() == locked_before


def test_memory_that_cannot_become_volatile_again_does_not_hide_it() -> None:
    with iobmd.allocate(SIZE, wired=False, purgeable=True) as buffer:
        buffer.setPurgeable(iobmd.kIOMemoryPurgeableVolatile)
        with pytest.raises(ZeroDivisionError) as caught, buffer.nonvolatile():
            try:
                buffer.prepare()
            except iobmd.CannotWireError:
                pytest.skip("this kernel pins no memory here")
            _ = 1 // 0
        assert "still prepared" in caught.value.__notes__[0]
        buffer.complete()


def test_a_block_that_ends_by_itself_reports_what_is_prepared() -> None:
    buffer = iobmd.allocate(SIZE, shared=True)
    mapped = buffer.map()
    with pytest.raises(iobmd.BusyError, match="map count 1"), buffer:
        pass
    mapped.unmap()
    buffer.free()


def test_a_map_goes_with_its_last_view() -> None:
    with iobmd.allocate(SIZE, wired=False, shared=True) as buffer:
        with buffer.map(iobmd.kIOMapUnique) as mapped:
            assert mapped.getAddress() != buffer.getBytesNoCopy()
            address = mark(buffer) - buffer.getBytesNoCopy() + mapped.getAddress()
            view = memoryview(mapped)
            with pytest.raises(iobmd.BusyError, match="view count 1"):
                mapped.unmap()
        assert is_there(address)
        with pytest.raises(iobmd.NotOpenError):
            mapped.getAddress()
        buffer.writeBytes(0, b"seen")
        assert view[:4] == b"seen"
    assert view[:4] == b"seen"  # the pages also remain while they are mapped
    view.release()
    assert not is_there(address)


@pytest.mark.parametrize("leave", [False, True], ids=["unmap", "with"])
def test_a_view_of_one_map_outlives_another_map_of_the_same_addresses(leave: bool) -> None:
    with iobmd.allocate(SIZE, wired=False, shared=True) as buffer:
        lent = buffer.map(iobmd.kIOMapUnique)
        address = lent.getAddress()
        lent.unmap()
        first = buffer.createMappingInTask(iobmd.kernel_task, address, 0)
        second = buffer.createMappingInTask(iobmd.kernel_task, address, 0)
        address += mark(buffer) - buffer.getBytesNoCopy()
        with first:
            view = memoryview(first)
        if leave:
            with pytest.raises(ZeroDivisionError) as caught, second:
                _ = 1 // 0
            assert not hasattr(caught.value, "__notes__")
        else:
            second.unmap()
        assert repr(second) == "<IOMemoryMap unmapped>"
        assert is_there(address)
        view.release()
        assert not is_there(address)


@pytest.mark.parametrize("through", ["buffer", "part"])
def test_a_view_of_an_ended_map_keeps_the_memory_pinned(through: str) -> None:
    gc.collect()
    pins, locked_before = kernel.status("VmPin"), locked()
    buffer = iobmd.allocate(SIZE, shared=True)
    address, inside = mark(buffer), (kernel.status("VmPin"), locked())
    mapped = buffer if through == "buffer" else iobmd.IOSubMemoryDescriptor.withSubRange(buffer, 0, SIZE, 3)
    with mapped.map(iobmd.kIOMapUnique) as ended:
        view = memoryview(ended)
    with pytest.raises(iobmd.BusyError, match="view count 1"):
        mapped.free()
    with buffer, mapped:
        pass
    del buffer, mapped, ended
    gc.collect()
    assert (kernel.status("VmPin"), locked()) == inside
    assert is_there(address)
    view.release()
    gc.collect()
    assert kernel.pinned(pins) == pins
    assert locked() == locked_before
    assert not is_there(address)


def test_a_view_of_an_ended_map_keeps_the_memory_to_which_it_was_redirected() -> None:
    locked_before = locked()
    with iobmd.allocate(SIZE, shared=True, wired=False) as old, iobmd.allocate(SIZE, shared=True) as new:
        address = mark(new)
        lent = old.map(iobmd.kIOMapUnique)
        place = lent.getAddress()
        lent.unmap()
        first, second = (old.createMappingInTask(iobmd.kernel_task, place, 0) for _ in range(2))
        with first:
            view = memoryview(first)
        second.redirect(new)
        second.unmap()
        old.free()
        with pytest.raises(iobmd.BusyError, match="view count 1"):
            new.free()
    assert is_there(address)
    assert view[8192:][: len(MARK)] == MARK
    assert locked() == locked_before + SIZE
    view.release()
    assert not is_there(address)
    assert locked() == locked_before


def test_a_map_of_the_buffers_own_addresses_keeps_the_memory() -> None:
    with iobmd.allocate(SIZE) as buffer, buffer.map() as mapped:
        address = mark(buffer)
        view = memoryview(mapped)
    assert is_there(address)
    view.release()
    assert not is_there(address)


def test_parts_and_a_view_of_their_memory() -> None:
    """The last of them frees the memory, in whatever order they end."""
    with iobmd.allocate(SIZE, wired=False) as buffer:
        address = mark(buffer)
        view = memoryview(buffer)
        part = iobmd.IOSubMemoryDescriptor.withSubRange(buffer, 0, PAGE_SIZE, iobmd.kIODirectionIn)
    with pytest.raises(iobmd.BusyError, match="in use"):
        part.free()
    with part:
        pass
    assert is_there(address)
    view.release()
    assert not is_there(address)


def test_a_copy_in_another_thread_keeps_the_memory_until_it_ends() -> None:
    buffer = iobmd.allocate(64 << 20, wired=False)
    address = mark(buffer)
    begun = threading.Event()

    def copy() -> None:
        into = bytearray(64 << 20)
        begun.set()
        buffer.readBytesInto(0, into)

    with contextlib.suppress(iobmd.NotOpenError):
        thread = threading.Thread(target=copy)
        with buffer:
            thread.start()
            begun.wait()
        thread.join()
    gc.collect()
    assert not is_there(address)


def test_cached_contents_become_volatile_with_the_last_view() -> None:
    with iobmd.PurgeableCache(lambda key: bytes([key]) * PAGE_SIZE) as cache:
        with cache[7] as item:
            view = item.view
        with pytest.raises(iobmd.NotOpenError):
            _ = item.view
        assert cache.statistics.held == 1
        assert iobmd.purge() == 0
        assert view[0] == 7
        view.release()
        assert cache.statistics.held == 0
        assert iobmd.purge() == PAGE_SIZE


def test_a_cache_that_is_left_keeps_contents_for_their_views() -> None:
    with contextlib.ExitStack() as stack:
        with iobmd.PurgeableCache(lambda key: MARK * key) as cache:
            item = stack.enter_context(cache[200])
            view = item.view
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert is_there(address)
        with pytest.raises(iobmd.NotOpenError):
            _ = item.view
    gc.collect()
    assert is_there(address)
    assert view[:8] == MARK[:8]
    view.release()
    gc.collect()
    assert not is_there(address)


def test_an_index_is_a_byte_and_a_slice_is_a_copy() -> None:
    with iobmd.allocate(16, wired=False) as buffer:
        model = bytearray(16)
        keys = [slice(3, 9), slice(None), slice(-4, None), slice(9, 3), slice(None, None, 3), slice(None, None, -1)]
        keys += [slice(12, 2, -4), slice(1, 100, 7)]
        for number, key in enumerate(keys):
            data = bytes(range(number, number + len(model[key])))
            buffer[key] = data
            model[key] = data
            assert buffer[:] == model
            assert [buffer[other] for other in keys] == [model[other] for other in keys]
        buffer[-1], model[-1] = 255, 255
        assert buffer[15] == 255
        assert [buffer[number] for number in range(-16, 16)] == [model[number] for number in range(-16, 16)]
        assert list(buffer) == list(model)
        for wrong in (16, -17):
            with pytest.raises(IndexError):
                _ = buffer[wrong]
            with pytest.raises(IndexError):
                buffer[wrong] = 0
        with pytest.raises(ValueError, match="cannot store 3"):
            buffer[0:2] = b"abc"
        with pytest.raises(ValueError, match="256"):
            buffer[0] = 256
        with pytest.raises(TypeError):
            buffer["a"]  # type: ignore[call-overload]


def test_nothing_is_printed_at_the_exit_of_the_interpreter() -> None:
    """Buffers, views, maps and cache items of every kind, alive, released and in cycles; no descriptor is left."""
    program = """
import iobmd
made = []
for keywords in ({}, {"wired": False}, {"shared": True}, {"wired": False, "purgeable": True}):
    with iobmd.allocate(8192, **keywords) as buffer:
        made.append(memoryview(buffer))
        buffer.own = memoryview(buffer)
    with iobmd.allocate(8192, shared=True) as other, other.map(iobmd.kIOMapUnique) as mapped:
        made += [memoryview(other), memoryview(mapped)]
with iobmd.PurgeableCache(lambda key: b"contents") as cache, cache["key"] as item:
    made.append(item.view)
made.append(made)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
