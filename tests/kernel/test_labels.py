"""Tags, which the kernel shows as names of mappings, and contexts."""

import gc
import os
import weakref
from pathlib import Path

import pytest
from support import kernel
from support.child import sleeping
from support.errors import code_of
from support.targets import need_ptrace

import iobmd
from iobmd import IOBufferMemoryDescriptor, IOMapOptions, IOMemoryDescriptor, IOReturn, kernel_task
from iobmd.cli import main

PAGE = kernel.PAGE
SHARED, PAGEABLE = iobmd.kIOMemoryKernelUserShared | iobmd.kIODirectionInOut, iobmd.kIOMemoryPageable
make = IOBufferMemoryDescriptor.inTaskWithOptions


def name_of(address: int, pid: int | str = "self") -> str:
    """Return the kernel's name of the mapping at an address."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, _perms, _offset, _device, _inode, *name = line.split(maxsplit=5)
        start, end = (int(text, 16) for text in span.split("-"))
        if start <= address < end:
            return name[0].removesuffix(" (deleted)") if name else ""
    return "nothing"


@pytest.mark.usefixtures("nothing_left")
def test_tag_names_shared_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with make(kernel_task, SHARED, PAGE, 1, 7, 8) as buffer, make(kernel_task, SHARED, PAGE, 1, 0, 9) as other:
        assert name_of(buffer.getBytesNoCopy()) == "/memfd:iobmd:7"
        assert name_of(other.getBytesNoCopy()) == "/memfd:iobmd:9"
        with buffer.map(IOMapOptions.kIOMapUnique) as mapped:
            assert name_of(mapped.getAddress()) == "/memfd:iobmd:7"
        assert main(["pagemap", str(os.getpid())]) == 0
        output = capsys.readouterr().out
        assert "memfd:iobmd:7" in output
        assert "memfd:iobmd:9" in output
    with make(kernel_task, SHARED, PAGE) as buffer:
        assert name_of(buffer.getBytesNoCopy()) == "/memfd:iobmd"


@pytest.mark.needs("root")
@pytest.mark.parametrize("size", [2 << 20, 4 << 20])
def test_tag_names_memory_in_huge_pages(size: int) -> None:
    contiguous = iobmd.kIOMemoryPhysicallyContiguous
    for options in (SHARED, SHARED | contiguous):
        with make(kernel_task, options, size, 1, 12, 0) as buffer:
            assert "iobmd:12" in name_of(buffer.getBytesNoCopy())


@pytest.mark.needs("root")
@pytest.mark.usefixtures("nothing_left")
def test_tag_of_a_user_task() -> None:
    need_ptrace()
    with (
        sleeping() as program,
        make(program.pid, SHARED, PAGE, 1, 7, 8) as buffer,
        make(program.pid, SHARED, PAGE, 1, 7) as other,
    ):
        assert name_of(buffer.getBytesNoCopy(), program.pid) == "/memfd:iobmd:8"
        assert name_of(other.getBytesNoCopy(), program.pid) == "/memfd:iobmd:7"
    with make(None, SHARED, PAGE, 1, 7, 8) as unmapped, unmapped.map() as mapped:
        assert name_of(mapped.getAddress()) == "/memfd:iobmd:7"


@pytest.mark.needs("area_names")
@pytest.mark.parametrize("options", [0, PAGEABLE])
def test_tag_names_private_memory(options: int) -> None:
    with make(kernel_task, options, PAGE, 1, 7, 8) as buffer:
        assert name_of(buffer.getBytesNoCopy()) == "[anon:iobmd:7]"


@pytest.mark.usefixtures("nothing_left")
def test_private_memory_is_had_where_it_has_no_name() -> None:
    with make(kernel_task, PAGEABLE, PAGE, 1, 7, 8) as buffer:
        assert buffer.vm_tags == (7, 8)
        assert (buffer.getVMTag(kernel_task), buffer.getVMTag(1)) == (7, 8)
        assert name_of(buffer.getBytesNoCopy()) in ("", "[anon:iobmd:7]")


def test_tags_given_before_it_is_made() -> None:
    buffer = IOBufferMemoryDescriptor()
    buffer.setVMTags(21, 0)
    buffer.initWithPhysicalMask(kernel_task, SHARED, PAGE, 1, 0)
    assert name_of(buffer.getBytesNoCopy()) == "/memfd:iobmd:21"
    buffer.free()


@pytest.mark.parametrize("tags", [(-1, 0), (0, -1), (1 << 32, 0), (0, 1 << 32)])
def test_bad_tags(tags: tuple[int, int]) -> None:
    assert code_of(lambda: make(kernel_task, SHARED, PAGE, 1, *tags)) == IOReturn.kIOReturnBadArgument


def test_tag_of_a_descriptor() -> None:
    with make(kernel_task, SHARED, PAGE, 1, 7, 8) as buffer:
        assert buffer.getTag() == 0, "the tag belongs to the caller, and does not change the tags of mappings"
        buffer.setTag(1 << 40)
        assert buffer.getTag() == 1 << 40
        assert buffer.getFlags() == SHARED
        buffer.setDirection(iobmd.kIODirectionIn)
        assert buffer.getFlags() == iobmd.kIOMemoryKernelUserShared | iobmd.kIODirectionIn


def test_context() -> None:
    """As in IOKit's IOMDContextTest, the context is retained, replaced and released."""

    class Context:
        pass

    first, second = Context(), Context()
    known = [weakref.ref(first), weakref.ref(second)]
    with make(None, SHARED | PAGEABLE, 13 * PAGE) as buffer:
        assert buffer.copyContext() is None
        buffer.setContext(None)
        assert buffer.copyContext() is None
        buffer.setContext(first)
        del first
        gc.collect()
        assert buffer.copyContext() is known[0]()
        buffer.setContext(second)
        gc.collect()
        assert known[0]() is None
        assert buffer.copyContext() is second
        buffer.setContext(None)
        assert buffer.copyContext() is None
    with IOMemoryDescriptor.withAddressRange(0, 0, 0, kernel_task) as existing:
        existing.setContext(5)
        assert existing.copyContext() == 5
