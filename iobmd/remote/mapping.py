"""Mappings of shared objects, and of private memory, in another task.

A guest makes them (`remote.guest`): it runs in the task's address space, and receives the descriptors of the objects
by `remote.fd_passing`. It also pins private memory, so that the task is not stopped again for that. Which objects may
be mapped in which task: `remote.trust`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import weakref
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd._internal.process_local import Fd
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, NoResourcesError, NotFoundError, UnsupportedError
from iobmd.host import limits
from iobmd.memory import shmem
from iobmd.memory.shmem import NO_FD, FileExtent, alignment_of
from iobmd.remote import fd_passing, session, trust
from iobmd.remote.guest import MAPPING, call
from iobmd.remote.pin import RemotePin
from iobmd.task import attempt, diagnosis, job
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iobmd.remote.guest import Call, Guest
    from iobmd.task.task import Task

_PROT_NONE, _PROT_READ, _PROT_WRITE, _PROT_EXEC = 0, 1, 2, 4
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x1, 0x2, 0x10, 0x20
_MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x4000, 0x100000  # Linux 4.17


class RemoteMapping:
    """Extents of shared objects, or private memory, mapped in another task until `close`.

    Parameters
    ----------
    task : Task
        The other task.
    extents : sequence of FileExtent
        Extents of one or several objects, mapped consecutively. Their descriptors may be closed afterwards.
    at : int
        The address, at which nothing may be mapped; 0: any address.
    writable, executable : bool
        Whether the task may write to the memory, and execute it.
    guard : int
        Inaccessible bytes on each side.
    private : bool
        Whether it is a private mapping of the only extent (`private_extent`).
    pinned : bool
        Whether the guest that maps it is to pin it too (`transfer_pin`). The caller has checked that the pages fit.

    Attributes
    ----------
    stopped_ns : int
        The time in nanoseconds for which a thread of the task was stopped, at most.

    Raises
    ------
    IOReturnError
        As `session.with_guest`. `kIOReturnNotPermitted`: a task of another user could truncate the memory, or the
        memory is sealed against writing. `kIOReturnNoResources`: memory is mapped at `at`, or no file descriptor is
        free for the guest. `kIOReturnNoMemory`. `kIOReturnError`: another process had other memory mapped instead.
        `kIOReturnCannotWire`: with `pinned`, as `RemotePin`.
    """

    def __init__(
        self,
        task: Task,
        extents: Sequence[FileExtent],
        *,
        at: int = 0,
        writable: bool = True,
        executable: bool = False,
        guard: int = 0,
        private: bool = False,
        pinned: bool = False,
    ) -> None:
        self.task = task
        self.size = size = sum(extent.length for extent in extents)
        self.address = 0
        self.stopped_ns = 0
        self._owner = os.getpid()
        _retry_exhausted()
        _open.add(self)
        attempt.require_unlocked(task.pid, session.PATIENCE)
        self._margin = guard
        self._whole = (0, 0)
        self._pin: RemotePin | None = None
        self._writable, self._executable = writable, executable
        self._locks = _locks_memory(task)
        self._is_private, self._offset = private, extents[0].offset
        if not private:
            trust.require_safe(task, _files(extents), writable=writable)
        self._objects = set(map(_identity, _files(extents)))
        self._holes = any(extent.fd is None for extent in extents)
        alignment = alignment_of(extents)
        try:
            with _reported(task, size, at):
                self._make(extents, at, PAGE_SIZE if at else alignment, pinned=pinned)
        except BaseException:
            with contextlib.suppress(IOReturnError):
                self.close()
            raise

    def _make(self, extents: Sequence[FileExtent], at: int, alignment: int, *, pinned: bool) -> None:
        def work(guest: Guest) -> None:
            self._map(guest, extents, at, alignment)

        def work_and_pin(guest: Guest) -> None:
            self._pin_by(self._map(guest, extents, at, alignment, RemotePin.room(self.size)))

        self.stopped_ns = session.with_guest(self.task, work_and_pin if pinned else work)
        if not self._mapped_ranges(self.address, self.address + self.size):
            # The task has executed another program (execve(2)); the guest mapped into its previous address space.
            self._whole = (0, 0)
            self._unpin()
            self.stopped_ns = max(self.stopped_ns, session.with_guest(self.task, work, standing=True))

    def _pin_by(self, channel: fd_passing.Channel) -> None:
        """Pin it, unless that is refused."""
        try:
            self._pin = RemotePin(self.task, self.address, self.size, channel)
        except OSError as error:
            if isinstance(error, IOReturnError):
                raise

    def transfer_pin(self) -> RemotePin | None:
        """Return the pin, which the caller then owns and releases; None if it was refused."""
        pin, self._pin = self._pin, None
        return pin

    def _unpin(self) -> None:
        if pin := self.transfer_pin():
            pin.release()

    def _map(
        self, guest: Guest, extents: Sequence[FileExtent], at: int, alignment: int, room: int = 0
    ) -> fd_passing.Channel:
        """Map extents; return the channel of the guest, with `room` for other data."""
        channel = fd_passing.Channel(guest, room)
        in_parts = self._margin or self._holes or len(extents) > 1 or alignment > PAGE_SIZE
        reserved = self._reserve(guest, at, alignment) if in_parts else 0
        address = reserved + self._margin if reserved else at
        flags = _MAP_FIXED if reserved else _MAP_FIXED_NOREPLACE if at else 0
        # In a task that has called mlockall(MCL_FUTURE), mmap would fault in every page, charged to the task.
        protection = _PROT_NONE if self._locks else self._protection
        self.address = self._map_extents(channel, extents, address, flags, protection)
        if not reserved:
            self._whole = (self.address, self.size)
        if at and self.address != at:  # before Linux 4.17 the address is only a hint
            self._whole = (0, 0)  # the guest unmaps it
            raise OSError(errno.EEXIST, "mmap")
        if self._locks:
            guest.call("munlock", *self._whole)
            for start, size in shmem.accessible(extents, self.address):
                guest.call("mprotect", start, size, self._protection)
        return channel

    @property
    def _protection(self) -> int:
        return _PROT_READ | (_PROT_WRITE if self._writable else 0) | (_PROT_EXEC if self._executable else 0)

    def _reserve(self, guest: Guest, at: int, alignment: int) -> int:
        """Reserve aligned address space, guards included, and return its address."""
        size = self.size + 2 * self._margin
        slack = max(0, alignment - PAGE_SIZE) if not at else 0
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED_NOREPLACE if at else 0)
        start = guest.call("mmap", at, size + slack, _PROT_NONE, flags, NO_FD, 0, made=MAPPING)
        self._whole = (start, size + slack)
        aligned = start if at else round_up(start + self._margin, alignment) - self._margin
        if aligned > start:
            guest.call("munmap", start, aligned - start)
        if start + slack > aligned:
            guest.call("munmap", aligned + size, start + slack - aligned)
        self._whole = (aligned, size)
        return aligned

    def _map_extents(
        self,
        channel: fd_passing.Channel,
        extents: Sequence[FileExtent],
        address: int,
        flags: int,
        protection: int,
    ) -> int:
        """Map consecutive extents and return the address of the first. A descriptor is sent once for its extents."""
        first = 0
        guest = channel.guest
        made = 0 if flags & _MAP_FIXED else MAPPING
        flags |= _MAP_PRIVATE if self._is_private else _MAP_SHARED
        sent = fd_passing.separate if self._writable or self._is_private else fd_passing.read_only
        for fd, run in itertools.groupby(extents, lambda extent: extent.fd):
            if fd is None:  # reserved, and thus inaccessible
                first, address = first or address, address + sum(hole.length for hole in run)
                continue
            with fd.use() as number, sent(number) as other:
                channel.send(other)
            receiving = channel.receiving()
            parts = list(run)
            for index, extent in enumerate(parts):
                closing = [call("close", fd_passing.RECEIVED)] if index == len(parts) - 1 else []
                mapped = self._map_extent(guest, receiving, closing, address, extent, flags, protection, made)
                receiving, made = (), 0
                first = first or mapped
                address = mapped + extent.length
        for start, size in shmem.accessible(extents, first):
            self._require_mapped(guest, start, start + size, _files(extents))
        return first

    @staticmethod
    def _require_mapped(guest: Guest, start: int, end: int, sent: set[Fd]) -> None:
        """Raise `kIOReturnError` unless a guest has mapped what was sent to it.

        A process that may trace the task can copy the socket pair from the guest, and send other descriptors.
        """
        objects = set(map(_identity, sent))
        areas = [area for area in procfs.areas(guest.pid, start, end) if (area.device, area.inode) in objects]
        if (first := procfs.uncovered(areas, start, end, "")) < end:
            message = (
                f"task {guest.task.pid} has other memory at {first:#x} than iobmd mapped there: a thread of the task,"
                " or a process that may trace it, has replaced it"
            )
            raise IOReturnError(IOReturn.kIOReturnError, message)

    @staticmethod
    def _map_extent(
        guest: Guest,
        before: Sequence[Call],
        after: Sequence[Call],
        address: int,
        extent: FileExtent,
        flags: int,
        protection: int,
        made: int,
    ) -> int:
        fd = fd_passing.RECEIVED
        mapping = call("mmap", address, extent.length, protection, flags, fd, extent.offset, made=made)
        try:
            return guest.run(*before, mapping, *after)[len(before)]
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            raise OSError(errno.EMFILE, "recvmsg") from None  # the message arrived without the descriptor

    def redirect(self, extents: Sequence[FileExtent]) -> None:
        """Map other extents at the same addresses, one after the other. Raises as the constructor."""
        alignment_of(extents)

        def work(guest: Guest) -> None:
            self._map_extents(fd_passing.Channel(guest), extents, self.address, _MAP_FIXED, self._protection)
            if self._locks:
                guest.call("munlock", self.address, self.size)

        trust.require_safe(self.task, _files(extents), writable=self._writable)
        self._objects |= set(map(_identity, _files(extents)))
        with _reported(self.task, self.size, 0):
            self.stopped_ns = session.with_guest(self.task, work)

    @contextlib.contextmanager
    def writable(self) -> Iterator[None]:
        """Permit writing inside a `with` block, if `writable` was False. Raises as `session.with_guest`."""
        if self._writable:
            yield
            return
        self._protect(self._protection | _PROT_WRITE)
        try:
            yield
        finally:
            session.insist(lambda: self._protect(self._protection))

    def _protect(self, protection: int) -> None:
        def work(guest: Guest) -> None:
            for start, end in self._mapped_ranges(self.address, self.address + self.size):
                guest.call("mprotect", start, end - start, protection)

        with _reported(self.task, self.size, 0, "change the protection of"):
            self.stopped_ns += session.with_guest(self.task, work)

    def lost(self, start: int = 0, end: int = 0) -> int | None:
        """Return the first address at which the task has unmapped or replaced the memory, or None.

        Parameters
        ----------
        start, end : int
            The addresses to check; 0: all of it.

        Raises
        ------
        IOReturnError
            `kIOReturnNotFound`: the task has exited.
        """
        if not self.task.alive:
            raise diagnosis.gone(f"task {self.task.pid} is gone: it exited")
        start, end = start or self.address, end or self.address + self.size
        for first, stop in self._mapped_ranges(start, end):
            if first > start:
                break
            return stop if stop < end else None
        return start

    @property
    def is_mapped(self) -> bool:
        """Whether `close` will unmap it."""
        return bool(self._whole[1]) and self._owner == os.getpid()

    def leave(self) -> None:
        """Leave it to the task: neither `close` nor the exit of this process unmaps it."""
        self._whole = (0, 0)

    def close(self, *, inside: bool = False) -> None:
        """Unmap the parts that the task has not replaced; idempotent. If the task has exited, nothing happens.

        `inside` as `session.with_guest`.

        Raises
        ------
        IOReturnError
            As `session.with_guest`; the memory is then still mapped.
        """
        self._unpin()
        _start, size = self._whole
        if not size or self._owner != os.getpid():  # in a forked child: the parent unmaps it
            return
        with contextlib.suppress(NotFoundError), _reported(self.task, size, 0, "unmap"):
            session.insist(lambda: self._unmap(inside=inside))
        self._whole = (0, 0)

    def _unmap(self, *, inside: bool) -> None:
        start, size = self._whole
        # The task itself may have mapped other memory there since, possibly after an exec, which must remain.
        if self.task.alive and (ranges := self._mapped_ranges(start, start + size)):
            session.with_guest(self.task, lambda guest: _unmap(guest, ranges), inside=inside)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the constructor was interrupted
            if self._whole[1]:
                self.close_when_free()

    def close_when_free(self) -> None:
        """As `close`, for destructors, which must not wait: as soon as no other thread stops the task."""
        session.guard_of(self.task).when_free(self._close_or_register)

    def _close_or_register(self) -> None:
        """Unmap it, or register it for another try if that is refused: it must not stay in the task.

        With the guard of the task held.
        """
        try:
            self.close(inside=True)
        except NoResourcesError:
            _exhausted.append(self)
        except IOReturnError:
            _refused.append(self)

    def _is_mapped_by(self, area: procfs.VMA) -> bool:
        if (area.device, area.inode) not in self._objects:
            return False
        return not self._is_private or area.offset - area.start == self._offset - self.address

    def _mapped_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges between two addresses that still map these objects, and their guards.

        Raises `kIOReturnNotFound`: the task exits, and has no memory; its pidfd reports that only later.
        """
        found: list[tuple[int, int]] = []
        try:
            mapped = list(procfs.areas(self.task.pid, start, end))
        except OSError as error:
            if isinstance(error, FileNotFoundError | ProcessLookupError):
                refusal = diagnosis.without_memory(self.task.pid)
            else:
                refusal = diagnosis.refused(self.task.pid, error.errno or 0, "mappings")
            if isinstance(refusal, NotFoundError):
                raise refusal from None
            return []
        for area in mapped:
            guard = (self._margin or self._holes) and area.perms.startswith("---") and not area.inode
            if guard or self._is_mapped_by(area):
                first, last = max(area.start, start), min(area.end, end)
                if found and found[-1][1] == first:
                    found[-1] = found[-1][0], last
                else:
                    found.append((first, last))
        return found


