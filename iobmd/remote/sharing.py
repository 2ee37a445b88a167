"""A shared object in another task: its pages mapped there, moved to another object's, and unmapped.

The object's descriptor goes there by a socket pair of the task's own, one end of which we fetch (pidfd_getfd(2),
Linux 5.6), so that it does not matter which namespaces or root directory the task has. All of that is closed again
before the task goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import struct
import weakref
from typing import TYPE_CHECKING

from iobmd import attempt, copying, procfs, refusals
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, NotFoundError
from iobmd.shmem import alignment_of
from iobmd.units import PAGE_SIZE, format_size, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from iobmd.own import Fd
    from iobmd.remote.stop import Stop
    from iobmd.shmem import Stretch
    from iobmd.task import Task

_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x1, 0x2, 0x10, 0x20
_MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x4000, 0x100000  # Linux 4.17
_MSG_CMSG_CLOEXEC = 0x40000000
_NO_FD = -1

# Where in the scratch page what is: the two ends of the socket pair, and a struct msghdr with what it points to.
_ENDS, _MESSAGE, _VECTOR, _BYTE, _CONTROL = 0, 64, 128, 192, 256
_CONTROL_SIZE = 64
_HEADER = 16  # struct cmsghdr, before the descriptor


class RemoteMapping:
    """Pages of shared objects in another task, until `close`.

    Parameters
    ----------
    task : Task
        The other task.
    stretches : sequence of Stretch
        What is mapped there, of one object or of several; they are not needed any more afterwards.
    at : int
        The address, where nothing may be mapped yet; 0 for any.
    writable : bool
        May the task write to it?
    guard : int
        Bytes on each side that nobody can touch.

    Attributes
    ----------
    stopped_ns : int
        For how long, at the most, a thread of the task stood still for it.

    Raises
    ------
    IOReturnError
        As `session.with_stopped`; `kIOReturnNoResources`: something is mapped at `at`, or the task has no free file
        descriptor; `kIOReturnNoMemory`.
    """

    def __init__(
        self,
        task: Task,
        stretches: Sequence[Stretch],
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
        _open.add(self)
        self._margin = guard
        self._whole = (0, 0)
        self._writable = writable
        self._locks = _locks_memory(task)
        self._objects = {_identity(stretch.fd) for stretch in stretches}
        alignment = alignment_of(stretches)
        try:
            with _reported(task, size, at):
                self.stopped_ns = _with_stopped(
                    task, lambda stop: self._open(stop, stretches, at, PAGE_SIZE if at else alignment)
                )
        except BaseException:
            with contextlib.suppress(IOReturnError):
                self.close()
            raise

    def _open(self, stop: Stop, stretches: Sequence[Stretch], at: int, alignment: int) -> None:
        try:
            self._map(stop, stretches, at, alignment)
        except BaseException:
            if self._whole[1]:
                with contextlib.suppress(OSError):
                    stop.call("munmap", *self._whole)
                self._whole = (0, 0)
            raise

    def _map(self, stop: Stop, stretches: Sequence[Stretch], at: int, alignment: int) -> None:
        in_parts = self._margin or len(stretches) > 1 or alignment > PAGE_SIZE
        reserved = self._reserve(stop, at, alignment) if in_parts else 0
        place = reserved + self._margin if reserved else at
        flags = _MAP_FIXED if reserved else _MAP_FIXED_NOREPLACE if at else 0
        # A task that has called mlockall(MCL_FUTURE) would fault all of it in at once, on its account.
        protection = _PROT_NONE if self._locks else self._protection
        self.address = self._show(stop, stretches, place, flags, protection)
        if not reserved:
            self._whole = (self.address, self.size)
        if at and self.address != at:  # before Linux 4.17 the address is but a wish
            stop.call("munmap", *self._whole)
            self._whole = (0, 0)
            raise OSError(errno.EEXIST, "mmap")
        if self._locks:
            stop.call("munlock", *self._whole)
            stop.call("mprotect", self.address, self.size, self._protection)

    @property
    def _protection(self) -> int:
        return _PROT_READ | (_PROT_WRITE if self._writable else 0)

    def _reserve(self, stop: Stop, at: int, alignment: int) -> int:
        """Set address space aside, aligned; what is too much of it is given back."""
        size = self.size + 2 * self._margin
        slack = max(0, alignment - PAGE_SIZE) if not at else 0
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED_NOREPLACE if at else 0)
        start = stop.call("mmap", at, size + slack, _PROT_NONE, flags, _NO_FD, 0)
        self._whole = (start, size + slack)
        aligned = start if at else round_up(start + self._margin, alignment) - self._margin
        if aligned > start:
            stop.call("munmap", start, aligned - start)
        if start + slack > aligned:
            stop.call("munmap", aligned + size, start + slack - aligned)
        self._whole = (aligned, size)
        return aligned

    @staticmethod
    def _show(stop: Stop, stretches: Sequence[Stretch], place: int, flags: int, protection: int) -> int:
        """Map stretches behind each other; returns where the first is. A descriptor goes there once for its run."""
        first = 0
        for fd, run in itertools.groupby(stretches, lambda stretch: stretch.fd):
            with _Sent(stop, fd) as sent:
                for stretch in run:
                    mapped = stop.call(
                        "mmap", place, stretch.length, protection, flags | _MAP_SHARED, sent.fd, stretch.offset
                    )
                    first = first or mapped
                    place = mapped + stretch.length
        return first

    def redirect(self, stretches: Sequence[Stretch]) -> None:
        """Show other pages at the same addresses, a stretch at a time. Raises as the constructor."""
        alignment_of(stretches)

        def work(stop: Stop) -> None:
            self._show(stop, stretches, self.address, _MAP_FIXED, self._protection)
            if self._locks:
                stop.call("munlock", self.address, self.size)

        self._objects |= {_identity(stretch.fd) for stretch in stretches}
        with _reported(self.task, self.size, 0):
            self.stopped_ns = _with_stopped(self.task, work)

    def lost(self) -> int | None:
        """Return the first address at which the task has unmapped or replaced it; None: nowhere.

        Raises
        ------
        IOReturnError
            `kIOReturnNotFound`: the task is gone.
        """
        if not self.task.alive:
            raise refusals.gone(f"task {self.task.pid} is gone: it exited")
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
        start, size = self._whole
        if not size or self._owner != os.getpid():  # a forked child leaves it to its parent
            return
        with contextlib.suppress(NotFoundError):
            # What the task has mapped there itself meanwhile, or after an exec, is none of ours.
            if self.task.alive and (ours := self._ours(start, start + size)):
                with _reported(self.task, size, 0):
                    _with_stopped(self.task, lambda stop: _unmap(stop, ours))
        self._whole = (0, 0)

    def __del__(self) -> None:
        # Only an interrupt at the wrong moment leaves one open: nothing of ours must stay in another program.
        with contextlib.suppress(IOReturnError, AttributeError):
            self.close()

    def _ours(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges that show our objects, and the guards around them."""
        found: list[tuple[int, int]] = []
        try:
            mapped = list(procfs.areas(self.task.pid, start, end))
        except OSError:
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


