"""The page cache of files, compared with what was read and dropped (posix_fadvise), and with mincore."""

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.child import NOBODY, in_child
from support.targets import until

from iobmd import BadArgumentError, NotPermittedError, UnsupportedError, pagemap
from iobmd._native import mman

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file on a disk, without pages in memory."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE - 100))
    if not until(lambda: dropped(path)):
        pytest.skip(f"{tmp_path} is on a file system whose files cannot be dropped from memory")
    return path


def dropped(path: Path) -> bool:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not any(incore(path))


def incore(path: Path) -> list[bool]:
    """Return which pages are in memory, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    pages = -(-path.stat().st_size // PAGE)
    there = (ctypes.c_ubyte * pages)()
    start = libc.mmap(None, ctypes.c_size_t(pages * PAGE), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * PAGE), there) == 0
    libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(pages * PAGE))
    os.close(fd)
    return [bool(page & 1) for page in there]


def read(path: Path, offset: int, size: int) -> None:
    """Read a part without reading ahead."""
    with path.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert len(os.pread(opened.fileno(), size, offset)) > 0


def refused(number: int) -> Callable[..., Any]:
    def call(*_arguments: object) -> None:
        raise OSError(number, f"cachestat: {os.strerror(number)}")

    return call


@pytest.mark.parametrize("cachestat", [None, errno.ENOSYS, errno.EPERM])
def test_parts_that_were_read_are_cached(file: Path, cachestat: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if cachestat:  # before Linux 6.5, or in a container whose seccomp filter lacks it
        monkeypatch.setattr(mman, "cachestat", refused(cachestat))
    assert pagemap.file_cache(file).cached == 0
    read(file, 8 * PAGE, 4 * PAGE)
    read(file, SIZE - PAGE, PAGE)
    there = incore(file)
    assert 5 <= sum(there) < 64
    found = pagemap.file_cache(file, parts=16)
    assert incore(file) == there
    assert (found.size, found.cached, found.part_size) == (SIZE - 100, sum(there) * PAGE, 4 * PAGE)
    assert found.parts == [sum(there[at : at + 4]) * PAGE for at in range(0, 64, 4)]
    assert found.share == pytest.approx(sum(there) / 64)


def test_nothing_is_read_and_no_access_time_changes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_ago = (1_000_000_000, 2_000_000_000)
    for path in (file, tmp_path):
        os.utime(path, long_ago)  # older than the modification: relatime would update it at the next access
    before = file.stat().st_atime
    assert pagemap.file_cache(file, parts=64).cached == 0
    monkeypatch.setattr(mman, "cachestat", refused(errno.ENOSYS))
    assert pagemap.file_cache(file, parts=64).cached == 0
    assert not any(incore(file))
    assert file.stat().st_atime == before == 1_000_000_000


def test_dirty_pages(file: Path) -> None:
    def is_dirty() -> bool:
        with file.open("r+b", buffering=0) as opened:
            os.pwrite(opened.fileno(), b"x", 3 * PAGE)
            found = pagemap.file_cache(file)
            return found.dirty is None or (found.dirty or 0) + (found.writeback or 0) >= PAGE

    assert until(is_dirty)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    assert not pagemap.file_cache(file).dirty


def test_odd_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    found = pagemap.file_cache(empty, parts=8)
    assert (found.size, found.cached, found.parts, found.share) == (0, 0, [], 0.0)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(UnsupportedError, match="neither a regular file nor a block device"):
            pagemap.file_cache(path)
    with pytest.raises(UnsupportedError, match="has no page cache"):
        pagemap.file_cache("/proc/self/maps")
    with pytest.raises(FileNotFoundError):
        pagemap.file_cache(tmp_path / "none")
    with pytest.raises(BadArgumentError):
        pagemap.file_cache(empty, parts=-1)
    (tmp_path / "link").symlink_to(empty)
    assert pagemap.file_cache(tmp_path / "link").size == 0


@pytest.mark.needs("root")
def test_without_cachestat_files_of_others_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """To other users, mincore(2) pretends that all is in memory, and mmap(2) would change the access time."""
    monkeypatch.setattr(mman, "cachestat", refused(errno.ENOSYS))

    def hidden(name: str) -> str:
        with pytest.raises(NotPermittedError) as raised:
            pagemap.file_cache(name)
        return str(raised.value)

    with tempfile.NamedTemporaryFile() as opened:
        opened.write(b"x")
        opened.flush()
        os.fchmod(opened.fileno(), 0o644)
        assert "only to its owner and writers" in in_child(lambda: hidden(opened.name), uid=NOBODY)
