"""Buffers of this process: the kernel's view of them, IOKit's rules, Python's protocols, limits, forks, leaks."""

import array
import ctypes
import gc
import io
import mmap
import os
import random
import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, in_child
from support.errors import code_of
from support.purging import page_out

import iobmd
from iobmd import IOBufferMemoryDescriptor as Buffer
from iobmd import (
    IOOptionBits,
    IOReturn,
    IOReturnError,
    Wiring,
    kernel_task,
    kIODirectionIn,
    kIODirectionInOut,
    kIODirectionOut,
    kIOMemoryPageable,
)
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
RULES = pytest.mark.parametrize("wired", [True, False], ids=["wired", "pageable"])


# --- the kernel's view


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("size", [1, 4095, PAGE_SIZE, 4097, 70_000, 3 * MIB + 5])
def test_wired_is_resident_and_locked(size: int) -> None:
    pages = -(-size // kernel.PAGE)
    iobmd.trim()  # the page of a small buffer may exist already
    before = kernel.status("VmLck")
    with iobmd.allocate(size) as buffer:
        address = buffer.getBytesNoCopy()
        assert kernel.present(address, size) == pages
        assert kernel.status("VmLck") - before == pages * kernel.PAGE
        assert "lo" in vm_flags(address)
        assert buffer.wiring in (Wiring.RESIDENT, Wiring.PINNED)
        assert buffer.getPageCounts() == (pages, pages)
    iobmd.trim()
    assert kernel.status("VmLck") == before


def vm_flags(address: int) -> list[str]:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        span = line.split()[0].split("-")
        if len(span) == 2 and int(span[0], 16) <= address < int(span[1], 16):
            return next(line for line in lines if line.startswith("VmFlags")).split()[1:]
    return []


@pytest.mark.usefixtures("nothing_left")
def test_pageable_is_neither() -> None:
    with iobmd.allocate(8 * MIB, wired=False) as buffer:
        address = buffer.getBytesNoCopy()
        assert kernel.present(address, 8 * MIB) == 0
        assert "lo" not in vm_flags(address)
        assert buffer.wiring is Wiring.PAGEABLE
        assert buffer.getPageCounts() == (0, 0)
        assert not any(buffer.readBytes(0, 4 * kernel.PAGE))
        resident, dirty = buffer.getPageCounts()
        assert resident >= 4
        assert dirty == 0, "a page that a read maps is not dirty"
        buffer.writeBytes(5 * kernel.PAGE - 1, b"ab")
        assert buffer.getPageCounts()[1] >= 2
        assert kernel.present(address, 8 * MIB) == buffer.getPageCounts()[0]


@RULES
@pytest.mark.parametrize("size", [100, 5 * kernel.PAGE, 4 * MIB + 1])
def test_zero_when_handed_out(size: int, wired: bool) -> None:
    """New memory is zero even if the kernel allocates the frames that were just freed."""
    for _ in range(20):
        with iobmd.allocate(size, wired=wired) as buffer:
            assert not any(memoryview(buffer)), "bytes of a previous owner"
            buffer.writeBytes(0, b"\xa5" * size)


@pytest.mark.needs("swap", "compiler")
@pytest.mark.usefixtures("swap")
def test_pageable_pages_out_and_wired_stays() -> None:
    data = random.Random(1).randbytes(2 * MIB)
    with iobmd.allocate(len(data), wired=False) as pageable, iobmd.allocate(len(data)) as wired:
        for buffer in (pageable, wired):
            buffer.writeBytes(0, data)
        page_out(pageable)
        assert kernel.swapped(pageable.getBytesNoCopy(), len(data)) > 400
        with pytest.raises(OSError, match="madvise"):
            page_out(wired)
        assert kernel.present(wired.getBytesNoCopy(), len(data)) == len(data) // kernel.PAGE
        assert pageable.getPageCounts()[0] < 112
        for buffer in (pageable, wired):
            assert bytes(buffer) == data
        assert kernel.swapped(pageable.getBytesNoCopy(), len(data)) == 0


@pytest.mark.needs("memlock")
@pytest.mark.usefixtures("nothing_left")
def test_large_wired_memory_is_huge() -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("transparent huge pages are off")
    with iobmd.allocate(64 * MIB) as buffer:
        assert buffer.getBytesNoCopy() % (2 * MIB) == 0
        assert kernel.smaps(buffer.getBytesNoCopy())["AnonHugePages"] > 32 * MIB


# --- IOKit's rules


@pytest.mark.usefixtures("nothing_left")
def test_factories() -> None:
    made = [
        Buffer.withOptions(kIODirectionIn, 5000),
        Buffer.withCapacity(5000, kIODirectionIn),
        Buffer.inTaskWithOptions(kernel_task, kIODirectionIn, 5000, kernel.PAGE, 7, 8),
        Buffer.inTaskWithOptions(os.getpid(), kIODirectionIn, 5000),
        Buffer.withBytes(bytes(5000), kIODirectionIn),
        iobmd.allocate(5000, direction="in"),
    ]
    for buffer in made:
        with buffer:
            assert (buffer.getLength(), buffer.getCapacity(), len(buffer)) == (5000, 5000, 5000)
            assert buffer.getDirection() == buffer.getFlags() == kIODirectionIn
            assert isinstance(buffer.getFlags(), IOOptionBits)
            assert not any(bytes(buffer))
    assert made[2].vm_tags == (7, 8)


def test_designated_initialiser() -> None:
    buffer = Buffer()
    assert repr(buffer) == "<IOBufferMemoryDescriptor not initialised>"
    assert code_of(buffer.getLength) == IOReturn.kIOReturnNotOpen
    assert code_of(lambda: buffer.initWithPhysicalMask(kernel_task, 0, 0, 1, 0)) == IOReturn.kIOReturnBadArgument
    assert buffer.initWithPhysicalMask(kernel_task, 0, PAGE_SIZE, 1, 0) is True
    assert code_of(lambda: buffer.initWithPhysicalMask(kernel_task, 0, PAGE_SIZE, 1, 0)) == IOReturn.kIOReturnBusy
    buffer.free()
    assert code_of(lambda: buffer.initWithPhysicalMask(kernel_task, 0, PAGE_SIZE, 1, 0)) == IOReturn.kIOReturnBusy


def test_every_factory_comes_down_to_it() -> None:
    seen: list[int] = []

    class Watched(Buffer):
        def initWithPhysicalMask(self, inTask, options, capacity, alignment, physicalMask):  # type: ignore[no-untyped-def]  # noqa: N802, N803
            seen.append(capacity)
            return super().initWithPhysicalMask(inTask, options, capacity, alignment, physicalMask)

    with (
        Watched.withBytes(b"12", 0) as two,
        Watched.withCopy(0 or kernel_task, 0, kernel_task, two.getBytesNoCopy(), 1),
    ):
        Watched.withOptions(0, 3).free()
        Watched.withCapacity(4, 0).free()
    assert seen == [2, 1, 3, 4]


def test_length_and_direction() -> None:
    with Buffer.withOptions(kIODirectionOut, 100) as buffer:
        buffer.setLength(0)
        assert (len(buffer), bytes(buffer)) == (0, b"")
        assert buffer.getBytesNoCopy() % kernel.PAGE == 0
        buffer.setLength(100)
        for bad in (101, -1, 1 << 65):
            assert code_of(lambda: buffer.setLength(bad)) == IOReturn.kIOReturnBadArgument  # noqa: B023
        assert len(buffer) == 100
        buffer.setDirection(kIODirectionInOut)
        assert buffer.getDirection() == kIODirectionInOut
        for bad in (4, -1):
            assert code_of(lambda: buffer.setDirection(bad)) == IOReturn.kIOReturnBadArgument  # noqa: B023
        buffer.setTag(77)
        assert buffer.getTag() == 77


def test_append() -> None:
    with Buffer.withCapacity(10, kIODirectionOut) as buffer:
        assert buffer.appendBytes(b"full") == 0
        buffer.setLength(0)
        assert buffer.appendBytes(b"abcd") == 4
        assert buffer.appendBytes(array.array("H", [0x4544, 0x4746])) == 4
        assert buffer.appendBytes(b"xyz") == 2
        assert bytes(buffer) == b"abcdDEFGxy"


def test_read_and_write() -> None:
    data = os.urandom(300_000)
    with Buffer.withBytes(data, kIODirectionInOut) as buffer:
        assert buffer.readBytes(0, len(data)) == data
        assert buffer.readBytes(len(data), 0) == b""
        room = bytearray(1000)
        assert buffer.readBytesInto(17, room) == 1000
        assert room == data[17:1017]
        assert buffer.writeBytes(299_990, b"0123456789") == 10
        assert bytes(buffer) == data[:299_990] + b"0123456789"
        # A copy within the buffer, overlapping.
        assert buffer.writeBytes(5, memoryview(buffer)[:1000]) == 1000
        assert buffer.readBytes(5, 1000) == data[:1000]
        before = bytes(buffer)
        for offset, length in ((299_991, 10), (-1, 1), (300_001, 0), (0, -1), (1 << 64, 1)):
            assert code_of(lambda: buffer.readBytes(offset, length)) == IOReturn.kIOReturnBadArgument  # noqa: B023
        for access in (buffer.writeBytes, buffer.readBytesInto):
            assert code_of(lambda: access(299_991, bytearray(10))) == IOReturn.kIOReturnBadArgument  # noqa: B023
        assert bytes(buffer) == before


def test_address() -> None:
    with Buffer.withBytes(b"0123456789", kIODirectionOut) as buffer:
        address = buffer.getBytesNoCopy()
        assert kernel_task.read(address, 10) == b"0123456789"
        assert buffer.getBytesNoCopy(3, 7) == address + 3
        for start, length in ((3, 8), (11, 0), (-1, 1), (1 << 64, 0)):
            assert code_of(lambda: buffer.getBytesNoCopy(start, length)) == IOReturn.kIOReturnBadArgument  # noqa: B023


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("alignment", [2 * kernel.PAGE, 64 << 10, 2 * MIB, 64 * MIB])
def test_alignment_of_pageable_memory(alignment: int, shared: bool) -> None:
    before = kernel.Footprint.now().mappings
    for size in (1, 5 * MIB):
        with iobmd.allocate(size, wired=False, alignment=alignment, shared=shared) as buffer:
            address = buffer.getBytesNoCopy()
            assert address % alignment == 0
            assert kernel.present(address, size) == 0
            assert kernel.Footprint.now().mappings <= before + 2  # the unused addresses around it are unmapped
            assert iobmd.IOMemoryDescriptor.withAddressRange(address, size, 3, kernel_task).readBytes(0, 1) == b"\0"
    with pytest.raises(iobmd.BadArgumentError, match="pageable memory moves"):
        iobmd.allocate(8192, wired=False, alignment=alignment, contiguous=True)


@pytest.mark.parametrize("alignment", [0, 1, 2, 64, 512, kernel.PAGE])
def test_alignment(alignment: int) -> None:
    with Buffer.withOptions(0, 100, alignment) as buffer:
        assert buffer.getBytesNoCopy() % max(alignment, 1) == 0
        assert buffer.getCapacity() == 100


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("options", "capacity", "alignment", "mask"),
    [
        (0, 0, 1, 0),
        (0, -1, 1, 0),
        (0, PAGE_SIZE, 3, 0),
        (0, PAGE_SIZE, -PAGE_SIZE, 0),
        (0, PAGE_SIZE, PAGE_SIZE + 1, 0),
        (0, 1 << 63, 1, 0),
        (0, 1 << 70, 1, 0),
        (0, PAGE_SIZE, 1, -1),
        (0, PAGE_SIZE, 1, 1 << 64),
        (4, PAGE_SIZE, 1, 0),
        (1 << 31, PAGE_SIZE, 1, 0),
        (-1, PAGE_SIZE, 1, 0),
        (iobmd.kIOMemoryPurgeable, PAGE_SIZE, 1, 0),
    ],
)
def test_bad_arguments(options: int, capacity: int, alignment: int, mask: int) -> None:
    def make() -> None:
        Buffer().initWithPhysicalMask(kernel_task, options, capacity, alignment, mask)

    assert code_of(make) == IOReturn.kIOReturnBadArgument


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("options", [IOOptionBits.kIOMemoryClearEncrypt, IOOptionBits.kIOMemoryUseReserve])
def test_options_without_a_meaning_in_linux(options: int) -> None:
    with pytest.raises(IOReturnError, match="omit it") as caught:
        Buffer.withOptions(options, PAGE_SIZE)
    assert caught.value.code == IOReturn.kIOReturnUnsupported


