"""Shared memory of a task as of the moment of its snapshot: a copy in this process, made while the task is stopped.

A child of a task shares this memory with it, instead of a copy-on-write copy. Its objects (files) are determined
before the stop. The tracer then reads them directly, not through the task: no page table is walked there, and no page
allocated.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd._internal import pidns
from iobmd._native.mapping import Mapping
from iobmd.errors import NoMemoryError, UnsupportedError
from iobmd.host import headroom
from iobmd.remote import areas as areas_of
from iobmd.remote.session import SharedObject
from iobmd.task import attempt, extents, userfault
from iobmd.task.job import TIMEOUT
from iobmd.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from iobmd.task.attempt import File
    from iobmd.task.task import Task

_DEVICES = "/dev/", "anon_inode:", "/anon_inode:", "/dmabuf:", "socket:", "/[aio]"
_NO_DEVICES = "/dev/shm/", "/dev/zero", "/dev/hugepages/"


class Part(NamedTuple):
    """A range of the task, and its copy. Addresses are in bytes."""

    start: int
    """The first address."""
    end: int
    """The end address."""
    here: int
    """The address of the copy in this process."""


class SharedMemory:
    """The shared memory of a task, prepared for the copy by the tracer.

    Parameters
    ----------
    task : Task
        The task.
    limit : int
        Maximum number of bytes to copy.

    Attributes
    ----------
    objects : list of SharedObject
        The objects to copy.

    Raises
    ------
    IOReturnError
        `kIOReturnNoMemory`: it has more than `limit` bytes, or they do not fit this process. `kIOReturnUnsupported`:
        some of it cannot be read during the stop. As `areas_of.overlapping`.
    OSError
        The task has exited.
    """

    def __init__(self, task: Task, limit: int) -> None:
        self._areas = [vma for vma in areas_of.overlapping(task, 0, procfs.USER_END) if _is_writable(task, vma)]
        files = extents.Files(task.pid, TIMEOUT)
        found = [(vma, *_found(task, vma, files)) for vma in self._areas]
        supplied = {vma.start for vma in userfault.supplied(task.pid)} if found else ()
        for vma in self._areas:
            if vma.start in supplied:
                raise _refused(task, vma, "a userfaultfd supplies its pages, possibly from a thread that is stopped")
        total = sum(_existing(vma, file, size) for vma, file, size in found)
        if total > limit:
            message = (
                f"task {task.pid} has {format_size(total)} of shared memory, more than the {format_size(limit)} that "
                "may be copied while it is stopped: allow more, or do not freeze it"
            )
            raise NoMemoryError(message, errno.E2BIG)
        headroom.require(total, swappable=True)
        self.objects = [_object(vma, file, size) for vma, file, size in found]

    def covers(self, shared: Iterable[procfs.VMA]) -> bool:
        """Return whether it contains all of these areas of the snapshot, which maps the same objects there."""
        known = set(map(_identity, self._areas))
        return all(_identity(vma) in known for vma in shared)

    def parts(self, address: int, size: int) -> Iterator[Part]:
        """Iterate over the parts of a range that it contains, ascending."""
        for vma, one in zip(self._areas, self.objects, strict=True):
            start, end = max(address, vma.start), min(address + size, vma.end)
            if start < end:
                yield Part(start, end, one.memory.address + start - vma.start)


def _is_writable(task: Task, vma: procfs.VMA) -> bool:
    """Return whether an area is shared memory that can change: no device, and no file opened for reading only."""
    is_device = vma.name.startswith(_DEVICES) and not vma.name.startswith(_NO_DEVICES)
    if vma.perms[3] != "s" or not vma.inode or is_device:
        return False
    try:
        link = os.lstat(f"{pidns.directory(task.pid)}/map_files/{vma.start:x}-{vma.end:x}")
    except OSError:
        return True
    return bool(link.st_mode & stat.S_IWUSR)


def _found(task: Task, vma: procfs.VMA, files: extents.Files) -> tuple[File, int]:
    """Return the object that an area maps, and the number of its bytes from the start of the area."""
    file = files.find(vma)
    if not isinstance(file, attempt.File):
        why = "this process cannot open its file, for which CAP_CHECKPOINT_RESTORE is required"
        raise _refused(task, vma, why)
    if file.has_server:
        raise _refused(task, vma, "another program serves its file, possibly a thread that is stopped")
    return file, max(0, min(vma.end - vma.start, file.length - vma.offset))


def _refused(task: Task, vma: procfs.VMA, why: str) -> UnsupportedError:
    message = f"the shared memory of task {task.pid} at {vma} cannot be frozen: {why}"
    return UnsupportedError(message, address=vma.start)


def _existing(vma: procfs.VMA, file: File, size: int) -> int:
    """Return how many of the bytes are not in holes."""
    if file.kind != extents.TMPFS or not size:
        return size
    return attempt.count(file, [(vma.offset, vma.offset + size)], TIMEOUT)


def _object(vma: procfs.VMA, file: File, size: int) -> SharedObject:
    memory = Mapping.anonymous(vma.end - vma.start, PAGE_SIZE, True)
    path, has_holes = os.fsencode(file.path), file.kind == extents.TMPFS
    return SharedObject(path, file.inode, file.device, vma.offset, size, memory, has_holes)


def _identity(vma: procfs.VMA) -> tuple[int, int, int, int, str]:
    return vma.start, vma.end, vma.offset, vma.inode, vma.device
