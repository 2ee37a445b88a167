"""Cache modes: the bytes at every odd offset, and the cache line instructions that are actually executed."""

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.breakpoints import cache_instructions
from support.child import sleeping

import iobmd
from iobmd import (
    IOBufferMemoryDescriptor,
    IOMemoryDescriptor,
    IOMultiMemoryDescriptor,
    IOReturn,
    IOReturnError,
    IOSubMemoryDescriptor,
    kIODirectionInOut,
    kIOMapCopybackCache,
    kIOMapDefaultCache,
    kIOMapInhibitCache,
    kIOMapWriteCombineCache,
    kIOMapWriteThruCache,
    kIOMemoryIncoherentIOFlush,
    kIOMemoryIncoherentIOStore,
    kIOMemoryKernelUserShared,
    kIOMemoryPageable,
    procfs,
)
from iobmd._native import mapping as native
from iobmd._native.mapping import Mapping

PAGE = mmap.PAGESIZE
LINE = native.LINE_SIZE
MODES = {
    "default": kIOMapDefaultCache,
    "inhibit": kIOMapInhibitCache,
    "writethru": kIOMapWriteThruCache,
    "copyback": kIOMapCopybackCache,
    "writecombine": kIOMapWriteCombineCache,
}
NAMES = {native.CLFLUSH: "clflush", native.CLFLUSHOPT: "clflushopt", native.CLWB: "clwb"}
x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the instructions of x86-64")


def flags() -> set[str]:
    return set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())


def instructions() -> list[int]:
    """Return the instructions of this processor, according to the kernel."""
    if os.uname().machine != "x86_64":
        return [native.DC]
    return [instruction for instruction, name in NAMES.items() if name in flags()]


def lines(offset: int, length: int) -> int:
    """Return how many lines contain a byte of the range."""
    return len({byte // LINE for byte in range(offset, offset + length)})


@x86
def test_the_best_instruction_of_this_processor() -> None:
    assert instructions()[-1] == native.BEST_FLUSH
    assert str(LINE) == Path("/sys/devices/system/cpu/cpu0/cache/index0/coherency_line_size").read_text().strip() or (
        f"clflush size\t: {LINE}\n" in Path("/proc/cpuinfo").read_text()
    )


@pytest.mark.parametrize("name", MODES)
def test_requested_and_effective(name: str) -> None:
    """Main memory is cached whatever mode is requested, as `cache_mode` reports."""
    with iobmd.allocate(PAGE, cache=name) as buffer:
        assert buffer.cache_mode == (MODES[name], kIOMapCopybackCache)
        assert buffer.getFlags() & 0x700 == MODES[name]
        assert not any(buffer.readBytes(0, PAGE))


@pytest.mark.parametrize("mode", [0x500, 0x600, 0x700])
def test_modes_of_kernels_only(mode: int) -> None:
    with pytest.raises(IOReturnError) as caught:
        IOBufferMemoryDescriptor.withOptions(mode, PAGE)
    assert caught.value.code == IOReturn.kIOReturnUnsupported


def test_a_processor_without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BEST_FLUSH", native.NO_FLUSH)
    with pytest.raises(IOReturnError) as caught:
        iobmd.allocate(PAGE, cache="writethru")
    assert caught.value.code == IOReturn.kIOReturnUnsupported
    with iobmd.allocate(PAGE, cache="copyback") as buffer, pytest.raises(IOReturnError) as caught:
        buffer.performOperation(kIOMemoryIncoherentIOStore, 0, 1)
    assert caught.value.code == IOReturn.kIOReturnUnsupported


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([0, 1, 2, 3, 4]),
    st.sampled_from(instructions()),
    st.integers(0, 3 * LINE),
    st.integers(0, 5 * LINE),
    st.integers(0, LINE),
)
@example(4, native.BEST_FLUSH, LINE, 2 * LINE, 0)
@example(4, native.BEST_FLUSH, 1, LINE - 1, 1)
@example(4, native.BEST_FLUSH, 63, 66, 3)
@example(4, native.BEST_FLUSH, 5, 0, 0)
def test_bytes_by_every_mode_and_instruction(
    mode: int, instruction: int, offset: int, length: int, skew: int
) -> None:
    """All bytes are written, none before or after them, and all are read back, at any offset in a line."""
    mapping = Mapping.anonymous(PAGE, PAGE)
    model = bytearray(b"." * PAGE)
    mapping.write(0, model)
    mapping.cache, mapping.instruction = mode, instruction
    source = memoryview(os.urandom(length + skew))[skew:]
    mapping.write(offset, source)
    model[offset : offset + length] = source
    assert mapping.read(0, PAGE) == model
    target = bytearray(length + 2)
    with memoryview(target)[1:-1] as middle:
        mapping.read_into(offset, middle)
    assert target == b"\0" + source.tobytes() + b"\0"
    mapping.close()


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 400), st.integers(0, 400), st.integers(0, 600))
@example(4, 0, 64, 512)
@example(4, 64, 0, 512)
def test_a_source_that_overlaps(mode: int, here: int, there: int, length: int) -> None:
    """A copy within the buffer behaves like memmove in both directions."""
    name = {1: "inhibit", 2: "writethru", 4: "writecombine"}[mode]
    with iobmd.allocate(PAGE, wired=False, cache=name) as buffer:
        model = bytearray(os.urandom(PAGE))
        buffer.writeBytes(0, model)
        with memoryview(buffer) as view:
            buffer.writeBytes(there, view[here : here + length])
        model[there : there + length] = bytes(model[here : here + length])
        assert buffer.readBytes(0, PAGE) == model


