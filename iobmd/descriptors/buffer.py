"""`IOBufferMemoryDescriptor`: memory that is allocated with its descriptor."""

from __future__ import annotations

import contextlib
import copyreg
import math
import os
import warnings
from operator import index
from typing import TYPE_CHECKING, Literal, Self, SupportsIndex, TypeVar, cast, overload

from iobmd._internal.arguments import check_flags, check_integers, integers
from iobmd._internal.chunked import Carried, Progress, carrying
from iobmd._native.mapping import Mapping, SmallBuffer
from iobmd.backing.contents import CopyOf
from iobmd.backing.lazy import LazyBacking, LazyCopyOf
from iobmd.backing.mapped import MappedBacking
from iobmd.backing.placement import ANYWHERE, Placement
from iobmd.backing.remote import RemoteBacking
from iobmd.backing.remote_private import RemotePrivateBacking
from iobmd.constants import IOOptionBits, kIOMemoryIncoherentIOFlush
from iobmd.descriptors import address_index, allocation, slabs
from iobmd.descriptors.descriptor import IOMemoryDescriptor
from iobmd.descriptors.options import (
    CACHE_MODES,
    DIRECTION_MASK,
    DIRECTION_NAMES,
    cache_of_copies,
    check_direction,
    check_request,
)
from iobmd.errors import BadArgumentError, BusyError, NotOpenError, UnsupportedError
from iobmd.memory import numa
from iobmd.physical import policy
from iobmd.task.task import as_task, kernel_task
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy
    import numpy.typing
    from typing_extensions import Buffer, CapsuleType

    from iobmd.backing import Backing
    from iobmd.descriptors.options import Request
    from iobmd.descriptors.ownership import MemoryOwner
    from iobmd.task.task import AnyTask, Task

    S = TypeVar("S", bound=numpy.generic)
    Reduce = Callable[["IOBufferMemoryDescriptor"], str | tuple[object, ...]]

_CONTIGUOUS = int(IOOptionBits.kIOMemoryPhysicallyContiguous)