def _close_all() -> None:
    """As the interpreter ends, while threads are to be had still: nothing of ours must stay in other programs."""
    for mapping in list(_open):
        with contextlib.suppress(IOReturnError):
            mapping.close()


atexit.register(_close_all)


def _locks_memory(task: Task) -> bool:
    """Say whether a task has locked memory, so that it may have locked future mappings too: that is shown nowhere."""
    try:
        return procfs.status_bytes("VmLck", task.pid) > 0
    except (OSError, KeyError):  # it is gone
        return False


def touch(task: Task, address: int, size: int) -> None:
    """Have pages in the page tables of a task, as far as it goes, without stopping it or waiting for it for long."""
    attempt.touch(task.pid, task.pidfd, address, size, copying.TIMEOUT)


def _with_stopped(task: Task, work: Callable[[Stop], None]) -> int:
    from iobmd.remote import session  # noqa: PLC0415 (with ctypes: half of what `import iobmd` takes)

    return session.with_stopped(task, work)


def _unmap(stop: Stop, ranges: list[tuple[int, int]]) -> None:
    for start, end in ranges:
        stop.call("munmap", start, end - start)


def _identity(fd: Fd) -> tuple[str, int]:
    """Return how /proc/PID/maps names the object of a descriptor: its device and inode."""
    with fd.use() as number:
        status = os.fstat(number)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino


