"""A shared object in another task: its pages mapped there, moved to another object's, and unmapped.

A guest maps it (`remote.guest`), in the task's address space, but with a descriptor table of its own: no thread of
the task can take, replace or redirect a descriptor there. The object's descriptor goes there by a socket pair of the
guest's, one end of which we fetch (pidfd_getfd(2), Linux 5.6), so that it does not matter which namespaces or root
directory the task has. The task can write to the memory that these calls use, and spoil them: nothing that is read
from there is relied on. Whoever may trace the task can steal the descriptor all the same, by pidfd_getfd: that of
memory which is read-only there cannot be written to, nor opened again for writing, and nobody can truncate the memory
of a task of another user.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import socket
import stat
import struct
import weakref
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, NoResourcesError, NotFoundError, NotPermittedError
from iobmd.host import limits
from iobmd.memory import shmem
from iobmd.memory.shmem import alignment_of
from iobmd.remote import session
from iobmd.remote.guest import MAPPING, SCRATCH, Result, call
from iobmd.task import attempt, diagnosis, transfer
from iobmd.units import PAGE_SIZE, format_size, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iobmd._internal.process_local import Fd
    from iobmd.memory.shmem import FileExtent
    from iobmd.remote.guest import Call, Guest
    from iobmd.task.task import Task

_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x1, 0x2, 0x10, 0x20
_MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x4000, 0x100000  # Linux 4.17
_MSG_CMSG_CLOEXEC = 0x40000000
_NO_FD = -1

# Where in the scratch page what is: the two ends of the socket pair, and a struct msghdr with what it points to.
_ENDS, _MESSAGE, _VECTOR, _BYTE, _CONTROL = 0, 64, 128, 192, 256
_CONTROL_SIZE = 64

# The numbers in the guest's table, which was empty, and in which it alone opens: the lowest that are free.
_NEAR, _FAR, _OBJECT = 0, 1, 2


class RemoteMapping:
    """Pages of shared objects in another task, until `close`.

    Parameters
    ----------
    task : Task
        The other task.
    stretches : sequence of FileExtent
        What is mapped there, of one object or of several; they are not needed any more afterwards.
    at : int
        The address, at which nothing may be mapped; 0: any address.
    writable : bool
        May the task write to it?
    guard : int
        Inaccessible bytes on each side.

    Attributes
    ----------
    stopped_ns : int
        For how long, at the most, a thread of the task stood still for it.

    Raises
    ------
    IOReturnError
        As `session.with_stopped`; `kIOReturnNotPermitted`: a task of another user could take the memory away under
        this process; `kIOReturnNoResources`: something is mapped at `at`, or the task has no free file
        descriptor; `kIOReturnNoMemory`.
    """

    def __init__(
        self,
        task: Task,
        stretches: Sequence[FileExtent],
        *,
        at: int = 0,
        writable: bool = True,
        guard: int = 0,
    ) -> None:
        self.task = task
        self.size = size = sum(stretch.length for stretch in stretches)
        self.address = 0
        self.stopped_ns = 0
        self._owner = os.getpid()
        _retry_exhausted()
        _open.add(self)
        self._margin = guard
        self._whole = (0, 0)
        self._writable = writable
        self._locks = _locks_memory(task)
        _require_safe(task, {stretch.fd for stretch in stretches}, writable=writable)
        self._objects = {_identity(stretch.fd) for stretch in stretches}
        alignment = alignment_of(stretches)
        try:
            with _reported(task, size, at):
                self._make(stretches, at, PAGE_SIZE if at else alignment)
        except BaseException:
            with contextlib.suppress(IOReturnError):
                self.close()
            raise

    def _make(self, stretches: Sequence[FileExtent], at: int, alignment: int) -> None:
        def work(guest: Guest) -> None:
            self._map(guest, stretches, at, alignment)

        self.stopped_ns = session.with_guest(self.task, work)
        if not self._ours(self.address, self.address + self.size):
            # The task runs another program since (execve(2)), and the guest went on in the memory of the former.
            self._whole = (0, 0)
            self.stopped_ns = max(self.stopped_ns, session.with_guest(self.task, work, standing=True))

    def _map(self, guest: Guest, stretches: Sequence[FileExtent], at: int, alignment: int) -> None:
        in_parts = self._margin or len(stretches) > 1 or alignment > PAGE_SIZE
        reserved = self._reserve(guest, at, alignment) if in_parts else 0
        place = reserved + self._margin if reserved else at
        flags = _MAP_FIXED if reserved else _MAP_FIXED_NOREPLACE if at else 0
        # A task that has called mlockall(MCL_FUTURE) would fault all of it in at once, on its account.
        protection = _PROT_NONE if self._locks else self._protection
        self.address = self._show(guest, stretches, place, flags, protection)
        if not reserved:
            self._whole = (self.address, self.size)
        if at and self.address != at:  # before Linux 4.17 the address is but a wish
            self._whole = (0, 0)  # the guest unmaps it
            raise OSError(errno.EEXIST, "mmap")
        if self._locks:
            guest.call("munlock", *self._whole)
            guest.call("mprotect", self.address, self.size, self._protection)

    @property
    def _protection(self) -> int:
        return _PROT_READ | (_PROT_WRITE if self._writable else 0)

    def _reserve(self, guest: Guest, at: int, alignment: int) -> int:
        """Set address space aside, aligned; what is too much of it is given back."""
        size = self.size + 2 * self._margin
        slack = max(0, alignment - PAGE_SIZE) if not at else 0
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED_NOREPLACE if at else 0)
        start = guest.call("mmap", at, size + slack, _PROT_NONE, flags, _NO_FD, 0, made=MAPPING)
        self._whole = (start, size + slack)
        aligned = start if at else round_up(start + self._margin, alignment) - self._margin
        if aligned > start:
            guest.call("munmap", start, aligned - start)
        if start + slack > aligned:
            guest.call("munmap", aligned + size, start + slack - aligned)
        self._whole = (aligned, size)
        return aligned

    def _show(self, guest: Guest, stretches: Sequence[FileExtent], place: int, flags: int, protection: int) -> int:
        """Map stretches behind each other; returns where the first is. A descriptor goes there once for its run."""
        first = 0
        passage = _Passage(guest)
        made = 0 if flags & _MAP_FIXED else MAPPING
        for fd, run in itertools.groupby(stretches, lambda stretch: stretch.fd):
            with fd.use() as number, contextlib.ExitStack() as opened:
                passage.send(number if self._writable else opened.enter_context(_read_only(number)))
            receiving = passage.received()
            for stretch in run:
                mapped = self._map_object(guest, receiving, place, stretch, flags | _MAP_SHARED, protection, made)
                receiving, made = (), 0
                first = first or mapped
                place = mapped + stretch.length
            guest.call("close", _OBJECT)
        return first

    @staticmethod
    def _map_object(
        guest: Guest,
        receiving: Sequence[Call],
        place: int,
        stretch: FileExtent,
        flags: int,
        protection: int,
        made: int,
    ) -> int:
        mapping = call("mmap", place, stretch.length, protection, flags, _OBJECT, stretch.offset, made=made)
        try:
            return guest.run(*receiving, mapping)[-1]
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            raise OSError(errno.EMFILE, "recvmsg") from None  # the message came without it

    def redirect(self, stretches: Sequence[FileExtent]) -> None:
        """Show other pages at the same addresses, a stretch at a time. Raises as the constructor."""
        alignment_of(stretches)

        def work(guest: Guest) -> None:
            self._show(guest, stretches, self.address, _MAP_FIXED, self._protection)
            if self._locks:
                guest.call("munlock", self.address, self.size)

        _require_safe(self.task, {stretch.fd for stretch in stretches}, writable=self._writable)
        self._objects |= {_identity(stretch.fd) for stretch in stretches}
        with _reported(self.task, self.size, 0):
            self.stopped_ns = session.with_guest(self.task, work)

    def lost(self) -> int | None:
        """Return the first address at which the task has unmapped or replaced it; None: nowhere.

        Raises
        ------
        IOReturnError
            `kIOReturnNotFound`: the task is gone.
        """
        if not self.task.alive:
            raise diagnosis.gone(f"task {self.task.pid} is gone: it exited")
        end = self.address + self.size
        for start, stop in self._ours(self.address, end):
            if start > self.address:
                break
            return stop if stop < end else None
        return self.address

    def close(self) -> None:
        """Unmap what is ours there still; idempotent, and nothing when the task is gone.

        Raises
        ------
        IOReturnError
            As `session.with_stopped`; it is mapped then as before.
        """
        _start, size = self._whole
        if not size or self._owner != os.getpid():  # a forked child leaves it to its parent
            return
        with contextlib.suppress(NotFoundError), _reported(self.task, size, 0, "unmap"):
            session.insist(self._unmap)
        self._whole = (0, 0)

    def _unmap(self) -> None:
        start, size = self._whole
        # What the task has mapped there itself meanwhile, or after an exec, is none of ours.
        if self.task.alive and (ours := self._ours(start, start + size)):
            session.with_guest(self.task, lambda guest: _unmap(guest, ours))

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the constructor was interrupted
            self._close_or_register()

    def _close_or_register(self) -> None:
        """Unmap it, or register it for another try if that is refused: it must not stay in the task."""
        try:
            self.close()
        except NoResourcesError:
            _exhausted.append(self)
        except IOReturnError:
            _refused.append(self)

    def _ours(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges that show our objects, and the guards around them."""
        found: list[tuple[int, int]] = []
        try:
            mapped = list(procfs.areas(self.task.pid, start, end))
        except OSError as error:
            diagnosis.unless_exhausted(error, f"cannot read the mappings of task {self.task.pid}")
            return []
        for area in mapped:
            guard = self._margin and area.perms.startswith("---") and not area.inode
            if guard or (area.device, area.inode) in self._objects:
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
        mapping._close_or_register()