_open: weakref.WeakSet[RemoteMapping] = weakref.WeakSet()
_exhausted: list[RemoteMapping] = []
"""Mappings released while this process lacked a file descriptor to unmap them: the next mapping unmaps them."""
_refused: list[RemoteMapping] = []
"""Mappings released while their task could not be stopped: unmapped at exit, because each try takes 2 s."""


def _retry_exhausted() -> None:
    for mapping in [_exhausted.pop() for _ in range(len(_exhausted))]:
        mapping.close_when_free()


def _close_all() -> None:
    """Unmap everything before the interpreter exits, while threads can still be started."""
    for mapping in [*_open, *_exhausted, *_refused]:
        with contextlib.suppress(IOReturnError):
            mapping.close()


atexit.register(_close_all)


def private_extent(size: int) -> FileExtent:
    """Return what a private mapping of `size` bytes, in whole pages, maps: zeros, until they are written to.

    A private mapping of /dev/zero is anonymous memory (drivers/char/mem.c, mmap_zero), but /proc/PID/maps shows its
    device, inode and offset. With an offset that no other mapping has, it cannot be mistaken for memory that the
    task itself has mapped there since.

    Raises
    ------
    IOReturnError
        `kIOReturnNoResources`: no file descriptor is free. `kIOReturnUnsupported`: there is no /dev/zero.
    """
    try:
        number = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        diagnosis.unless_exhausted(error, "cannot map private memory")
        message = f"private memory of another task is mapped from /dev/zero ({error.strerror}): pass shared=True"
        raise UnsupportedError(message, error.errno or 0) from None
    offset = int.from_bytes(os.urandom(5), "little") * PAGE_SIZE
    alignment = HUGE_PAGE_SIZE if size >= HUGE_PAGE_SIZE else PAGE_SIZE
    return FileExtent(Fd(number, "/dev/zero"), offset, size, PAGE_SIZE, alignment)