@x86
@pytest.mark.parametrize(("offset", "length"), [(60, 8), (LINE - 1, 3 * LINE)])
@pytest.mark.parametrize("instruction", instructions())
def test_write_through_writes_every_line_back(instruction: int, offset: int, length: int) -> None:
    mapping = Mapping.anonymous(PAGE, PAGE)
    mapping.cache, mapping.instruction = 2, instruction
    data = bytes(length)
    assert cache_instructions(lambda: mapping.write(offset, data)) == {
        NAMES[instruction]: lines(offset, length),
        "mfence": 1,
    }
    assert not cache_instructions(lambda: mapping.read(offset, length))
    mapping.close()


@x86
@pytest.mark.parametrize(("offset", "length"), [(60, 8), (LINE - 1, 3 * LINE)])
@pytest.mark.parametrize("instruction", instructions())
def test_inhibit_drops_every_line(instruction: int, offset: int, length: int) -> None:
    """Lines are dropped before a read and after a write, not by clwb, which may retain them."""
    mapping = Mapping.anonymous(PAGE, PAGE)
    mapping.cache, mapping.instruction = 1, instruction
    data = bytes(length)
    dropping = NAMES[min(instruction, native.CLFLUSHOPT)]
    for action in (lambda: mapping.write(offset, data), lambda: mapping.read(offset, length)):
        assert cache_instructions(action) == {dropping: lines(offset, length), "mfence": 1}
    mapping.close()


@x86
@pytest.mark.parametrize(
    ("offset", "length", "whole", "torn"),
    [(0, 10 * LINE, 10, 0), (LINE, LINE - 1, 0, 1), (60, 8, 0, 2), (60, 4 + LINE, 1, 1), (1, 5 * LINE, 4, 2)],
)
def test_write_combine_goes_past_the_caches(offset: int, length: int, whole: int, torn: int) -> None:
    """Whole lines use four non-temporal stores, partial ones ordinary stores and a flush; a fence follows."""
    mapping = Mapping.anonymous(PAGE, PAGE)
    mapping.cache = 4
    data = bytes(length)
    seen = cache_instructions(lambda: mapping.write(offset, data))
    assert seen["movntdq"] == 4 * whole
    assert seen[NAMES[min(native.BEST_FLUSH, native.CLFLUSHOPT)]] == torn
    assert seen["mfence"] >= 1
    mapping.close()


@x86
@pytest.mark.parametrize("name", ["default", "copyback"])
def test_cached_memory_takes_none_of_them(name: str) -> None:
    with iobmd.allocate(PAGE, wired=False, cache=name) as buffer:
        assert not cache_instructions(lambda: (buffer.writeBytes(1, b"12345"), buffer.readBytes(0, 7)))


def everywhere() -> dict[str, Callable[[int], IOBufferMemoryDescriptor]]:
    """Return memory of every kind of this process."""
    make = IOBufferMemoryDescriptor.inTaskWithOptions
    pageable, shared = int(kIOMemoryPageable), int(kIOMemoryKernelUserShared)
    return {
        "private": lambda mode: make(iobmd.kernel_task, mode | pageable, PAGE),
        "shared": lambda mode: make(iobmd.kernel_task, mode | pageable | shared, PAGE),
        "in no task": lambda mode: make(None, mode | pageable, PAGE),
    }


@x86
@pytest.mark.parametrize("kind", everywhere())
def test_every_kind_of_memory_honours_it(kind: str) -> None:
    with everywhere()[kind](int(kIOMapInhibitCache)) as buffer:
        seen = cache_instructions(lambda: buffer.writeBytes(10, b"12345"))
        assert seen["clflushopt"] + seen["clflush"] == 1
        seen = cache_instructions(lambda: buffer.readBytes(10, 5))
        assert seen["clflushopt"] + seen["clflush"] == 1


@x86
def test_views_do_not_and_operations_do_it_for_them() -> None:
    with iobmd.allocate(2 * PAGE, wired=False, cache="writethru") as buffer, memoryview(buffer) as view:

        def store() -> None:
            view[100] = 1

        assert not cache_instructions(store)
        done = cache_instructions(lambda: buffer.performOperation(kIOMemoryIncoherentIOStore, 100, LINE))
        assert done == {NAMES[native.BEST_FLUSH]: lines(100, LINE), "mfence": 1}
        done = cache_instructions(lambda: buffer.performOperation(kIOMemoryIncoherentIOFlush, PAGE - 1, 2))
        assert done == {NAMES[min(native.BEST_FLUSH, native.CLFLUSHOPT)]: 2, "mfence": 1}
        assert not cache_instructions(lambda: buffer.performOperation(kIOMemoryIncoherentIOFlush, PAGE, 0))