def _close_all() -> None:
    """Unmap everything before the interpreter ends, while threads can still be started."""
    for mapping in [*_open, *_exhausted, *_refused]:
        with contextlib.suppress(IOReturnError):
            mapping.close()


atexit.register(_close_all)


def is_trusted(task: Task) -> bool:
    """Say whether a task is root's or this user's: those could harm this process anyway."""
    try:
        return {int(uid) for uid in procfs.status(task.pid)["Uid"].split()} <= {0, os.geteuid()}
    except (OSError, KeyError):  # it is gone
        return False


def _require_safe(task: Task, objects: set[Fd], *, writable: bool) -> None:
    """Raise kIOReturnNotPermitted if a task that is not trusted could have this process end by SIGBUS.

    And for memory that another process has sealed against writing.
    """
    if not writable:  # what is sent for reading can be neither truncated nor punched
        return
    trusted = is_trusted(task)
    for fd in objects:
        with fd.use() as number:
            if sealed := shmem.sealed_against_writing([number]):
                raise sealed
            why = "" if trusted else shmem.why_unsafe(number)
        if why:
            message = (
                f"this memory is not mapped in task {task.pid}, which is another user's and could {why}: allocate it "
                "in that task (task=…) and map it here, or map it read-only there"
            )
            raise NotPermittedError(message)


