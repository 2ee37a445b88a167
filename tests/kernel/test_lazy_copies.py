"""Lazy copies of memory of this process."""

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import kernel, lazy, rawmemory
from support.child import in_child
from support.errors import error_of, refusal
from support.lazy import MIB, Source
from support.targets import need_program

import iobmd
from iobmd import IOBufferMemoryDescriptor, IOOptionBits, IOReturn, kernel_task
from iobmd._native import mman

pytestmark = pytest.mark.needs("lazy_copies")
PAGE = mmap.PAGESIZE
SIZE = 48 * MIB
CAP_SYS_PTRACE = 1 << 19
PAGEABLE = int(IOOptionBits.kIOMemoryPageable) | 3


@pytest.fixture
def source() -> Iterator[Source]:
    with Source(SIZE) as made:
        yield made


def byte_at(address: int) -> bytes:
    return bytes(ctypes.c_char.from_address(address).value)


def nothing_is_left() -> bool:
    return lazy.fetcher_thread() is None and not lazy.snapshots(os.getpid())


def test_the_contents_are_those_of_the_call(source: Source) -> None:
    with source.copied_while(lazy.is_incomplete) as copy:
        source.buffer.writeBytes(0, bytes(SIZE))
        assert copy.readBytes(SIZE - 3 * PAGE, PAGE) == source.contents[-3 * PAGE : -2 * PAGE]
        copy.fetch()
        assert copy.fetched == SIZE
        assert copy.readBytes(0, SIZE) == source.contents
        assert not source.buffer.readBytes(0, SIZE).strip(b"\0")
        assert nothing_is_left()


