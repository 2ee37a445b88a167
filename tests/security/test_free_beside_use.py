"""One thread frees memory while others use it: no byte reaches another file, and each refusal is a named error."""

import contextlib
import itertools
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.child import in_child

import iobmd
from iobmd import IOReturn, IOReturnError
from iobmd._internal import process_local
from iobmd._native.mapping import Mapping
from iobmd.device import vfio as device_vfio
from iobmd.iommu import vfio
from iobmd.memory import shmem
from iobmd.purgeable.monitor import Watch
from iobmd.units import PAGE_SIZE

SIZE = 8192
MARK = b"WRITTEN BY writeBytes"
VOLATILE, NON_VOLATILE = iobmd.IOPurgeable.kIOMemoryPurgeableVolatile, iobmd.IOPurgeable.kIOMemoryPurgeableNonVolatile


class ConcurrentFree:
    """Actions of another thread between reading a descriptor's number and using it."""

    def __init__(self, free: Callable[[], object], file: Path) -> None:
        self._free = free
        self._file = file
        self._opened: list[int] = []
        file.write_bytes(bytes(SIZE))

    def __call__(self) -> None:
        if not self._opened:
            thread = threading.Thread(target=self._free)
            thread.start()
            thread.join()
            # The lowest free numbers, which belonged to the descriptors that were just closed.
            self._opened = [os.open(self._file, os.O_RDWR) for _ in range(8)]

    def file_is_untouched(self) -> bool:
        assert self._opened, "the other_thread never ran"
        return self._file.read_bytes() == bytes(SIZE)

    def close(self) -> None:
        for descriptor in self._opened:
            os.close(descriptor)


def before(function: Callable[..., Any], intrude: Callable[[], object]) -> Callable[..., Any]:
    def intruded(*arguments: Any) -> Any:
        intrude()
        return function(*arguments)

    return intruded