def _locks_memory(task: Task) -> bool:
    """Say whether a task has locked memory, so that it may have locked future mappings too: that is shown nowhere."""
    try:
        return procfs.status_bytes("VmLck", task.pid) > 0
    except KeyError:
        return False
    except OSError as error:
        diagnosis.unless_exhausted(error, f"cannot look at task {task.pid}")
        return False  # it is gone


def touch(task: Task, address: int, size: int) -> None:
    """Have pages in the page tables of a task, as far as it goes, without stopping it or waiting for it for long."""
    attempt.touch(task.pid, task.pidfd, address, size, transfer.TIMEOUT)


def _unmap(guest: Guest, ranges: list[tuple[int, int]]) -> None:
    for start, end in ranges:
        guest.call("munmap", start, end - start)


def _identity(fd: Fd) -> tuple[str, int]:
    """Return how /proc/PID/maps names the object of a descriptor: its device and inode."""
    with fd.use() as number:
        status = os.fstat(number)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino


@contextlib.contextmanager
def _read_only(fd: int) -> Iterator[int]:
    """Open the object of a descriptor for reading; nobody but its owner can have that opened for writing again."""
    with contextlib.suppress(PermissionError):  # its owner is another user
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & (stat.S_IRWXG | stat.S_IRWXO) & ~(stat.S_IXGRP | stat.S_IXOTH):
            os.fchmod(fd, mode & (stat.S_IRWXU | stat.S_IXGRP | stat.S_IXOTH))  # F_SEAL_EXEC keeps the rest
    opened = os.open(f"/proc/thread-self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


class _Passage:
    """The way of descriptors of ours into a guest: a socket pair of its own."""

    def __init__(self, guest: Guest) -> None:
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS
        self._guest = guest
        self._scratch = guest.run(
            call("mmap", 0, PAGE_SIZE, _PROT_READ | _PROT_WRITE, flags, _NO_FD, 0, made=SCRATCH),
            call("socketpair", socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC, 0, Result(0, _ENDS)),
        )[0]

    def send(self, fd: int) -> None:
        """Send a descriptor, and before it the message header by which the guest receives it: `received`."""
        # Who has stolen an end may fill the pair, or empty it: neither makes us wait.
        with socket.socket(fileno=self._fetched()) as near:
            near.send(self._message(), socket.MSG_DONTWAIT)
            socket.send_fds(near, [b"."], [fd], socket.MSG_DONTWAIT)

    def received(self) -> tuple[Call, ...]:
        """Return the calls by which the guest receives it, as `_OBJECT`."""
        at, size = self._scratch + _MESSAGE, len(self._message())
        return (
            call("recvfrom", _FAR, at, size, socket.MSG_DONTWAIT, 0, 0),
            call("recvmsg", _FAR, at, _MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT),
        )

    def _fetched(self) -> int:
        guest = self._guest
        try:
            return guest.fetch(_NEAR)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
                raise
            message = (
                f"cannot fetch a descriptor of task {guest.task.pid} ({error}): pidfd_getfd needs Linux 5.6, and a "
                "seccomp filter of this process may forbid it; `iobmd doctor` reports that"
            )
            missing = error.errno in (errno.ENOSYS, errno.EINVAL)
            code = IOReturn.kIOReturnUnsupported if missing else IOReturn.kIOReturnNotPermitted
            raise IOReturnError(code, message, error.errno or 0) from None

    def _message(self) -> bytes:
        """Return a struct msghdr for a byte and a descriptor, and all it points to, as it lies from `_MESSAGE` on."""
        scratch, image = self._scratch, bytearray(_CONTROL + _CONTROL_SIZE - _MESSAGE)
        vector, byte, control = scratch + _VECTOR, scratch + _BYTE, scratch + _CONTROL
        struct.pack_into("=QIIQQQQI", image, 0, 0, 0, 0, vector, 1, control, _CONTROL_SIZE, 0)
        struct.pack_into("=QQ", image, _VECTOR - _MESSAGE, byte, 1)
        return bytes(image)


@contextlib.contextmanager
def _reported(task: Task, size: int, at: int, doing: str = "map") -> Iterator[None]:
    """Raise what a system call in the task failed for as the error of ours that fits."""
    try:
        yield
    except MemoryError:  # no mapping is free here for what Python itself needs
        raise limits.from_oserror(
            OSError(errno.ENOMEM, "mmap"), f"cannot {doing} {format_size(size)}", size
        ) from None
    except OSError as error:
        if isinstance(error, IOReturnError):
            raise
        number = error.errno or 0
        if number == errno.EEXIST:
            message = f"{at:#x} to {at + size:#x} of task {task.pid} is not free: something is mapped there"
            raise NoResourcesError(message, number) from None
        raise diagnosis.within(task.pid, error, f"cannot {doing} {format_size(size)}", size) from None
