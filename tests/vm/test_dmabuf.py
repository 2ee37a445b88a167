"""dma-bufs of shared memory, of heaps and of other exporters, on kernels that have them and on others."""

import ctypes
import errno
import fcntl
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from support.child import in_child
from support.errors import code_of
from support.ring import Ring

import iobmd
from iobmd import IOReturn, dmabuf
from iobmd.cli import main
from iobmd.memory import dma_buf
from iobmd.units import PAGE_SIZE

pytestmark = pytest.mark.needs("guest")
KIB, MIB = 1 << 10, 1 << 20
SET_NAME = 0x40086201  # DMA_BUF_SET_NAME_B
LIMIT = Path("/sys/module/udmabuf/parameters/size_limit_mb")
SHARED = {
    "small": (64 * KIB, {}),
    "pageable": (64 * KIB, {"wired": False}),
    "contiguous": (64 * KIB, {"contiguous": True}),
    "huge": (4 * MIB, {}),
    "huge and contiguous": (4 * MIB, {"contiguous": True}),
}


@contextmanager
def exported(descriptor: iobmd.IOMemoryDescriptor) -> Iterator[mmap.mmap]:
    """Yield the mapping of a dma-buf, through the page list of its exporter."""
    fd = dmabuf.export(descriptor)
    try:
        with mmap.mmap(fd, os.lseek(fd, 0, os.SEEK_END)) as view:
            yield view
    finally:
        os.close(fd)


@pytest.mark.needs("udmabuf")
@pytest.mark.parametrize("kind", SHARED)
def test_it_is_the_same_memory(kind: str, record_property) -> None:
    size, keywords = SHARED[kind]
    with iobmd.allocate(size, shared=True, **keywords) as buffer:
        buffer.writeBytes(size - 5, b"first")
        if buffer.wiring is iobmd.Wiring.PINNED and buffer.layout().huge and dma_buf.reads_huge_pages_wrongly():
            assert code_of(lambda: dmabuf.export(buffer)) == IOReturn.kIOReturnUnsupported
            record_property(f"dma-buf, {kind}", "refused: wrong pages")
            return
        with exported(buffer) as view:
            assert len(view) == size
            assert view[-5:] == b"first"
            view[:6] = b"second"
            assert buffer.readBytes(0, 6) == b"second"
            assert code_of(buffer.free) == IOReturn.kIOReturnBusy
        if buffer.wiring is iobmd.Wiring.PINNED:
            buffer.verify()
        record_property(f"dma-buf, {kind}", "works")
        buffer.free()


@pytest.mark.needs("udmabuf")
def test_parts_and_concatenations() -> None:
    with ExitStack() as stack:
        one, two = (stack.enter_context(iobmd.allocate(64 * KIB, shared=True)) for _ in range(2))
        part = stack.enter_context(iobmd.IOSubMemoryDescriptor.withSubRange(one, 8 * KIB, 8 * KIB, 3))
        both = stack.enter_context(iobmd.IOMultiMemoryDescriptor.withDescriptors([two, part], 3))
        one.writeBytes(8 * KIB, b"part")
        two.writeBytes(0, b"whole")
        with exported(both) as view:
            assert len(view) == 72 * KIB
            assert view[:5] == b"whole"
            assert view[64 * KIB :][:4] == b"part"
        odd = stack.enter_context(iobmd.IOSubMemoryDescriptor.withSubRange(one, 100, 8 * KIB, 3))
        assert code_of(lambda: dmabuf.export(odd)) == IOReturn.kIOReturnBadArgument


@pytest.mark.needs("udmabuf")
def test_memory_stays_in_use_until_the_last_reference_ends() -> None:
    """Descriptors, their copies in other processes, mappings; a closed one no longer counts."""
    with iobmd.allocate(64 * KIB, shared=True) as buffer:
        fd = dmabuf.export(buffer)
        view = mmap.mmap(fd, 64 * KIB)
        copy = os.dup(fd)
        for release in (lambda: os.close(fd), view.close, lambda: os.close(copy)):
            assert code_of(buffer.free) == IOReturn.kIOReturnBusy
            release()
        buffer.free()


@pytest.mark.needs("udmabuf")
def test_a_released_buffer_leaves_its_dma_buf_intact() -> None:
    with iobmd.allocate(64 * KIB, shared=True) as buffer:
        buffer.writeBytes(0, b"kept")
        fd = dmabuf.export(buffer)
    del buffer
    with mmap.mmap(fd, 64 * KIB) as view:
        os.close(fd)
        iobmd.allocate(64 * KIB, shared=True).free()
        assert view[:4] == b"kept"