def test_api_refuses_unknown_words() -> None:
    assert code_of(lambda: iobmd.allocate(1, cache="fast")) == IOReturn.kIOReturnBadArgument
    assert code_of(lambda: iobmd.allocate(1, direction="up")) == IOReturn.kIOReturnBadArgument
    with pytest.raises(TypeError):
        iobmd.copy(kernel_task, 0, 1, colour="red")
    assert code_of(lambda: iobmd.copy(kernel_task, 0, 1, freeze=True)) == IOReturn.kIOReturnUnsupported


# --- Python's manners


def test_buffer_protocol(tmp_path: Path) -> None:
    with Buffer.withBytes(b"hello world", kIODirectionOut) as buffer:
        with memoryview(buffer) as view:
            assert (view.nbytes, view.readonly, view.format, view.ndim) == (11, False, "B", 1)
            view[0] = ord("J")
            assert kernel_task.read(buffer.getBytesNoCopy(), 5) == b"Jello"
        buffer.setLength(5)
        assert bytes(buffer) == b"Jello"
        assert io.BytesIO(b"12345678").readinto(buffer) == 5
        path = tmp_path / "file"
        path.write_bytes(b"abcdefgh")
        with path.open("rb", buffering=0) as file:
            assert file.readinto(buffer) == 5
        assert bytes(buffer) == b"abcde"
        with path.open("wb") as file:
            assert file.write(buffer) == 5