def memfds() -> int:
    """Return how many descriptors of iobmd's shared memory this process has."""
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the directory itself
            count += "memfd:iobmd" in str(path.readlink())
    return count


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("method", ["writeBytes", "readBytesInto"])
def test_memory_mapped_in_no_task(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its descriptor is mapped for each use; the number must not belong to another file then."""
    before_it = memfds()
    buffer = iobmd.allocate(SIZE, task=None, wired=False, shared=True)
    buffer.writeBytes(0, MARK)

    def free() -> None:
        with contextlib.suppress(IOReturnError):
            buffer.free()

    with contextlib.closing(ConcurrentFree(free, tmp_path / "precious")) as other_thread:
        monkeypatch.setattr(
            shmem, "Mapping", type("", (), {"view": staticmethod(before(Mapping.view, other_thread))})
        )
        if method == "writeBytes":
            buffer.writeBytes(0, MARK)
        else:
            read = bytearray(len(MARK))
            buffer.readBytesInto(0, read)
            assert read == MARK
        assert other_thread.file_is_untouched()
    assert memfds() == before_it, "the object is closed at the end of the last use"
    with pytest.raises(IOReturnError) as caught:
        buffer.readBytes(0, 1)
    assert caught.value.code == IOReturn.kIOReturnNotOpen


@pytest.mark.usefixtures("nothing_left")
def test_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise the peer would receive a file of this program."""
    buffer = iobmd.allocate(SIZE, wired=False, shared=True)
    buffer.writeBytes(0, MARK)
    with contextlib.closing(ConcurrentFree(buffer.free, tmp_path / "precious")) as other_thread:
        monkeypatch.setattr(os, "dup", before(os.dup, other_thread))
        with iobmd.share(buffer) as handle, handle.attach() as attached:
            assert attached.readBytes(0, len(MARK)) == MARK
        assert other_thread.file_is_untouched()


@pytest.mark.usefixtures("nothing_left")
def test_attach_while_the_handle_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with iobmd.allocate(SIZE, wired=False, shared=True) as buffer:
        buffer.writeBytes(0, MARK)
        handle = iobmd.share(buffer)
        with contextlib.closing(ConcurrentFree(handle.close, tmp_path / "precious")) as other_thread:
            monkeypatch.setattr(shmem, "reopen", before(shmem.reopen, other_thread))
            with handle.attach() as attached:
                assert attached.readBytes(0, len(MARK)) == MARK
                attached.writeBytes(0, bytes(SIZE))
            assert other_thread.file_is_untouched()
        with pytest.raises(IOReturnError) as caught:
            handle.attach()
        assert caught.value.code == IOReturn.kIOReturnNotOpen


def test_waking_the_purger_as_it_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another thread writes eight bytes to wake the purger."""
    watch = Watch()
    with contextlib.closing(ConcurrentFree(watch.close, tmp_path / "precious")) as other_thread:
        monkeypatch.setattr(os, "eventfd_write", before(os.eventfd_write, other_thread))
        watch.wake()
        assert other_thread.file_is_untouched()


# --- the descriptor itself


def test_a_descriptor_is_closed_by_its_last_user() -> None:
    number = os.memfd_create("counted")
    fd = process_local.Fd(number, "it")
    with fd.use() as first, fd.use() as second:
        assert first == second == number
        fd.close()
        fd.close()
        os.fstat(number)
        with pytest.raises(IOReturnError, match="it is closed"):
            fd.use()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_use_that_was_interrupted_before_its_with_ends_by_itself() -> None:
    number = os.memfd_create("counted")
    fd = process_local.Fd(number, "it")
    fd.use()  # and no `with`
    fd.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_uses_of_other_threads_do_not_outlive_a_fork() -> None:
    """A forked child lacks the thread that would end its uses, and the descriptor would remain open."""
    number = os.memfd_create("counted")
    fd = process_local.Fd(number, "it")

    def child() -> bool:
        fd.close()
        return Path(f"/proc/self/fd/{number}").exists()

    with fd.use():
        assert in_child(child) is False
        os.fstat(number)
    fd.close()


# --- every method concurrently with free()


def here() -> iobmd.IOMemoryDescriptor:
    return iobmd.allocate(SIZE, wired=False)


def shared() -> iobmd.IOMemoryDescriptor:
    return iobmd.allocate(SIZE, wired=False, shared=True)


def nowhere() -> iobmd.IOMemoryDescriptor:
    return iobmd.allocate(SIZE, task=None, wired=False, shared=True)


def purgeable() -> iobmd.IOMemoryDescriptor:
    return iobmd.allocate(SIZE, wired=False, shared=True, purgeable=True)


def part() -> iobmd.IOMemoryDescriptor:
    whole = iobmd.allocate(2 * SIZE, wired=False, shared=True)
    found = iobmd.IOSubMemoryDescriptor.withSubRange(whole, SIZE, SIZE, 3)
    whole.free()
    return found


METHODS: list[Callable[[Any], object]] = [
    lambda memory: memory.writeBytes(0, MARK),
    lambda memory: memory.readBytes(0, SIZE),
    lambda memory: memory.readBytesInto(0, bytearray(SIZE)),
    lambda memory: memory.performOperation(1, 0, SIZE),
    lambda memory: (memory.prepare(), memory.complete()),
    lambda memory: memory.segments(),
    lambda memory: memory.map().unmap(),
    lambda memory: repr(memory.map(0x04000000)),
    lambda memory: memory.getPageCounts(),
    lambda memory: memory.getDMAMapLength(),
    lambda memory: memory.cache_mode,
    lambda memory: memory.wiring,
    lambda memory: memory.setPurgeable(VOLATILE),
    lambda memory: memory.setPurgeable(NON_VOLATILE),
    lambda memory: bytes(memoryview(memory)),
    lambda memory: memory.verify(),
    lambda memory: iobmd.share(memory).close(),
    lambda memory: iobmd.IOSubMemoryDescriptor.withSubRange(memory, 0, PAGE_SIZE, 3).readBytes(0, PAGE_SIZE),
    repr,
    len,
]


@pytest.mark.parametrize("make", [here, shared, nowhere, purgeable, part])
def test_every_method_beside_free(make: Callable[[], iobmd.IOMemoryDescriptor]) -> None:
    """Each method works, or raises an error of iobmd: no AttributeError, and no ValueError of the native layer."""
    box: list[iobmd.IOMemoryDescriptor | None] = [None]
    made: list[iobmd.IOMemoryDescriptor] = []
    wrong: list[BaseException] = []
    done = threading.Event()

    def use(first: int) -> None:
        methods = itertools.cycle(METHODS[first:] + METHODS[:first])
        while not done.is_set() and not wrong:
            memory, method = box[0], next(methods)
            try:
                if memory is not None:
                    method(memory)
            except (IOReturnError, BufferError):
                pass
            except TypeError as error:
                if "bytes-like" not in str(error):  # a part has no buffer protocol
                    wrong.append(error)
            except BaseException as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=use, args=(first,)) for first in (0, 7, 13)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(100):
            box[0] = memory = make()
            made.append(memory)
            done.wait(0.0005)
            with contextlib.suppress(IOReturnError):
                memory.free()
            with contextlib.suppress(TypeError):
                pickle.dumps(memory)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
        box[0] = None
        for memory in made:  # descriptors that were busy
            memory.free()
    if wrong:
        raise wrong[0]


def test_a_device_that_is_closed_beside_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VFIO call uses the container, although it was closed before, and not the file that was opened then."""
    container = object.__new__(vfio.Container)
    container._container = process_local.Fd(os.memfd_create("container"), "the container")
    container._group = container._device = None
    other_thread = ConcurrentFree(container.close, tmp_path / "unrelated")
    reached: list[str] = []

    def ioctl(number: int, *_arguments: object) -> int:
        reached.append(str(Path(f"/proc/self/fd/{number}").readlink()))
        return 0

    monkeypatch.setattr(device_vfio.fcntl, "ioctl", before(ioctl, other_thread))
    container.unmap(0x1000, PAGE_SIZE)
    other_thread.close()
    assert reached == ["/memfd:container (deleted)"]
    with pytest.raises(IOReturnError) as caught:
        container.map(0x1000, 0x1000, PAGE_SIZE, vfio.READ)
    assert caught.value.code == IOReturn.kIOReturnNotOpen