@pytest.mark.needs("udmabuf")
@pytest.mark.parametrize("form", ["--all", "--all --each", "--csv"])
def test_names_are_shown_without_control_characters(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A process chooses the names of its dma-bufs, which the kernel shows as those of its mappings."""
    name = b"\x1b[2J\x85\r\nend"
    with iobmd.allocate(64 * KIB, shared=True) as buffer:
        fd = dmabuf.export(buffer)
        fcntl.ioctl(fd, SET_NAME, name + b"\0")
        with mmap.mmap(fd, 64 * KIB) as view:
            os.close(fd)
            view[:] = bytes(64 * KIB)
            assert b"/dmabuf:\x1b[2J" in Path("/proc/self/maps").read_bytes(), "the control"
            assert main(["pagemap", *form.split(), str(os.getpid())]) == 0
            shown = capsys.readouterr().out
            assert "dmabuf:\\x1b[2J" in shown
            assert all(line.isprintable() for line in shown.split("\n"))
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            existing = iobmd.IOMemoryDescriptor.withAddressRange(
                address, PAGE_SIZE, iobmd.kIODirectionInOut, os.getpid()
            )
            with pytest.raises(iobmd.IOReturnError) as caught:
                existing.prepare()
            assert "/dmabuf:\\x1b[2J" in str(caught.value)
            assert str(caught.value).isprintable()


@pytest.mark.needs("udmabuf")
def test_limits_are_named() -> None:
    before = LIMIT.read_text()
    LIMIT.write_text("1")
    try:
        with iobmd.allocate(3 * MIB // 2, shared=True) as buffer, pytest.raises(iobmd.NoResourcesError) as caught:
            dmabuf.export(buffer)
    finally:
        LIMIT.write_text(before)
    assert "size_limit_mb=1" in str(caught.value)
    assert "echo 2 >" in str(caught.value)


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Leave `count` numbers of descriptors free during the block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    used = []
    try:
        with suppress(OSError):
            while True:
                used.append(os.dup(1))
        for number in used[:count]:
            os.close(number)
        yield
    finally:
        for number in used[count:]:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.needs("udmabuf")
def test_no_descriptor_is_free() -> None:
    """Whichever descriptor is missing, the error names the limit, and no dma-buf remains: the memory can be freed."""

    def exported_with(free: int, memory: iobmd.IOMemoryDescriptor) -> IOReturn | None:
        with descriptors_left(free):
            try:
                os.close(dmabuf.export(memory))
            except iobmd.IOReturnError as error:
                return error.code
        return None

    def outcomes() -> list[IOReturn | None]:
        with ExitStack() as stack:
            parts = [stack.enter_context(iobmd.allocate(64 * KIB, shared=True)) for _ in range(3)]
            whole = stack.enter_context(iobmd.IOMultiMemoryDescriptor.withDescriptors(parts, 3))
            return [exported_with(free, whole) for free in range(6)]

    found = in_child(outcomes)
    assert found[0] == IOReturn.kIOReturnNoResources
    assert found[-1] is None
    assert set(found) == {IOReturn.kIOReturnNoResources, None}


@pytest.mark.needs("udmabuf")
def test_attached_memory() -> None:
    with iobmd.allocate(64 * KIB, shared=True) as buffer:
        fd = dmabuf.export(buffer)
        with dmabuf.attach(fd, "inout") as attached:
            os.close(fd)
            assert attached.getLength() == 64 * KIB
            buffer.writeBytes(100, b"there")
            assert attached.readBytes(100, 5) == b"there"
            attached.prepare()
            attached.prepare()
            with attached.map() as mapped, memoryview(mapped) as view:
                view[:4] = b"back"
            attached.complete()
            attached.complete()
            assert buffer.readBytes(0, 4) == b"back"
            assert code_of(attached.segments) == IOReturn.kIOReturnUnsupported
            assert code_of(attached.getPageCounts) == IOReturn.kIOReturnUnsupported
            again = dmabuf.export(attached)
            with dmabuf.attach(again, iobmd.IOOptionBits.kIODirectionIn) as other:
                os.close(again)
                assert other.readBytes(0, 4) == b"back"
        buffer.free()


@pytest.mark.needs("udmabuf")
def test_files_are_read_into_it_but_not_by_fixed_buffers(tmp_path: Path) -> None:
    """The mapping of a dma-buf has no pages that io_uring could pin (VM_PFNMAP)."""
    (tmp_path / "file").write_bytes(b"content")
    with iobmd.allocate(64 * KIB, shared=True) as buffer:
        fd = dmabuf.export(buffer)
        with dmabuf.attach(fd, "inout") as attached, attached.map() as mapped, memoryview(mapped) as view:
            os.close(fd)
            with Ring() as ring, pytest.raises(OSError, match="Bad address"):
                ring.register([(mapped.getAddress(), 64 * KIB)])
            with (tmp_path / "file").open("rb", buffering=0) as file:
                assert file.readinto(view) == 7
            assert buffer.readBytes(0, 7) == b"content"


def test_heaps(record_property) -> None:
    if not Path("/dev/dma_heap/system").exists():
        assert code_of(lambda: dmabuf.allocate(PAGE_SIZE)) == IOReturn.kIOReturnUnsupported
        record_property("dma-buf of a heap", "no")
        return
    with dmabuf.allocate(MIB - 100) as memory:
        assert memory.getLength() == MIB
        assert memory.readBytes(0, MIB) == bytes(MIB)
        memory.writeBytes(MIB - 3, b"end")
        fd = dmabuf.export(memory)
        with mmap.mmap(fd, MIB) as view:
            assert view[-3:] == b"end"
        os.close(fd)
    assert code_of(lambda: dmabuf.allocate(1 << 40)) == IOReturn.kIOReturnNoMemory
    assert code_of(lambda: dmabuf.allocate(PAGE_SIZE, heap="none")) == IOReturn.kIOReturnUnsupported
    record_property("dma-buf of a heap", "works")


def test_a_kernel_without_udmabuf_is_named(record_property) -> None:
    if Path("/dev/udmabuf").exists():
        pytest.skip("this kernel has udmabuf: the other tests use it")
    with iobmd.allocate(64 * KIB, shared=True) as buffer, pytest.raises(iobmd.UnsupportedError) as caught:
        dmabuf.export(buffer)
    assert caught.value.errno == errno.ENOENT or "CONFIG_UDMABUF" in str(caught.value)
    record_property("dma-buf, small", "no udmabuf")