@x86
def test_operations_reach_what_relatives_are_made_of() -> None:
    """Parts, concatenations and existing memory are flushed; memory of another task is refused."""
    own = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(own))
    drop = NAMES[min(native.BEST_FLUSH, native.CLFLUSHOPT)]
    with (
        iobmd.allocate(PAGE, wired=False) as one,
        IOMemoryDescriptor.withAddressRange(address + 100, 2000, kIODirectionInOut, iobmd.kernel_task) as other,
        IOMultiMemoryDescriptor.withDescriptors([one, other], kIODirectionInOut) as both,
        IOSubMemoryDescriptor.withSubRange(both, PAGE - LINE, 2 * LINE, kIODirectionInOut) as middle,
    ):
        done = cache_instructions(lambda: middle.performOperation(kIOMemoryIncoherentIOFlush, 0, 2 * LINE))
        assert done == {drop: 1 + lines(100, LINE), "mfence": 2}
        done = cache_instructions(lambda: other.performOperation(kIOMemoryIncoherentIOFlush, 10, 1))
        assert done == {drop: 1, "mfence": 1}
        with sleeping() as process:
            stack = next(area for area in procfs.maps(process.pid) if area.name == "[stack]")
            theirs = IOMemoryDescriptor.withAddressRange(stack.end - PAGE, PAGE, kIODirectionInOut, process.pid)
            with theirs, pytest.raises(IOReturnError) as caught:
                theirs.performOperation(kIOMemoryIncoherentIOFlush, 0, 1)
    assert caught.value.code == IOReturn.kIOReturnUnsupported


@x86
def test_a_copy_does_not_stay_in_the_caches() -> None:
    with iobmd.allocate(PAGE, wired=False) as source:
        source.writeBytes(0, b"copied" * 100)

        def copy() -> None:
            iobmd.copy(iobmd.kernel_task, source.getBytesNoCopy(), 600, wired=False, cache="inhibit").free()

        seen = cache_instructions(copy)
        assert seen["clflushopt"] + seen["clflush"] == lines(0, 600)


def guarded(size: int) -> Mapping:
    """The memory is between inaccessible pages: an access to one line too many would fault."""
    descriptor = os.memfd_create("iobmd-test")
    os.ftruncate(descriptor, size)
    mapping = Mapping.view([(descriptor, 0, size)], 0, True, PAGE, PAGE)
    os.close(descriptor)
    return mapping


@pytest.mark.parametrize("mode", [1, 2, 4])
@pytest.mark.parametrize("instruction", instructions())
def test_copies_touch_no_line_beyond(mode: int, instruction: int) -> None:
    mapping = guarded(PAGE)
    mapping.cache, mapping.instruction = mode, instruction
    for offset, length in ((0, PAGE), (PAGE - 1, 1), (PAGE - LINE, LINE), (0, 1), (PAGE - LINE - 1, LINE + 1)):
        data = os.urandom(length)
        mapping.write(offset, data)
        assert mapping.read(offset, length) == data
        assert mapping.write_back(offset, length, False) == lines(offset, length)
        assert mapping.write_back(offset, length, True) == lines(offset, length)
    for offset, length in ((PAGE, 1), (0, PAGE + 1), (PAGE + 1, 0)):
        for drop in (False, True):
            with pytest.raises(ValueError, match="past the end"):
                mapping.write_back(offset, length, drop)
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        mapping.write_back(0, 1, True)


@pytest.mark.parametrize("operation", [0, 3, 4, -1])
def test_operations_that_are_not_known(operation: int) -> None:
    with iobmd.allocate(PAGE) as buffer, pytest.raises(IOReturnError) as caught:
        buffer.performOperation(operation, 0, PAGE)
    assert caught.value.code == IOReturn.kIOReturnUnsupported


@pytest.mark.parametrize(("offset", "length"), [(0, PAGE + 1), (PAGE, 1), (-1, 1), (0, -1)])
def test_operations_past_the_end(offset: int, length: int) -> None:
    with iobmd.allocate(PAGE) as buffer, pytest.raises(IOReturnError) as caught:
        buffer.performOperation(kIOMemoryIncoherentIOFlush, offset, length)
    assert caught.value.code == IOReturn.kIOReturnBadArgument


def test_operations_on_memory_that_was_freed() -> None:
    buffer = iobmd.allocate(PAGE)
    buffer.free()
    with pytest.raises(IOReturnError) as caught:
        buffer.performOperation(kIOMemoryIncoherentIOFlush, 0, PAGE)
    assert caught.value.code == IOReturn.kIOReturnNotOpen
    with pytest.raises(IOReturnError):
        _ = buffer.cache_mode