def test_pages_are_absent_until_they_are_fetched(source: Source) -> None:
    with source.copied_while(lambda copy: lazy.absent(copy) > SIZE // PAGE // 2) as copy:
        assert copy.fetched < SIZE
        copy.fetch()
        assert lazy.absent(copy) == 0


def test_a_touched_page_is_fetched_first(source: Source) -> None:
    """The background fetch begins at the start, and the last block follows at its end."""

    def is_alone(copy: IOBufferMemoryDescriptor) -> bool:
        end = copy.getBytesNoCopy() + SIZE
        value = byte_at(end - MIB)
        found = kernel.present(end - MIB, PAGE), kernel.present(end - MIB // 2, PAGE)
        assert value == source.contents[-MIB : -MIB + 1]
        return found == (1, 0)

    source.copied_while(is_alone).free()


def test_a_copy_is_as_sparse_as_its_source() -> None:
    with iobmd.allocate(SIZE, wired=False) as sparse:
        address = sparse.getBytesNoCopy()
        mman.advise(address, SIZE, mman.MADV_NOHUGEPAGE)
        for offset in range(0, SIZE, MIB):
            sparse.writeBytes(offset, b"x")
        sparse.writeBytes(0, b"y" * 2 * MIB)
        before = kernel.present(address, SIZE)
        assert before == 512 + SIZE // MIB - 2
        with iobmd.copy(os.getpid(), address, SIZE, wired=False, lazy=True) as copy:
            copy.fetch()
            assert kernel.present(copy.getBytesNoCopy(), SIZE) == before
            assert copy.readBytes(0, SIZE) == sparse.readBytes(0, SIZE)


def test_any_source_address_and_size() -> None:
    with Source(8 * MIB) as whole:
        start, size = 12345, 5 * MIB + 777
        with iobmd.copy(os.getpid(), whole.address + start, size, wired=False, lazy=True) as copy:
            assert copy.readBytes(0, size) == whole.contents[start : start + size]
            copy.fetch()
            assert copy.fetched == size
            assert copy.readBytes(0, size) == whole.contents[start : start + size]


def test_the_first_access_is_to_the_first_page(source: Source) -> None:
    """A fault there may be reported before the background fetch begins, or after."""
    for _ in range(20):
        with source.copied() as copy, memoryview(copy) as view:
            assert view[:PAGE] == source.contents[:PAGE]


def test_views_in_order_backwards_and_by_threads(source: Source) -> None:
    with source.copied() as copy, memoryview(copy) as view:
        assert view[:] == source.contents
    with source.copied() as copy, memoryview(copy) as view:
        for offset in range(SIZE - MIB, -1, -MIB):
            assert view[offset : offset + MIB] == source.contents[offset : offset + MIB]
    with source.copied() as copy, memoryview(copy) as view:
        differing: list[int] = []

        def compare(first: int) -> None:
            for offset in range(first * PAGE, SIZE, 64 * PAGE):
                if view[offset : offset + PAGE] != source.contents[offset : offset + PAGE]:
                    differing.append(offset)

        threads = [threading.Thread(target=compare, args=(first,)) for first in range(0, 64, 16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not differing


def test_system_calls_read_and_write_absent_pages(source: Source) -> None:
    with source.copied() as copy, memoryview(copy) as view:
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb", buffering=0) as writer:
            last = SIZE - 2 * PAGE
            writer.write(view[last : last + PAGE])
            assert reader.read(PAGE) == source.contents[last : last + PAGE]
            writer.write(b"new" * 100)
            assert os.readv(reader.fileno(), [view[last - PAGE : last - PAGE + 300]]) == 300
        assert view[last - PAGE : last] == b"new" * 100 + source.contents[last - PAGE + 300 : last]


def test_what_is_written_to_the_copy_stays(source: Source) -> None:
    with source.copied() as copy:
        copy.writeBytes(SIZE // 2 + 5, b"mine")
        memoryview(copy)[SIZE - 1 :] = b"m"
        copy.fetch()
        expected = bytearray(source.contents)
        expected[SIZE // 2 + 5 : SIZE // 2 + 9], expected[-1:] = b"mine", b"m"
        assert copy.readBytes(0, SIZE) == expected
        assert source.buffer.readBytes(0, SIZE) == source.contents


def test_pages_that_the_program_dropped_are_zero(source: Source) -> None:
    with source.copied() as copy:
        copy.readBytes(SIZE - MIB, MIB)
        mman.advise(copy.getBytesNoCopy() + SIZE - MIB, MIB, mman.MADV_DONTNEED)
        assert byte_at(copy.getBytesNoCopy() + SIZE - 1) == b"\0"
        copy.fetch()
        assert copy.readBytes(0, SIZE) == source.contents[:-MIB] + bytes(MIB)


@pytest.mark.needs("memlock")
def test_prepare_fetches_all(source: Source) -> None:
    with Source(2 * MIB) as small, small.copied() as copy:
        copy.prepare()
        assert kernel.present(copy.getBytesNoCopy(), 2 * MIB) == 512
        assert copy.readBytes(0, 2 * MIB) == small.contents
        copy.complete()


def test_maps_and_parts(source: Source) -> None:
    with source.copied() as copy:
        part = iobmd.IOSubMemoryDescriptor.withSubRange(copy, SIZE - 2 * PAGE, PAGE, 3)
        assert part.readBytes(0, PAGE) == source.contents[-2 * PAGE : -PAGE]
        with copy.map() as mapped:
            assert memoryview(mapped)[SIZE - PAGE :] == source.contents[-PAGE:]
        part.free()


def test_a_copy_of_a_copy(source: Source) -> None:
    with (
        source.copied() as first,
        iobmd.copy(os.getpid(), first.getBytesNoCopy(), SIZE, wired=False, lazy=True) as second,
    ):
        first.writeBytes(0, bytes(MIB))
        assert second.readBytes(0, SIZE) == source.contents


def test_an_early_end_leaves_nothing(source: Source) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    copy = source.copied_while(lambda _copy: bool(lazy.snapshots(os.getpid())))
    address = copy.getBytesNoCopy()
    copy.free()
    assert lazy.is_soon(nothing_is_left)
    assert not kernel.smaps(address)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_an_abandoned_copy_leaves_nothing(source: Source) -> None:
    copy = source.copied_while(lambda _copy: bool(lazy.snapshots(os.getpid())))
    address = copy.getBytesNoCopy()
    with pytest.warns(ResourceWarning, match="never freed"):
        del copy
    assert lazy.is_soon(nothing_is_left)
    assert not kernel.smaps(address)


def kill_snapshot(copy: IOBufferMemoryDescriptor) -> bool:
    """Kill the snapshot of a copy; return whether that was before the end of the fetch."""
    for pid in lazy.snapshots(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    with iobmd_errors():
        copy.fetch()
    return copy.fetched < SIZE


class iobmd_errors:  # noqa: N801
    """Suppress IOReturnError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, iobmd.IOReturnError)


def test_a_killed_snapshot(source: Source) -> None:
    with source.copied_while(kill_snapshot) as copy:
        error = error_of(copy.fetch)
        assert error.code == IOReturn.kIOReturnVMError
        address = copy.getBytesNoCopy()
        assert error.address is not None
        fetched = error.address - address
        assert 0 <= fetched < SIZE
        assert error_of(lambda: copy.readBytes(fetched, 1)).code == IOReturn.kIOReturnVMError
        assert error_of(lambda: copy.writeBytes(0, bytes(SIZE))).code == IOReturn.kIOReturnVMError
        assert copy.readBytes(0, fetched) == source.contents[:fetched]
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            byte_at(address + fetched)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] & 0x7F in (signal.SIGBUS, signal.SIGSEGV)
        with Path("/proc/self/mem").open("rb", buffering=0) as memory, pytest.raises(OSError, match="error"):
            os.pread(memory.fileno(), 1, address + fetched)
        assert nothing_is_left()


def test_a_forked_child(source: Source) -> None:
    def refused(copy: IOBufferMemoryDescriptor) -> bool:
        try:
            in_child(lambda: copy.readBytes(SIZE - 1, 1))
        except iobmd.IOReturnError as error:
            assert error.code == IOReturn.kIOReturnNotOpen
            assert "fetch()" in str(error)
            return True
        return False

    with source.copied_while(refused) as copy:
        copy.fetch()
        assert in_child(lambda: copy.readBytes(0, SIZE)) == source.contents


def test_a_forked_child_unmaps_nothing_of_its_own(source: Source) -> None:
    def check(copy: IOBufferMemoryDescriptor) -> bool:
        address = copy.getBytesNoCopy()

        def reuse() -> bool:
            if kernel.smaps(address):
                return False  # it was complete
            rawmemory.map_memory(SIZE, at=address)
            copy.free()
            return byte_at(address) == b"\0"

        return bool(in_child(reuse))

    source.copied_while(check).free()


PROGRAM = """
import os, sys, iobmd
from support.lazy import Source, MIB
from support.targets import children
source = Source(128 * MIB)
copy = source.copied()
print(children(os.getpid()), flush=True)
if sys.argv[1] == "exec":
    os.execv("/bin/sh", ["sh", "-c", "read line"])
if sys.argv[1] == "exit":
    os._exit(0)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["kill", "exec", "exit"])
def test_the_end_of_the_program_leaves_no_process(end: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        ) as program:
            assert program.stdout
            found = [int(pid) for pid in program.stdout.readline().split()]
            if end == "kill":
                program.kill()
            # The program that was executed does not know the child, and its zombie remains until that program exits.
            gone = [lazy.is_soon(lambda pid=pid: lazy.has_no_memory(pid)) for pid in found]
            program.kill()
        assert all(gone)
        if found:
            return
    raise AssertionError("each copy was fetched before it was inspected")


def test_an_execve_before_the_snapshot_has_begun() -> None:
    """It ends itself: the signal that would end it with its maker was not yet requested (strace delays that call)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    delayed = [need_program("strace"), "-fqq", "-o", "/dev/null", "-e", "inject=prctl:delay_enter=1000000"]
    command = [*delayed, sys.executable, "-c", PROGRAM, "exec"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as program:
        assert program.stdout
        found = [int(pid) for pid in program.stdout.readline().split()]
        assert found
        assert all(lazy.is_soon(lambda pid=pid: lazy.has_no_memory(pid)) for pid in found)
        assert program.stdin
        program.stdin.close()


@pytest.mark.parametrize("keywords", [{"wired": True}, {"purgeable": True}, {"shared": True}, {"contiguous": True}])
def test_what_cannot_be_lazy_is_refused(keywords: dict[str, bool]) -> None:
    with Source(MIB) as source:
        code, message = refusal(
            lambda: iobmd.copy(os.getpid(), source.address, MIB, **{"wired": False, **keywords}, lazy=True)
        )
        assert code == IOReturn.kIOReturnBadArgument
        assert next(iter(keywords)) in message or "pageable" in message


def test_lazy_must_be_true_or_false() -> None:
    with Source(MIB) as source:
        with pytest.raises(TypeError, match="lazy"):
            iobmd.copy(os.getpid(), source.address, MIB, wired=False, lazy="no")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="lazy"):
            lazy: Any = 1.5
            IOBufferMemoryDescriptor.withCopy(kernel_task, PAGEABLE, kernel_task, source.address, MIB, lazy=lazy)


def test_memory_in_no_task_is_refused() -> None:
    with Source(MIB) as source:
        code, _ = refusal(
            lambda: IOBufferMemoryDescriptor.withCopy(None, PAGEABLE, kernel_task, source.address, MIB, lazy=True)
        )
        assert code == IOReturn.kIOReturnBadArgument


def advised(advice: int) -> bool:
    """Return whether a lazy copy of memory with an advice about forks is complete and right at once."""
    with Source(4 * MIB) as source:
        assert ctypes.CDLL(None).madvise(ctypes.c_void_p(source.address + MIB), ctypes.c_size_t(MIB), advice) == 0
        with source.copied() as copy:
            return copy.fetched == 4 * MIB and copy.readBytes(0, 4 * MIB) == source.contents


def test_memory_that_a_child_does_not_inherit_is_copied_at_once() -> None:
    assert advised(10)  # MADV_DONTFORK
    assert advised(18)  # MADV_WIPEONFORK


def test_shared_memory_is_copied_at_once() -> None:
    with iobmd.allocate(MIB, wired=False, shared=True) as shared:
        shared.writeBytes(0, b"a" * MIB)
        with iobmd.copy(os.getpid(), shared.getBytesNoCopy(), MIB, wired=False, lazy=True) as copy:
            assert copy.fetched == MIB
            shared.writeBytes(0, b"b" * MIB)
            assert copy.readBytes(0, MIB) == b"a" * MIB


def test_unmapped_memory_is_refused_as_by_an_eager_copy() -> None:
    address = rawmemory.map_memory(3 * PAGE)
    rawmemory.unmap(address + PAGE, PAGE)
    error = error_of(lambda: iobmd.copy(os.getpid(), address, 3 * PAGE, wired=False, lazy=True))
    assert (error.code, error.address) == (IOReturn.kIOReturnVMError, address + PAGE)
    rawmemory.unmap(address, 3 * PAGE)


def test_without_userfaultfd_the_copy_is_complete_at_once() -> None:
    def is_complete() -> bool:
        with Source(4 * MIB) as source, source.copied() as copy:
            return copy.fetched == 4 * MIB and copy.readBytes(0, 4 * MIB) == source.contents and nothing_is_left()

    assert in_child(is_complete, deny={"userfaultfd": errno.EPERM, "ioctl": errno.EPERM})


def test_without_privilege_views_are_exported_once_all_is_fetched() -> None:
    def is_exported() -> bool:
        with Source(8 * MIB) as source, source.copied() as copy:
            assert copy.readBytes(5 * MIB, 10) == source.contents[5 * MIB : 5 * MIB + 10]
            with memoryview(copy) as view, Path(os.devnull).open("wb", buffering=0) as sink:
                assert copy.fetched == 8 * MIB
                return sink.write(view) == 8 * MIB

    assert in_child(is_exported, uid=65534)