def test_free_refuses_while_a_view_is_alive() -> None:
    buffer = iobmd.allocate(PAGE_SIZE)
    view = memoryview(buffer)
    part = view[100:200]
    view.release()
    with pytest.raises(BufferError) as caught:
        buffer.free()
    assert caught.value.code == IOReturn.kIOReturnBusy
    part[0] = 1
    assert buffer.readBytes(100, 1) == b"\1"
    part.release()
    buffer.free()
    buffer.free()
    buffer.release()
    assert repr(buffer) == "<IOBufferMemoryDescriptor released>"
    for use in (buffer.getLength, lambda: memoryview(buffer), lambda: buffer.readBytes(0, 1), buffer.__enter__,
                lambda: buffer.appendBytes(b""), buffer.getPageCounts, lambda: len(buffer)):  # fmt: skip
        with pytest.raises(ValueError, match="released") as closed:
            use()
        assert closed.value.code == IOReturn.kIOReturnNotOpen


def test_view_keeps_the_buffer() -> None:
    view = memoryview(iobmd.allocate(PAGE_SIZE))
    gc.collect()
    view[0] = 1
    with pytest.warns(ResourceWarning, match="never freed"):
        del view
        gc.collect()


@pytest.mark.usefixtures("nothing_left")
def test_resource_warning_names_the_buffer() -> None:
    with pytest.warns(ResourceWarning, match=r"length 64 of 64, .* was never freed"):
        iobmd.allocate(64)
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with iobmd.allocate(64):
            pass
        gc.collect()


