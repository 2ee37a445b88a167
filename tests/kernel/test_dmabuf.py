"""dma-bufs: what is refused, on any host. Guests have the devices (tests/vm/test_dmabuf.py)."""

import os
import resource
from collections.abc import Callable

import pytest
from support.child import in_child
from support.errors import code_of

import iobmd
from iobmd import IOReturn, dmabuf
from iobmd.memory import dma_buf
from iobmd.units import PAGE_SIZE

MIB = 1 << 20


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: iobmd.allocate(PAGE_SIZE), "private memory"),
        (lambda: iobmd.allocate(PAGE_SIZE, wired=False, shared=True, purgeable=True), "purgeable memory"),
        pytest.param(
            lambda: iobmd.allocate(4 * MIB, wired=False, shared=True), "not sealed", marks=pytest.mark.needs("root")
        ),
    ],
    ids=["private", "purgeable", "pageable"],
)
@pytest.mark.usefixtures("nothing_left")
def test_memory_that_cannot_be_exported(make: Callable[[], iobmd.IOBufferMemoryDescriptor], words: str) -> None:
    with make() as buffer, pytest.raises(iobmd.UnsupportedError, match=words):
        dmabuf.export(buffer)


def test_a_kernel_without_udmabuf_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dma_buf, "_UDMABUF", "/dev/nonexistent")
    with (
        iobmd.allocate(PAGE_SIZE, shared=True) as buffer,
        pytest.raises(iobmd.UnsupportedError, match="CONFIG_UDMABUF"),
    ):
        dmabuf.export(buffer)


@pytest.mark.usefixtures("nothing_left")
def test_descriptors_that_are_no_dma_bufs() -> None:
    fd = os.memfd_create("other")
    try:
        for wrong in (fd, -1, 1 << 20):
            assert code_of(lambda wrong=wrong: dmabuf.attach(wrong, "inout")) == IOReturn.kIOReturnBadArgument
        for wrong in ("both", 17, ""):
            with pytest.raises(iobmd.BadArgumentError, match="direction"):
                dmabuf.attach(fd, wrong)  # type: ignore[arg-type]
    finally:
        os.close(fd)


def test_no_descriptor_is_free_to_examine_one() -> None:
    def refused() -> IOReturn:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        return code_of(lambda: dmabuf.attach(0, "inout"))

    assert in_child(refused) == IOReturn.kIOReturnNoResources


@pytest.mark.needs("numpy")
@pytest.mark.parametrize(("kind", "size"), [("uint8", 200), ("int16", 32767), ("int32", (1 << 31) - 1)])
def test_a_narrow_size(kind: str, size: int) -> None:
    """The size of whole pages does not fit into the type. The heap may be missing, but the size is positive."""
    import numpy

    with pytest.raises(iobmd.UnsupportedError, match="no dma-buf heap"):
        dmabuf.allocate(getattr(numpy, kind)(size), heap="missing")


@pytest.mark.parametrize("heap", ["..", "a/b", ""])
def test_a_heap_is_the_name_of_a_file(heap: str) -> None:
    with pytest.raises(iobmd.BadArgumentError, match="name of a heap"):
        dmabuf.allocate(PAGE_SIZE, heap=heap)


def test_a_heap_that_does_not_exist() -> None:
    with pytest.raises(iobmd.UnsupportedError, match="no dma-buf heap 'nonexistent'"):
        dmabuf.allocate(PAGE_SIZE, heap="nonexistent")
    assert code_of(lambda: dmabuf.allocate(0)) == IOReturn.kIOReturnBadArgument