class _Sent:
    """A descriptor of ours in a stopped task, as `fd` there, inside of a `with`."""

    def __init__(self, stop: Stop, fd: Fd) -> None:
        self._stop = stop
        self._ours = fd
        self._scratch = 0
        self._theirs: list[int] = []
        self.fd = -1

    def __enter__(self) -> _Sent:
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS
        self._scratch = self._stop.call("mmap", 0, PAGE_SIZE, _PROT_READ | _PROT_WRITE, flags, _NO_FD, 0)
        try:
            self._send()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _send(self) -> None:
        import socket  # noqa: PLC0415 (as above)

        stop, scratch = self._stop, self._scratch
        stop.task.write(scratch + _MESSAGE, self._message())
        stop.call("socketpair", socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 0, scratch + _ENDS)
        self._theirs += struct.unpack("=ii", stop.task.read(scratch + _ENDS, 8))
        # Another thread of the task may fill the pair, or empty it: neither may make us wait while this one stands.
        with socket.socket(fileno=self._fetched(self._theirs[0])) as near, self._ours.use() as number:
            socket.send_fds(near, [b"."], [number], socket.MSG_DONTWAIT)
        stop.call("recvmsg", self._theirs[1], scratch + _MESSAGE, _MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
        control = stop.task.read(scratch + _CONTROL, _HEADER + 4)
        if struct.unpack_from("=Q", control)[0] < _HEADER + 4:  # the message came without it
            raise OSError(errno.EMFILE, "recvmsg")
        (self.fd,) = struct.unpack_from("=i", control, _HEADER)
        self._theirs.append(self.fd)

    def _fetched(self, fd: int) -> int:
        try:
            return self._stop.fetch(fd)
        except OSError as error:
            message = (
                f"cannot fetch a descriptor of task {self._stop.task.pid} ({error}): pidfd_getfd needs Linux 5.6, "
                "of a task whose main thread has exited 6.9, and a seccomp filter of this process may forbid it; "
                "`iobmd doctor` reports that"
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

    def __exit__(self, *_error: object) -> None:
        theirs, self._theirs = sorted(self._theirs), []
        try:
            if theirs and theirs == list(range(theirs[0], theirs[0] + len(theirs))):  # one call instead of three
                with contextlib.suppress(OSError):
                    self._stop.call("close_range", theirs[0], theirs[-1], 0)
                    theirs = []
            for fd in theirs:
                self._stop.call("close", fd)
        finally:
            self._stop.call("munmap", self._scratch, PAGE_SIZE)


@contextlib.contextmanager
def _reported(task: Task, size: int, at: int) -> Iterator[None]:
    """Raise what a system call in the task failed for as the error of ours that fits."""
    try:
        yield
    except MemoryError:  # no mapping is free here for what Python itself needs
        raise refusals.own(OSError(errno.ENOMEM, "mmap"), f"cannot map {format_size(size)}", size) from None
    except OSError as error:
        if isinstance(error, IOReturnError):
            raise
        number = error.errno or 0
        if number == errno.EEXIST:
            message = f"{at:#x} to {at + size:#x} of task {task.pid} is not free: something is mapped there"
            raise IOReturnError(IOReturn.kIOReturnNoResources, message, number) from None
        raise refusals.within(task.pid, error, f"cannot map {format_size(size)}", size) from None