def test_repr() -> None:
    with iobmd.allocate(5000, wired=False, direction="out") as buffer:
        buffer.setLength(10)
        address = buffer.getBytesNoCopy()
        assert repr(buffer) == (
            f"<IOBufferMemoryDescriptor in task {os.getpid()} at {address:#x}, length 10 of 5000, pageable, "
            "direction out, open>"
        )


def test_no_free_under_a_copy() -> None:
    """Another thread cannot free the memory during a copy: `free` raises kIOReturnBusy until the copy ends."""
    # On a busy machine the memory may be freed before the first copy begins.
    assert any(all(free_beside_copies()) for _ in range(50))


def free_beside_copies() -> tuple[int, int]:
    """Free memory while another thread writes to it; return how often that was refused, and the copies."""
    buffer = iobmd.allocate(64 * MIB, wired=False)
    source = bytes(64 * MIB)
    started = threading.Event()
    copied = []

    def write() -> None:
        started.set()
        for _ in range(5):
            try:
                copied.append(buffer.writeBytes(0, source))
            except IOReturnError as error:
                assert error.code == IOReturn.kIOReturnNotOpen

    writer = threading.Thread(target=write)
    writer.start()
    started.wait()
    busy = 0
    while buffer._owner:
        try:
            buffer.free()
        except BufferError:
            busy += 1
    writer.join()
    return busy, len(copied)


# --- limits


@pytest.mark.usefixtures("nothing_left")
def test_limit_on_locked_memory() -> None:
    def lock() -> tuple[str, int, int]:
        with iobmd.allocate(16 * kernel.PAGE):
            with pytest.raises(IOReturnError) as caught:
                iobmd.allocate(50 * kernel.PAGE)
            with pytest.raises(IOReturnError) as large:
                iobmd.allocate(8 * MIB)
            assert large.value.code == IOReturn.kIOReturnCannotWire
        with iobmd.allocate(8 * MIB, wired=False), iobmd.allocate(50 * kernel.PAGE):
            pass
        return str(caught.value), caught.value.code, kernel.status("VmLck")

    message, code, left = in_child(lock, uid=NOBODY, memlock=64 * kernel.PAGE)
    assert code == IOReturn.kIOReturnCannotWire
    assert str(64 * kernel.PAGE) in message
    assert f"{16 * kernel.PAGE} of them in use" in message
    for remedy in ("ulimit -l", "CAP_IPC_LOCK", "LimitMEMLOCK"):
        assert remedy in message
    assert left == 0


