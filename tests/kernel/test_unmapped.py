"""Memory that the program itself has unmapped or replaced: `free` does not touch it, `verify` reports it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from typing import TYPE_CHECKING, Any

import pytest
from support import rawmemory
from support.child import NOBODY, in_child
from support.namespaces import in_namespaces, mount_proc, unmount_proc

import iobmd
from iobmd import IOMemoryDescriptor, IOReturn, IOReturnError, Wiring, kernel_task, procfs
from iobmd._native.mapping import Mapping
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iobmd import IOBufferMemoryDescriptor

PAGES = 8
SIZE = PAGES * PAGE_SIZE
MAP_FIXED = 0x10
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def put(address: int, size: int, protection: int, flags: int, fd: int = -1) -> None:
    """Map other memory there, as the program's allocator would."""
    assert libc.mmap(address, size, protection, flags | MAP_FIXED, fd, 0) == address


@contextlib.contextmanager
def filled_memfd(size: int) -> Iterator[int]:
    with rawmemory.memfd(size) as fd:
        os.pwrite(fd, b"own" * (size // 3), 0)
        yield fd


def shared_object(address: int, size: int) -> None:
    with filled_memfd(size) as fd:
        put(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd)


def file_copy(address: int, size: int) -> None:
    with filled_memfd(size) as fd:
        put(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd)


def reservation(address: int, size: int) -> None:
    put(address, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def read_only(address: int, size: int) -> None:
    put(address, size, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def private(address: int, size: int) -> None:
    """Map memory that looks exactly like private memory of iobmd."""
    put(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ctypes.memset(address, 0x6F, size)


OTHER_KINDS = [shared_object, file_copy, reservation, read_only]
BUFFERS: dict[str, dict[str, Any]] = {
    "private, wired": {},
    "private, pageable": {"wired": False},
    "shared, wired": {"shared": True},
    "shared, pageable": {"shared": True, "wired": False},
}


def areas(address: int, size: int) -> list[tuple[int, int, str, int]]:
    """Return the mappings in a range, limited to it."""
    end = address + size
    found = procfs.areas("self", address, end)
    return [(max(area.start, address), min(area.end, end), area.perms, area.inode) for area in found]


def mapped(address: int, size: int) -> list[int]:
    """Return the numbers of the pages of a range that are mapped, by mincore(2)."""
    vector = (ctypes.c_ubyte * 1)()
    return [
        page
        for page in range(size // PAGE_SIZE)
        if libc.mincore(ctypes.c_void_p(address + page * PAGE_SIZE), ctypes.c_size_t(PAGE_SIZE), vector) == 0
    ]


def free(buffer: IOBufferMemoryDescriptor) -> None:
    """Free a buffer and its memory, which would be kept for the next buffer if it is private."""
    buffer.free()
    iobmd.trim()


def check_left_alone(buffer: IOBufferMemoryDescriptor, replace: Callable[[int, int], None]) -> None:
    """The program has unmapped three of eight pages, and replaced two of these."""
    address = buffer.getBytesNoCopy()
    rawmemory.unmap(address + 3 * PAGE_SIZE, 3 * PAGE_SIZE)
    replace(address + 4 * PAGE_SIZE, 2 * PAGE_SIZE)
    before = areas(address + 4 * PAGE_SIZE, 2 * PAGE_SIZE)
    readable = before[0][2][0] == "r"
    contents = ctypes.string_at(address + 4 * PAGE_SIZE, 2 * PAGE_SIZE) if readable else b""
    buffer.free()
    assert areas(address + 4 * PAGE_SIZE, 2 * PAGE_SIZE) == before
    assert mapped(address, SIZE) == [4, 5]
    if readable:
        assert ctypes.string_at(address + 4 * PAGE_SIZE, 2 * PAGE_SIZE) == contents
    rawmemory.unmap(address + 4 * PAGE_SIZE, 2 * PAGE_SIZE)


@pytest.mark.parametrize("replace", OTHER_KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("kind", BUFFERS)
def test_free_leaves_other_memory_alone(kind: str, replace: Callable[[int, int], None]) -> None:
    """Each test runs in a child, because other threads of the interpreter could map memory in the holes."""
    in_child(lambda: check_left_alone(iobmd.allocate(SIZE, **BUFFERS[kind]), replace))


@pytest.mark.parametrize("replace", OTHER_KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("kind", BUFFERS)
def test_where_the_kernel_does_not_answer_for_one_area(kind: str, replace: Callable[[int, int], None]) -> None:
    """Before Linux 6.11, and behind a filter, maps is searched."""
    in_child(lambda: check_left_alone(iobmd.allocate(SIZE, **BUFFERS[kind]), replace), deny={"ioctl": errno.ENOTTY})


@pytest.mark.needs("frames")
def test_pinned_memory_is_told_from_what_looks_the_same() -> None:
    """Replaced memory is detected by its frames."""

    def work() -> None:
        buffer = iobmd.allocate(SIZE)
        assert buffer.wiring is Wiring.PINNED
        check_left_alone(buffer, private)

    in_child(work)


@pytest.mark.parametrize("kind", ["shared, wired", "shared, pageable"])
def test_shared_memory_is_told_from_private(kind: str) -> None:
    in_child(lambda: check_left_alone(iobmd.allocate(SIZE, **BUFFERS[kind]), private))


@pytest.mark.needs("root")
def test_as_an_ordinary_user() -> None:
    """Replaced memory whose frames are hidden."""
    for replace in OTHER_KINDS:
        for kind in BUFFERS.values():
            in_child(lambda r=replace, k=kind: check_left_alone(iobmd.allocate(SIZE, **k), r), uid=NOBODY)


def test_maps_leave_other_memory_alone() -> None:
    """Guarded maps, including their guard pages, and redirected maps."""

    def work() -> None:
        with iobmd.allocate(SIZE, shared=True) as buffer, iobmd.allocate(SIZE, shared=True) as other:
            guarded = buffer.createMappingInTask(kernel_task, 0, 0x40000001)  # kIOMapGuardedSmall | kIOMapAnywhere
            address = guarded.getAddress()
            assert mapped(address - PAGE_SIZE, SIZE + 2 * PAGE_SIZE) == list(range(PAGES + 2))
            read_only(address + PAGE_SIZE, PAGE_SIZE)
            guarded.unmap()
            assert mapped(address - PAGE_SIZE, SIZE + 2 * PAGE_SIZE) == [2]
            rawmemory.unmap(address + PAGE_SIZE, PAGE_SIZE)
            moved = buffer.createMappingInTask(kernel_task, 0, 0x04000001)  # kIOMapUnique | kIOMapAnywhere
            moved.redirect(other, 0)
            address = moved.getAddress()
            moved.unmap()
            assert not mapped(address, SIZE)

    in_child(work)


def test_memory_that_goes_with_its_last_view() -> None:
    """Freed by the garbage collector, which cannot raise."""

    def work() -> None:
        mapping = Mapping.anonymous(SIZE, PAGE_SIZE)
        address = mapping.address
        shared_object(address + PAGE_SIZE, PAGE_SIZE)
        del mapping
        assert mapped(address, SIZE) == [1]

    in_child(work)


@pytest.mark.parametrize("kind", BUFFERS)
def test_untouched_memory_is_unmapped(kind: str) -> None:
    """All memory of an unchanged buffer is unmapped, in a forked child as well."""

    def work() -> None:
        buffer = iobmd.allocate(SIZE, **BUFFERS[kind])
        address = buffer.getBytesNoCopy()
        in_child(lambda: (free(buffer), mapped(address, SIZE)))
        assert in_child(lambda: (free(buffer), mapped(address, SIZE))[1]) == []
        free(buffer)
        assert mapped(address, SIZE) == []

    in_child(work)


@pytest.mark.needs("frames")
def test_contiguous_memory_is_unmapped() -> None:
    def work() -> None:
        for size in (64 << 10, 2 << 20):
            for shared in (False, True):
                buffer = iobmd.allocate(size, contiguous=True, shared=shared)
                address = buffer.getBytesNoCopy()
                free(buffer)
                assert mapped(address, size) == []

    in_child(work)


@pytest.mark.needs("root")
@pytest.mark.parametrize("kind", BUFFERS)
def test_without_proc(kind: str) -> None:
    """Without /proc mappings cannot be inspected, and the whole range is unmapped."""

    def work() -> None:
        buffer = iobmd.allocate(SIZE, **BUFFERS[kind])
        address = buffer.getBytesNoCopy()
        buffer.free()
        assert mapped(address, SIZE) == []

    in_namespaces(work, proc=unmount_proc)


def lost(descriptor: IOMemoryDescriptor) -> tuple[IOReturn, int | None, str]:
    with pytest.raises(IOReturnError) as caught:
        descriptor.verify()
    return caught.value.code, caught.value.address, str(caught.value)


def check_reported(buffer: IOBufferMemoryDescriptor, replace: Callable[[int, int], None] | None) -> None:
    address = buffer.getBytesNoCopy()
    rawmemory.unmap(address + 6 * PAGE_SIZE, PAGE_SIZE)
    first = address + 6 * PAGE_SIZE
    code, where, message = lost(buffer)
    assert (code, where) == (IOReturn.kIOReturnVMError, first)
    assert "unmapped it" in message
    if replace:
        first = address + 2 * PAGE_SIZE
        replace(first, 2 * PAGE_SIZE)
        code, where, message = lost(buffer)
        assert (code, where) == (IOReturn.kIOReturnVMError, first)
        assert "replaced" in message or "other memory is mapped" in message
    buffer.free()


@pytest.mark.parametrize("replace", [None, *OTHER_KINDS], ids=lambda kind: kind.__name__ if kind else "unmapped")
@pytest.mark.parametrize("kind", BUFFERS)
def test_verify_reports_the_first_page_that_is_gone(kind: str, replace: Callable[[int, int], None] | None) -> None:
    in_child(lambda: check_reported(iobmd.allocate(SIZE, **BUFFERS[kind]), replace))


@pytest.mark.needs("frames")
def test_verify_tells_pinned_memory_from_what_looks_the_same() -> None:
    in_child(lambda: check_reported(iobmd.allocate(SIZE), private))


@pytest.mark.needs("root")
def test_verify_as_an_ordinary_user() -> None:
    for kind in BUFFERS.values():
        in_child(lambda k=kind: check_reported(iobmd.allocate(SIZE, **k), read_only), uid=NOBODY)


def test_verify_of_existing_memory() -> None:
    def work() -> None:
        memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = b"x" * SIZE
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        existing = IOMemoryDescriptor.withAddressRange(address + 100, SIZE - 200, 3, kernel_task)
        existing.prepare()
        rawmemory.unmap(address + 5 * PAGE_SIZE, PAGE_SIZE)
        assert lost(existing)[:2] == (IOReturn.kIOReturnVMError, address + 5 * PAGE_SIZE)
        existing.complete()

    in_child(work)


@pytest.mark.needs("root")
@pytest.mark.parametrize("kind", BUFFERS)
def test_in_a_child_with_the_same_pid(kind: str) -> None:
    """Init of a pid namespace, whose parent is init of another: it must not read the mappings of its parent."""

    def parent() -> None:
        mount_proc()
        buffer = iobmd.allocate(SIZE, **BUFFERS[kind])
        address = buffer.getBytesNoCopy()
        iobmd.allocate(SIZE, **BUFFERS[kind]).free()  # opens descriptors that remain open

        def child() -> None:
            assert os.getpid() == 1
            mount_proc()
            read_only(address + PAGE_SIZE, PAGE_SIZE)
            buffer.free()
            assert mapped(address, SIZE) == [1]

        in_namespaces(child)
        free(buffer)
        assert mapped(address, SIZE) == []

    in_namespaces(parent)