def touch(task: Task, address: int, size: int) -> None:
    """Fault in pages of a task without stopping it, as far as its fault handlers answer within `job.TIMEOUT`."""
    attempt.touch(task.pid, task.pidfd, address, size, job.TIMEOUT)


def _locks_memory(task: Task) -> bool:
    """Return whether a task has locked memory: it may have locked future mappings too, which nothing reports."""
    try:
        return procfs.status_bytes("VmLck", task.pid) > 0
    except KeyError:
        return False
    except OSError as error:
        diagnosis.unless_exhausted(error, f"cannot read the state of task {task.pid}")
        return False  # it has exited


def _unmap(guest: Guest, ranges: list[tuple[int, int]]) -> None:
    for start, end in ranges:
        guest.call("munmap", start, end - start)


def _files(extents: Sequence[FileExtent]) -> set[Fd]:
    return {extent.fd for extent in extents if extent.fd}


def _identity(fd: Fd) -> tuple[str, int]:
    """Return the device and inode by which /proc/PID/maps names the object of a descriptor."""
    with fd.use() as number:
        status = os.fstat(number)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino


@contextlib.contextmanager
def _reported(task: Task, size: int, at: int, doing: str = "map") -> Iterator[None]:
    """Raise the named error for a system call that fails in the task."""
    try:
        yield
    except MemoryError:  # Python itself cannot map memory in this process
        raise limits.from_oserror(
            OSError(errno.ENOMEM, "mmap"), f"cannot {doing} {format_size(size)}", size
        ) from None
    except OSError as error:
        if isinstance(error, IOReturnError):
            raise
        number = error.errno or 0
        if number == errno.EEXIST:
            message = f"{at:#x} to {at + size:#x} of task {task.pid} is not free: memory is mapped there"
            raise NoResourcesError(message, number) from None
        raise diagnosis.within(task.pid, error, f"cannot {doing} {format_size(size)}", size) from None