class IOBufferMemoryDescriptor(IOMemoryDescriptor, SmallBuffer):
    """A buffer of zeroed memory, allocated by a factory below and released by `free` or at the end of a `with` block.

    It is wired unless its options include `kIOMemoryPageable`: resident (mlock), and pinned if the kernel permits it,
    as `wiring` shows. It supports the buffer protocol over its first `getLength()` bytes: `memoryview(buf)`,
    `numpy.frombuffer(buf)`, `file.readinto(buf)`.

    Source: IOKit's IOBufferMemoryDescriptor.h; where IOKit returns NULL or false, `IOReturnError` is raised.
    """

    _initializer = "initWithPhysicalMask"
    # In C, for small buffers: an attribute dictionary alone takes more memory than such a buffer.
    _owner = SmallBuffer._owner
    _state = SmallBuffer._state
    _options = SmallBuffer._options
    _capacity = SmallBuffer._capacity

    _contiguous = False
    _guarded = False
    _contents: CopyOf | None = None
    _node: int | None = None
    _position = ANYWHERE
    _private = False
    _progress: Progress | None = None
    _holes: Sequence[tuple[int, int]] = ()

    def __init__(
        self,
        *,
        contents: CopyOf | None = None,
        node: int | None = None,
        placement: Placement = ANYWHERE,
        private: bool = False,
        progress: Progress | None = None,
    ) -> None:
        # Construction has two steps, as in IOKit. This step records arguments for which initWithPhysicalMask has no
        # parameter, and only those that differ from the defaults, because each attribute adds to the memory of a
        # small buffer.
        if contents is not None:
            self._contents = contents
        if node is not None:
            self._node = node
        if placement is not ANYWHERE:
            self._position = placement
        if private:
            self._private = True
        if progress is not None:
            self._progress = carrying(progress)

    # --- factories

    @classmethod
    def withCopy(
        cls,
        inTask: AnyTask | None,
        options: int,
        sourceMap: AnyTask,
        source: int,
        size: int,
        *,
        lazy: bool = False,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Allocate a buffer with a copy of memory of this task or another.

        Parameters
        ----------
        inTask : Task, int or psutil.Process
            The task to allocate in.
        options : int
            `IOOptionBits`.
        sourceMap : Task, int or psutil.Process
            The task to copy from.
        source, size : int
            Address in that task, and the number of bytes.
        lazy : bool
            Return before the bytes are copied (see the notes); pageable memory only.
        timeout : float, optional
            Seconds to wait for another program, as for `Task.read`.
        progress : callable, optional
            Called repeatedly in this thread with the number of bytes copied so far, and finally with `size`; by a
            lazy copy, not at all.

        Raises
        ------
        IOReturnError
            As `initWithPhysicalMask` and `Task.read`. The copy is complete, or an error is raised and nothing remains
            allocated: `kIOReturnVMError` with `.address`, the first byte that could not be read, `kIOReturnNotFound`
            if the source exits during the copy, `kIOReturnNotPermitted`, `kIOReturnTimeout`.

        Notes
        -----
        The bytes are read by process_vm_readv(2) into new huge pages, on several threads for large copies, with the
        GIL released. The source continues to run: of bytes that it changes during the copy, the old or the new values
        are copied. Nothing is allocated in it, see `Task.read`; a pageable copy is as sparse as its source.

        A lazy copy holds the contents at the time of the call: the source may change them or exit afterwards. Each
        page is fetched from a snapshot, a forked child of the source, when it is first touched (userfaultfd(2)), and
        in the background; `fetched` and `fetch` report and await it. Until then the source's writes to its private
        memory cost copies of pages, and children that this process forks lack the buffer. If the snapshot is killed,
        transfers raise `kIOReturnVMError`, and views get SIGBUS (SIGSEGV before Linux 6.6). Page faults of system
        calls can be served with CAP_SYS_PTRACE, vm.unprivileged_userfaultfd or /dev/userfaultfd; without these, views
        and arrays are exported once everything is fetched.

        The bytes are copied before the call returns if they are not private anonymous memory (or a userfaultfd
        serves them), or only a small part of the source's memory, if unreadable bytes are to be zero, or if
        userfaultfd(2) (which requires a privilege before Linux 5.11), a further process or a further thread is not
        available.
        """
        check_flags(lazy=lazy)
        kind = LazyCopyOf if lazy else CopyOf
        self = cls(contents=kind(as_task(sourceMap), source, size, timeout=timeout, progress=progress))
        self.initWithPhysicalMask(inTask, options, size, PAGE_SIZE, 0)
        return self

    @classmethod
    def inTaskWithOptions(
        cls,
        inTask: AnyTask | None,
        options: int,
        capacity: int,
        alignment: int = 1,
        kernTag: int = 0,
        userTag: int = 0,
    ) -> Self:
        """Allocate a buffer of `capacity` bytes in a task. Raises as `initWithPhysicalMask`.

        Parameters
        ----------
        inTask, options, capacity, alignment
            As `initWithPhysicalMask`.
        kernTag, userTag : int
            Numbers that label the mapping in /proc/PID/maps and `iobmd pagemap`: `kernTag` in `kernel_task` and in no
            task, `userTag` in other tasks, or the other number if that is 0. The label is ``/memfd:iobmd:7`` for
            shared objects and ``[anon:iobmd:7]`` for private memory (if the kernel has CONFIG_ANON_VMA_NAME). Both
            are stored as `vm_tags`.
        """
        self = cls()
        self.vm_tags = (kernTag, userTag)
        self.initWithPhysicalMask(inTask, options, capacity, alignment, 0)
        return self

    @classmethod
    def inTaskWithPhysicalMask(cls, inTask: AnyTask | None, options: int, capacity: int, physicalMask: int) -> Self:
        """Allocate a buffer whose physical addresses have no bits outside `physicalMask`."""
        self = cls()
        self.initWithPhysicalMask(inTask, options, capacity, 1, physicalMask)
        return self

    @classmethod
    def inTaskWithGuardPages(cls, inTask: AnyTask, options: int, capacity: int) -> Self:
        """Allocate a buffer with an inaccessible page on each side, where an access raises SIGSEGV.

        Parameters
        ----------
        inTask : Task, int or psutil.Process
            The task to allocate in.
        options : int
            `IOOptionBits`, neither pageable nor contiguous.
        capacity : int
            Rounded up to whole pages, so that the guard pages adjoin the memory; so is the length.

        Raises
        ------
        IOReturnError
            As `initWithPhysicalMask`; `kIOReturnBadArgument` for pageable or contiguous memory, or without a task.

        Notes
        -----
        The memory is a shared object, which can be mapped again, as in XNU; a forked child shares it.
        """
        self = cls()
        self.initWithGuardPages(inTask, options, capacity)
        return self

    @classmethod
    def withOptions(  # type: ignore[override]  # as in IOKit, where it hides the method of the base class
        cls, options: int, capacity: int, alignment: int = 1
    ) -> Self:
        """Allocate a buffer of `capacity` bytes in `kernel_task`. Raises as `initWithPhysicalMask`."""
        return cls.inTaskWithOptions(kernel_task, options, capacity, alignment)

    @classmethod
    def withCapacity(cls, capacity: int, withDirection: int, withContiguousMemory: bool = False) -> Self:
        """Allocate a wired buffer of `capacity` bytes. Raises as `initWithPhysicalMask`."""
        options = check_direction(withDirection) | (_CONTIGUOUS if withContiguousMemory else 0)
        return cls.withOptions(options, capacity)

    @classmethod
    def withBytes(cls, data: Buffer, withDirection: int, withContiguousMemory: bool = False) -> Self:
        """Allocate a wired buffer with a copy of `data`. Raises as `initWithPhysicalMask`."""
        self = cls.withCapacity(memoryview(data).nbytes, withDirection, withContiguousMemory)
        self.writeBytes(0, data)
        return self

    def initWithPhysicalMask(
        self, inTask: AnyTask | None, options: int, capacity: int, alignment: int, physicalMask: int
    ) -> bool:
        """Allocate the memory: the designated initializer, which every factory calls. Returns True.

        Parameters
        ----------
        inTask : Task, int or psutil.Process
            The task to allocate in.
        options : int
            `IOOptionBits`: direction, `kIOMemoryPageable` for memory that is not wired,
            `kIOMemoryPhysicallyContiguous` or `kIOMemoryHostPhysicallyContiguous` for contiguous memory,
            `kIOMemoryPurgeable` (with pageable) for memory that supports `setPurgeable`, `kIOMemoryKernelUserShared`
            for a shared object, which a forked child shares.
        capacity : int
            Size in bytes; `getLength()` starts there.
        alignment : int
            A power of two (0 and 1: none). Above the page size, wired memory is also contiguous, and both its virtual
            and its physical address are aligned; pageable memory in this process has an aligned virtual address.
        physicalMask : int
            The bits that physical addresses may have; 0: any address. If `alignment` is 0 or 1, the lowest bit of the
            mask is the alignment, which is at least a page.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`; `kIOReturnUnsupported` for options that are not implemented; `kIOReturnCannotWire`
            at RLIMIT_MEMLOCK; `kIOReturnNoResources` if no suitable memory is found within the policy
            (`iobmd.policy`), and `kIOReturnNotPrivileged` if the search requires visible page frames;
            `kIOReturnNoMemory`; `kIOReturnBusy` if called twice.
        """
        if self._state != "not initialised":
            raise BusyError(f"{self!r} is already initialized")
        wanted = check_request(
            inTask, options, capacity, alignment, physicalMask, self._guarded, self.vm_tags, self._position
        )
        if self._private:
            wanted = wanted._replace(private=True)
        if self._progress:
            wanted, self._progress = wanted._replace(progress=self._progress, piece_alignment=0), None
        if self._contents:
            self._contents.check()
        elif wanted.piece_alignment and self._node is None and self._acquire_piece(wanted):
            return True
        try:
            with numa.on(self._node):
                backing = allocation.allocate(wanted, self._contents)
        except Carried as carried:
            raise carried.error from None
        self._open(backing, wanted.options, wanted.capacity, wanted.contiguous)
        if self._contents:
            self.source_stopped_ns, self._holes = self._contents.stopped_ns, self._contents.holes
            if cache_of_copies(wanted.options):
                self.performOperation(kIOMemoryIncoherentIOFlush, 0, wanted.capacity)  # written through the caches
            self._contents = None
        return True

    def _acquire_piece(self, wanted: Request) -> bool:
        """Use a piece of a slab, also for `iobmd.allocate`; return False if none is suitable or nothing is reused."""
        if not policy.reuses() or not slabs.allocate(self, wanted):
            return False
        self._capacity, self._options, self._state = wanted.capacity, wanted.options, "open"
        if wanted.contiguous:
            self._contiguous = True
        return True

    def _open(
        self, backing: MappedBacking | RemotePrivateBacking, options: int, capacity: int, contiguous: bool
    ) -> None:
        self._capacity, self._contiguous = capacity, contiguous
        if options & CACHE_MODES and isinstance(backing, MappedBacking):
            backing.treat_caches(cache_of_copies(options))
        self._hold(backing, options, capacity)
        address_index.add(self._memory())

    def _attach(self, backing: MappedBacking, options: int, capacity: int, length: int) -> Self:
        """Initialize as the handle of memory that another process has allocated."""
        self._open(backing, options, capacity, bool(options & _CONTIGUOUS))
        self._memory().length = length
        return self

    def initWithGuardPages(self, inTask: AnyTask, options: int, capacity: int) -> bool:
        """Allocate the memory with guard pages, as `inTaskWithGuardPages`. Returns True."""
        (capacity,) = integers(capacity=capacity)
        self._guarded = True
        return self.initWithPhysicalMask(inTask, options, round_up(capacity, PAGE_SIZE), PAGE_SIZE, 0)

    # --- the buffer

    source_stopped_ns = 0
    """Upper bound of the time for which the source was stopped, in nanoseconds (`copy(…, freeze=True)`)."""

    @property
    def holes(self) -> list[tuple[int, int]]:
        """Offsets and lengths of the bytes that could not be read and are zero (`copy(…, unreadable="zero")`)."""
        return list(self._holes)

    @property
    def fetched(self) -> int:
        """Number of bytes of the capacity that have been copied: all, except in a lazy copy (`withCopy`)."""
        backing = self._memory().require_backing()
        return min(backing.fetched, self._capacity) if isinstance(backing, LazyBacking) else self._capacity

    def fetch(self) -> None:
        """Wait until a lazy copy (`withCopy`) is complete. Its snapshot has then ended.

        Raises
        ------
        IOReturnError
            `kIOReturnVMError`: the snapshot was killed before (`.address` is the first byte that is lost).
        """
        backing = self._memory().require_backing()
        if isinstance(backing, LazyBacking):
            backing.fetch()

    @property
    def task_stopped_ns(self) -> int:
        """Upper bound of the time for which a thread of another task was stopped, in nanoseconds."""
        return self._memory().require_backing().stopped_ns

    def getCapacity(self) -> int:
        """Return the allocated size in bytes, the maximum for `setLength`."""
        self._usable_memory()
        return self._capacity

    def setLength(self, length: int) -> None:
        """Set the length of later transfers and views, in bytes. Existing memoryviews are unchanged.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument` if it is negative or exceeds the capacity.
        """
        owner = self._usable_memory()
        check_integers(length=length)
        if not 0 <= length <= self._capacity:
            raise BadArgumentError(f"length {length} is not within the capacity of {self._capacity} bytes")
        owner.length = index(length)

    def setDirection(self, direction: int) -> None:
        """Set the direction of later transfers, one of the four `kIODirection…`."""
        self._usable_memory()
        self._options = self._options & ~DIRECTION_MASK | check_direction(direction)

    def getBytesNoCopy(self, start: int = 0, withLength: int = 0) -> int:
        """Return the virtual address of the byte `start`, in the buffer's task.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument` if `start` + `withLength` exceeds the length. `kIOReturnUnsupported` for memory
            that is mapped in no task.
        """
        owner = self._memory()
        backing = owner.require_backing()
        start, withLength = integers(start=start, withLength=withLength)  # noqa: N806 (IOKit's)
        if backing.task is None:
            raise UnsupportedError(f"{self!r} has no address: map it with map() or createMappingInTask()")
        owner.require_range(start, withLength)
        return backing.address + start

    def _mapped_range(self) -> tuple[Task, int, int]:
        start = self.getBytesNoCopy()
        # Not None: getBytesNoCopy() raises for memory that is mapped in no task.
        return cast("Task", self._memory().require_backing().task), start, start + len(self)

    def leave(self) -> None:
        """Transfer the memory to the task in which the buffer was allocated, when the descriptor is released.

        It remains there, pageable, until the task unmaps it or exits; the descriptor remains usable until
        it is released.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: the memory is in this process, or in no task.
        """
        owner = self._memory()
        with owner.guard:
            backing = owner.require_backing()
            if not isinstance(backing, (RemoteBacking, RemotePrivateBacking)):
                raise UnsupportedError(f"{self!r} is not in another task that could retain its memory")
            backing.leave()

    def appendBytes(self, data: Buffer) -> int:
        """Copy bytes to the end of the present length and extend it; return how many fit into the capacity."""
        owner = self._memory()
        backing = owner.require_backing()
        with memoryview(data) as view, view.cast("B") as source:
            fitting = source[: self._capacity - owner.length]
            owner.before_write(owner.length, len(fitting))
            backing.write(owner.length, fitting)
            owner.length += len(fitting)
            return len(fitting)

    @overload
    def array(
        self, dtype: Literal["u1"] = "u1", shape: int | tuple[int, ...] | None = None
    ) -> numpy.typing.NDArray[numpy.uint8]: ...
    @overload
    def array(
        self, dtype: type[S] | numpy.dtype[S], shape: int | tuple[int, ...] | None = None
    ) -> numpy.typing.NDArray[S]: ...
    @overload
    def array(
        self, dtype: str, shape: int | tuple[int, ...] | None = None
    ) -> numpy.typing.NDArray[numpy.generic]: ...
    def array(self, dtype: object = "u1", shape: int | tuple[int, ...] | None = None) -> object:
        """Return a NumPy array of the buffer's first `getLength()` bytes, not of a copy.

        The array owns the memory, which remains, pinned if it was pinned, until the array and its views no longer
        exist, even after a `with` block of the buffer has ended. `free` is refused until then. NumPy is imported by
        the first call.

        Parameters
        ----------
        dtype : numpy.dtype, type or str
            The type of the elements.
        shape : int or tuple of int, optional
            The number of elements, or the shape; it may cover a part of the buffer. Default: one dimension with as
            many elements as fit.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: the buffer is shorter. `kIOReturnUnsupported`: it is mapped in another task, or in
            none (use `map` and numpy.frombuffer).
        ValueError
            NumPy has no array of raw memory with this type (Python objects), or a size is negative.
        """
        import numpy  # noqa: PLC0415 (an optional dependency, which takes 100 ms to import)

        kind = numpy.dtype(cast("str", dtype))
        if shape is None:
            shape = len(self) // max(kind.itemsize, 1)
        count = math.prod(shape if isinstance(shape, tuple) else (shape,))
        if count * kind.itemsize > len(self):
            message = f"{count} elements of {kind.itemsize} bytes exceed the length of {len(self)} bytes"
            raise BadArgumentError(message)
        # Not numpy.ndarray(buffer=…), which holds this object, but no view of its memory.
        return numpy.frombuffer(memoryview(self), kind, count).reshape(shape)

    def __dlpack__(
        self,
        *,
        stream: None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType:
        """Return the memory as a DLPack capsule of bytes, for `from_dlpack` of torch, JAX, CuPy and others.

        Like the result of `array`, it owns the memory. The parameters are those of the Python array API standard;
        those that are None are not passed on.
        """
        given = {"stream": stream, "max_version": max_version, "dl_device": dl_device, "copy": copy}
        passed = {name: value for name, value in given.items() if value is not None}
        return self.array().__dlpack__(**passed)  # type: ignore[arg-type]

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return `(1, 0)`: the memory of the processor (kDLCPU)."""
        return 1, 0

    def _late_memory(self) -> MemoryOwner:
        if self._slab is not None and (created := slabs.own(self)):
            address_index.add(created)
        owner = self._owner  # of this thread, or of another that was faster
        return owner if owner and owner.has_handle else super()._late_memory()

    def _release(self, *, in_use: bool) -> None:
        if not self._release_piece():
            super()._release(in_use=in_use)

    def _exported(self) -> tuple[MemoryOwner, Mapping, int, int, bool]:
        owner = self._memory()
        mapping, first = owner.require_backing().exported()
        return owner, mapping, first, owner.length, True

    def _views(self) -> int:
        return self.exports

    def __reduce_ex__(self, _protocol: SupportsIndex) -> str | tuple[object, ...]:
        # Picklers look up exact types. A subclass is reduced as this class, whose reducer `iobmd.sharing` registers.
        whole = IOBufferMemoryDescriptor
        reduce: Callable[[IOBufferMemoryDescriptor], str | tuple[object, ...]] = copyreg.dispatch_table[whole]
        return reduce(self)

    def __repr__(self) -> str:
        with contextlib.suppress(NotOpenError):
            self._memory()  # a small buffer may have no owner yet
        name, owner = type(self).__name__, self._owner  # read once: another thread may release it
        backing = owner.backing if owner else None
        if owner is None or backing is None:
            return f"<{name} {self._state}>"
        direction = DIRECTION_NAMES[self._options & DIRECTION_MASK]
        task = backing.task
        where = f"task {task.pid} at {backing.address:#x}" if task else "no task"
        wiring = backing.wiring.value + self._placement(backing)
        return (
            f"<{name} in {where}, length {owner.length} of "
            f"{self._capacity}, {wiring}, direction {direction}, {self._state}>"
        )

    def _placement(self, backing: Backing) -> str:
        if not self._contiguous:
            return ""
        return ", contiguous" if backing.runs else ", contiguous in one huge page, addresses hidden"

    def __del__(self) -> None:
        if self._owner is None and self._slab is None:
            return
        what = repr(self)  # a small buffer has an owner afterwards
        inherited = self._owner is not None and self._owner.maker != os.getpid()
        self._abandon()
        if not inherited:
            warnings.warn(f"{what} was never freed", ResourceWarning, stacklevel=2, source=self)
