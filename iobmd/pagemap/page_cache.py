"""The parts of files that are in the page cache, by cachestat(2) (Linux 6.5) or mincore(2).

Nothing is read: no page enters the cache, and no access time changes.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from iobmd._native import mman
from iobmd.errors import BadArgumentError, NotPermittedError, UnsupportedError
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator


class FileCache(NamedTuple):
    """The pages of a file in the page cache, in bytes."""

    size: int
    """The size of the file, or of a block device."""
    cached: int
    """Cached pages; the last one counts as a whole page."""
    dirty: int | None
    """Those that were written to and not yet written back; None if unknown (before Linux 6.5)."""
    writeback: int | None
    """Those that are being written back; None if unknown."""
    recently_evicted: int | None
    """Pages that were evicted a short time ago, so that reading them again counts as memory pressure; None if
    unknown."""
    part_size: int
    """The size of each of the requested equal parts; the last one may be smaller. 0 if none was requested."""
    parts: list[int]
    """Cached pages in each of them, ascending."""

    @property
    def share(self) -> float:
        """The cached part of the file, from 0 to 1."""
        return self.cached / round_up(self.size, PAGE_SIZE) if self.size else 0.0


def file_cache(path: str | os.PathLike[str], *, parts: int = 0) -> FileCache:
    """Return which part of a file is in the page cache.

    Parameters
    ----------
    path : path
        A regular file or a block device. Symbolic links are followed.
    parts : int
        The number of equal parts whose cached pages are also counted; fewer if the file has fewer pages.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`: the kernel shows the cache of a file only to its owner, to those who may write to it,
        and with CAP_FOWNER.
        `kIOReturnUnsupported`: neither a regular file nor a block device, or a file system without page cache.
        `kIOReturnBadArgument`: a negative number of parts.
    OSError
        The file cannot be opened (open(2)).

    Notes
    -----
    Without cachestat(2), the file is mapped, which requires O_NOATIME and thus its ownership, because mmap(2) would
    otherwise change the access time.
    """
    if parts < 0:
        raise BadArgumentError(f"{parts} parts: the number cannot be negative")
    name = os.fspath(path)
    with _opened(name) as (fd, keeps_atime):
        size = _size(fd, name)
        step = _part_size(size, parts)
        places = range(0, size, step) if step else range(0)
        try:
            whole = _pages(fd, 0, size, keeps_atime)
            found = [_pages(fd, at, min(step, size - at), keeps_atime)[0] if whole[0] else 0 for at in places]
        except OSError as error:
            raise _refused(error, name) from None
    cached, *others = whole
    dirty, writeback, evicted = (None if pages is None else pages * PAGE_SIZE for pages in others)
    return FileCache(
        size, cached * PAGE_SIZE, dirty, writeback, evicted, step, [pages * PAGE_SIZE for pages in found]
    )


def _size(fd: int, name: str) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:  # such as most files of /proc
        raise _refused(error, name) from None


def _part_size(size: int, parts: int) -> int:
    """Return the size of a part if a file has this number of parts, in whole pages; 0 for no parts."""
    return round_up(-(-size // parts), PAGE_SIZE) if parts and size else 0


@contextmanager
def _opened(name: str) -> Iterator[tuple[int, bool]]:
    """Open a file without blocking; yield it, and whether its access time remains unchanged if it is mapped."""
    _require_pages(os.stat(name), name)  # opening another kind of file, such as a tape drive, has effects
    flags, keeps_atime = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, True
    try:
        fd = os.open(name, flags | os.O_NOATIME)
    except PermissionError:  # not the owner; reading nothing changes no access time either
        fd, keeps_atime = os.open(name, flags), False
    try:
        _require_pages(os.fstat(fd), name)
        yield fd, keeps_atime
    finally:
        os.close(fd)


def _require_pages(found: os.stat_result, name: str) -> None:
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        raise UnsupportedError(f"{name} is neither a regular file nor a block device: it has no page cache")


def _pages(fd: int, offset: int, length: int, keeps_atime: bool) -> tuple[int, int | None, int | None, int | None]:
    """Return the numbers of pages in a range that are cached, dirty, being written back, and recently evicted."""
    if not length:  # to cachestat, this means the rest of the file
        return 0, 0, 0, 0
    try:
        return mman.cachestat(fd, offset, length)
    except OSError as error:
        # Before 6.5; or a seccomp filter, which may also return EPERM.
        if error.errno not in (errno.ENOSYS, errno.EPERM) or not keeps_atime:
            raise
    # The kernel shows mincore() only to owners and writers of a file, and pretends to others that all is cached.
    return mman.file_incore(fd, offset, length, PAGE_SIZE), None, None, None


def _refused(error: OSError, name: str) -> OSError:
    if error.errno in (errno.EPERM, errno.ENOSYS):
        why = "the kernel shows which part of a file is cached only to its owner and writers; run with CAP_FOWNER"
        return NotPermittedError(f"{name}: {why}", error.errno)
    if error.errno in (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL):
        return UnsupportedError(f"{name}: its file system has no page cache", error.errno)
    return error
