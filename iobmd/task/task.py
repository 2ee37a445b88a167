"""`Task`: one process, and access to its memory."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NoReturn, Self, SupportsIndex, TypeAlias, cast

from iobmd import procfs
from iobmd._internal.arguments import integers
from iobmd._native import crosstask
from iobmd._native.crosstask import HeldBuffer, fresh_bytes
from iobmd.errors import NO_DESCRIPTOR, BadArgumentError, IOReturnError
from iobmd.host import headroom
from iobmd.task import diagnosis, extents, identity, transfer
from iobmd.task.job import Outcome, Transfer

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd._internal import chunked
    from iobmd._native.crosstask import Ranges
    from iobmd.task.identity import Process, PsutilProcess

ADDRESS_END = 1 << 64


class Task:
    """One process, identified by its pid and its start time: a reused pid is another task.

    Parameters
    ----------
    process : int or psutil.Process
        The process. A pid belongs to the pid namespace of this process, even if /proc belongs to another one; in that
        case a psutil.Process is refused, because it would read one process and signal another.

    Attributes
    ----------
    pid : int
        The process id.

    Raises
    ------
    IOReturnError
        `kIOReturnNotFound`: there is no such process. `kIOReturnBadArgument`: not a process id.
        `kIOReturnNotPermitted`: /proc hides it (hidepid). `kIOReturnUnsupported`: /proc is not mounted, or belongs to
        another pid namespace and a psutil.Process is passed.
    TypeError
        `process` is neither a pid nor a psutil.Process.

    Notes
    -----
    A task holds a pidfd (pidfd_open(2), Linux 5.3), which refers to the process even after its pid is reused. psutil
    is loaded when `process` is first read. Tasks may be used from any thread, and by forked children.
    """

    __slots__ = ("__weakref__", "_pidfd", "_process", "_started", "pid")

    pid: int
    is_snapshot = False
    """Whether it never runs, and shares its memory with another task that does (`iobmd.Snapshot`)."""

    def __init__(self, process: int | Process) -> None:
        self._pidfd = -1
        self.pid = identity.pid_of(process)
        if not isinstance(process, SupportsIndex):
            identity.require_same_numbers(self.pid)
        self._pidfd = identity.open_pidfd(self.pid)
        self._started = identity.start_of(self.pid)
        self._process: PsutilProcess | None = None
        if not isinstance(process, SupportsIndex):
            self._process = identity.running(cast("PsutilProcess", process))

    def __del__(self) -> None:
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if getattr(self, "_pidfd", -1) >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Task cannot be pickled, because its pid may be reused before it is loaded; send the pid")

    @property
    def process(self) -> PsutilProcess:
        """The process as a psutil.Process, for its name, user, state and other properties.

        Raises
        ------
        IOReturnError
            `kIOReturnNotFound`: the process had exited when this was first read. `kIOReturnUnsupported`: /proc
            belongs to another pid namespace, or is not mounted.
        """
        if self._process is None:
            found = identity.as_psutil(self.pid)
            if identity.start_of(self.pid) != self._started:
                raise diagnosis.gone(f"task {self.pid} no longer exists: its pid was reused")
            self._process = found
        return self._process

    @property
    def _identity(self) -> tuple[int, int]:
        return self.pid, self._started

    @property
    def pidfd(self) -> int:
        """The pidfd of the process; -1 if the kernel or a seccomp filter does not provide one."""
        return self._pidfd

    @property
    def is_current(self) -> bool:
        """Whether this is the calling process."""
        return self.pid == os.getpid() and self.alive

    @property
    def alive(self) -> bool:
        """Whether the process is running; False once it has exited, even before it is reaped."""
        if self._pidfd < 0:
            return self._alive_without_pidfd()
        return not crosstask.has_exited(self._pidfd)

    def _require_open(self) -> None:
        """Do nothing: only a snapshot can be closed."""

    def _alive_without_pidfd(self) -> bool:
        try:
            fields = procfs.stat(self.pid)
        except OSError:
            return False
        return int(fields[19]) == self._started and fields[0] not in "ZX"

    def read(self, address: int, size: int, *, timeout: float | None = None) -> bytes:
        """Return the `size` bytes at `address` of this task.

        Parameters
        ----------
        address, size : int
            In bytes.
        timeout : float, optional
            Seconds to wait for another program that must supply a page: the task's userfaultfd(2) handler, or the
            server of a file that it maps. Also the limit of every wait for the lock of the task's address space,
            which it can hold indefinitely. By default 10 s, except that a read of at most 64 KiB, and a
            transfer that has begun, wait for that lock without a limit: a limit costs time (see the notes).

        Raises
        ------
        IOReturnError
            `kIOReturnVMError` (`.address` is the first byte that could not be read), `kIOReturnNotFound`,
            `kIOReturnNotPermitted`, `kIOReturnBadArgument`, `kIOReturnTimeout`; `kIOReturnNoMemory`,
            `kIOReturnNoResources`: see the notes.

        Notes
        -----
        Reading does not increase the memory of the task. Its present pages are read by process_vm_readv(2), and those
        that it shares with others since a fork through /proc/PID/mem, because the former would copy them. Absent
        pages are zero, or are read from the mapped object. If that object cannot be opened (by a user other than
        root, when its path and descriptors are gone), the kernel must create the pages in the task. Their size is
        first compared with the free memory of the task's memory cgroup, or of the hugetlb pool, and the call is
        refused if they do not fit. Pages read from swap are returned there (CAP_SYS_NICE).

        Only SIGKILL ends a wait for the lock of an address space (`mmap_lock`), and process_vm_readv(2) not even that
        (measured, Linux 6.18). With `timeout`, child processes make all calls that may wait for it: 4 KiB take 0.2 ms
        instead of 10 µs, and 1 MiB takes 1.4 ms instead of 0.2 ms.
        """
        address, size = check_range(address, size)
        if unmapped := extents.unmapped(self.pid, address, size):
            raise diagnosis.unreadable(self.pid, unmapped[0][0])
        headroom.require(size, swappable=True)
        data = fresh_bytes(size)
        # No other reference to these bytes exists yet, so that they may still be written.
        with HeldBuffer(data, False) as held:
            self.copy_in(address, held.address, size, timeout=timeout)
        return data

    def readinto(self, address: int, buffer: Buffer, *, timeout: float | None = None) -> int:
        """Fill the writable `buffer` with the bytes at `address`; return its size in bytes. Raises as `read`.

        Parameters
        ----------
        address : int
            In bytes.
        buffer : buffer
            The destination. If an error is raised, the bytes before `.address` may have been written.
        timeout : float, optional
            As for `read`, in seconds.
        """
        with HeldBuffer(buffer, True) as held:
            self.copy_in(address, held.address, held.size, timeout=timeout)
            return held.size

    def write(self, address: int, data: Buffer, *, timeout: float | None = None) -> int:
        """Copy the bytes of `data` to `address`; return their number. Raises as `read`.

        On `kIOReturnVMError` and `kIOReturnTimeout` the bytes before `.address` may have been written, and on
        `kIOReturnNoMemory` some of them: pages that the task lacks, or shares with another since a fork, must fit its
        memory cgroup.

        Parameters
        ----------
        address : int
            In bytes.
        data : buffer
            The bytes.
        timeout : float, optional
            As for `read`, in seconds.
        """
        with HeldBuffer(data, False) as held:
            size = held.size
            address, _ = check_range(address, size)
            quick = timeout is None
            if size and not (quick and self._moved_present(address, held.address, size, write=True)):
                job = Transfer(self.pid, self._pidfd, address, held.address, size, write=True, timeout=timeout)
                self._transfer(job)
            return size

    def copy_in(
        self,
        source: int,
        destination: int,
        size: int,
        *,
        huge: int = 0,
        fresh: bool = False,
        sparse: bool = False,
        skip: bool = False,
        resident_only: bool = False,
        timeout: float | None = None,
        progress: chunked.Progress | None = None,
        outline: Ranges | None = None,
    ) -> Outcome:
        """Copy `size` bytes at `source` of this task to the address `destination` of the calling process.

        The other parameters are those of `Transfer`. Raises as `read`; with `resident_only` also
        `kIOReturnNotReady`, where `.address` is the first page that another program must supply.
        """
        source, size = check_range(source, size)
        quick = not skip and timeout is None
        if not size or (quick and self._moved_present(source, destination, size, fresh=fresh)):
            return Outcome(size, 0)
        return self._transfer(
            Transfer(
                self.pid, self._pidfd, source, destination, size,
                huge=huge, fresh=fresh, sparse=sparse, skip=skip, resident_only=resident_only,
                timeout=timeout, progress=progress, outline=outline, by_file=self.is_snapshot,
            )
        )  # fmt: skip

    def _moved_present(self, theirs: int, ours: int, size: int, *, write: bool = False, fresh: bool = False) -> bool:
        """Transfer a small range if all its pages are present; return whether that was done."""
        if size > transfer.QUICK or self.is_snapshot:
            return False
        error = transfer.move_present(self.pid, self._pidfd, theirs, ours, size, write=write, fresh=fresh)
        if error == errno.EFAULT:
            raise diagnosis.unreadable(self.pid, theirs, write=write, alive=lambda: self.alive)
        return not error

    def _transfer(self, job: Transfer) -> Outcome:
        if self._pidfd < 0 and not self.alive:  # with a pidfd, each call checks this itself
            raise self._gone()
        outcome = self._moved(job)
        # A main thread that has exited has no memory, and its /proc files belong to root.
        without = outcome.error in (errno.ESRCH, errno.EACCES)
        if without and (thread := self._thread_with_memory()) != self.pid:
            outcome = self._moved_of_thread(job, thread)
        # If the task is alive afterwards, its pid was not reused.
        if not self.alive:
            if not job.write:  # the bytes may belong to another process
                crosstask.zero(job.ours, job.size)
            raise self._gone()
        if not outcome.error:
            return outcome
        self._require_open()  # the process of a snapshot that is ended loses its memory before it has exited
        address = job.theirs + outcome.done
        raise diagnosis.not_moved(
            self.pid, outcome.error, address, write=job.write, timeout=job.patience, alive=lambda: self.alive
        )

    def _moved(self, job: Transfer) -> Outcome:
        try:
            return transfer.move(job)
        except IOReturnError:
            raise
        except OSError as error:  # its memory map
            return Outcome(0, transfer.number_of(error))

    def _moved_of_thread(self, job: Transfer, thread: int) -> Outcome:
        """Like `_moved`, with the id of a thread, which may be reused before the task exits."""
        try:
            pidfd = os.pidfd_open(thread, os.O_EXCL)  # PIDFD_THREAD, Linux 6.9
        except OSError as error:
            if error.errno in NO_DESCRIPTOR:
                raise identity.no_descriptor(self.pid, error) from None
            pidfd = -1
        try:
            if not procfs.has_thread(self.pid, thread) or not self.alive:
                return Outcome(0, errno.ESRCH)
            return self._moved(job._replace(pid=thread, pidfd=self._pidfd if pidfd < 0 else pidfd))
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    def _gone(self) -> IOReturnError:
        return diagnosis.gone(f"task {self.pid} no longer exists: it exited before its memory was copied")

    def _thread_with_memory(self) -> int:
        try:
            return procfs.memory_id(self.pid)
        except OSError:  # it is gone
            return self.pid

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, Task) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        state = "this process" if self.is_current else "alive" if self.alive else "exited"
        return f"<Task {self.pid} {state}>"


class _CurrentTask(Task):
    """The calling process; after a fork, the child."""

    __slots__ = ()

    def __init__(self) -> None:
        self._pidfd = -1

    @property
    def pid(self) -> int:  # type: ignore[override]
        return os.getpid()

    @property
    def process(self) -> PsutilProcess:
        return identity.as_psutil(self.pid)

    @property
    def _identity(self) -> tuple[int, int]:
        return self.pid, identity.start_of(self.pid)

    @property
    def is_current(self) -> bool:
        return True

    @property
    def alive(self) -> bool:
        return True


kernel_task: Task = _CurrentTask()
"""This process in the kernel's role: memory allocated in it is wired unless it is declared pageable."""


if TYPE_CHECKING:
    AnyTask: TypeAlias = Task | int | Process
    """Anything that identifies a task."""


def current_task() -> Task:
    """Return this process: the same object as `kernel_task`, because both have the same address space."""
    return kernel_task


def get_task_map(task: AnyTask) -> Task:
    """Return the task itself, whose map is its address space (for ports of IOKit code)."""
    return as_task(task)


def as_task(task: AnyTask) -> Task:
    """Return `task` as a `Task`."""
    return task if isinstance(task, Task) else Task(task)


def check_range(address: int, size: int) -> tuple[int, int]:
    """Return an address and a size as Python's integers.

    Raises `kIOReturnBadArgument` unless `address`…`address + size` is a range of 64-bit addresses, or TypeError.
    """
    if not type(address) is type(size) is int:  # a call costs more than the rest
        address, size = integers(address=address, size=size)
    if size < 0:
        raise BadArgumentError(f"size {size} is negative")
    if address < 0 or address + size > ADDRESS_END:
        raise BadArgumentError(f"address {address:#x} with size {size:#x} is outside the 64-bit address space")
    return address, size