def test_no_locked_memory_allowed_at_all() -> None:
    def lock() -> None:
        iobmd.allocate(1)

    with pytest.raises(IOReturnError, match="RLIMIT_MEMLOCK is 0 bytes") as caught:
        in_child(lock, uid=NOBODY, memlock=0)
    assert caught.value.code == IOReturn.kIOReturnCannotWire


@pytest.mark.usefixtures("nothing_left")
@RULES
def test_more_than_there_is(wired: bool) -> None:
    assert code_of(lambda: iobmd.allocate(1 << 46, wired=wired)) == IOReturn.kIOReturnNoMemory


@pytest.mark.usefixtures("nothing_left")
def test_refused_rather_than_killed() -> None:
    """Linux maps memory that does not fit into RAM; filling it would invoke the OOM killer."""
    total = os.sysconf("SC_PHYS_PAGES") * kernel.PAGE
    assert code_of(lambda: iobmd.allocate(total - 64 * MIB)) == IOReturn.kIOReturnNoMemory


@pytest.mark.needs("memory_cgroup")
@pytest.mark.usefixtures("nothing_left")
def test_refused_rather_than_killed_in_a_cgroup(memory_cgroup: Callable[[int], Path]) -> None:
    procs = memory_cgroup(128 * MIB)

    def fill() -> tuple[IOReturn, int]:
        procs.write_text(str(os.getpid()))
        code = code_of(lambda: iobmd.allocate(256 * MIB))
        with iobmd.allocate(64 * MIB) as fits:
            return code, len(fits)

    assert in_child(fill) == (IOReturn.kIOReturnNoMemory, 64 * MIB)


def test_address_space_limit() -> None:
    def map_much() -> IOReturn:
        used = kernel.status("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (used + 32 * MIB, used + 32 * MIB))
        return code_of(lambda: iobmd.allocate(64 * MIB, wired=False))

    assert in_child(map_much) == IOReturn.kIOReturnNoMemory


# --- forks and leaks


def test_fork_does_not_disturb_the_parent() -> None:
    data = os.urandom(10_000)
    with iobmd.allocate(10_000) as wired, iobmd.allocate(10_000, wired=False) as pageable:
        wired.writeBytes(0, data)
        pageable.writeBytes(0, data)
        early = memoryview(pageable)

        def child() -> tuple[IOReturn, bytes]:
            refused = code_of(lambda: wired.readBytes(0, 1))
            with pytest.raises(IOReturnError, match="fork does not pass wiring on"):
                wired.getLength()
            seen = bytes(early[:10])
            pageable.writeBytes(0, b"child's own")
            wired.free()
            return refused, seen

        assert in_child(child) == (IOReturn.kIOReturnNotOpen, data[:10])
        early.release()
        assert bytes(wired) == bytes(pageable) == data
        assert kernel.present(wired.getBytesNoCopy(), 10_000) == 3
        assert "lo" in vm_flags(wired.getBytesNoCopy())


def test_child_that_exits_normally_is_quiet() -> None:
    program = (
        "import os, iobmd\nbuffer = iobmd.allocate(9000)\nbuffer.writeBytes(0, b'x' * 9000)\n"
        "if not os.fork(): raise SystemExit\nos.wait()\nassert bytes(buffer) == b'x' * 9000\nbuffer.free()\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.needs("own_footprint")
@RULES
@pytest.mark.usefixtures("nothing_left")
def test_ten_thousand_buffers(wired: bool) -> None:
    pages = kernel.PAGE

    def cycle(rounds: int) -> None:
        for number in range(rounds):
            with iobmd.allocate(1 + number * 37 % (3 * pages), wired=wired) as buffer:
                buffer.writeBytes(0, b"x")

    cycle(100)
    with kernel.no_growth(MIB):
        cycle(10_000)


@pytest.mark.needs("own_footprint")
@pytest.mark.usefixtures("nothing_left")
def test_hundreds_of_failed_copies() -> None:
    area = mmap.mmap(-1, 2 * kernel.PAGE)
    anchor = ctypes.c_char.from_buffer(area)
    hole = ctypes.addressof(anchor) + kernel.PAGE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(hole), kernel.PAGE, 0) == 0

    def fail() -> None:
        # One page is mapped and the next is not: the destination is allocated and half filled when the copy fails.
        with pytest.raises(IOReturnError):
            Buffer.withCopy(kernel_task, kIOMemoryPageable, kernel_task, hole - kernel.PAGE, 2 * kernel.PAGE)

    for _ in range(20):
        fail()
    with kernel.no_growth(MIB // 2):
        for _ in range(200):  # of two pages each
            fail()
    del anchor
    area.close()
