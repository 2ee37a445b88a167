"""`IOMemoryDescriptor`: what every memory descriptor can do."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

from iobmd._internal import process_local
from iobmd.constants import (
    IOOptionBits,
    IOReturn,
    kIODirectionPrepareNoFault,
    kIODirectionPrepareToPhys32,
)
from iobmd.descriptors import mapping_cache, memory_map
from iobmd.descriptors.caching import Caching
from iobmd.descriptors.existing import Existing
from iobmd.descriptors.labels import Labels
from iobmd.descriptors.options import DIRECTION_MASK
from iobmd.descriptors.ownership import Lineage
from iobmd.descriptors.placement import Placement
from iobmd.descriptors.purge_control import Volatility
from iobmd.errors import IOReturnError
from iobmd.memory.mlock import Wiring
from iobmd.task.task import as_task, kernel_task
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    import psutil
    from typing_extensions import Buffer

    from iobmd._native.runs import RunTable
    from iobmd.backing import Backing
    from iobmd.descriptors.memory_map import IOMemoryMap
    from iobmd.task.task import Task

    AnyTask = Task | int | psutil.Process


class IOMemoryDescriptor(Existing, Lineage, Labels, Caching, Placement, Volatility):
    """A range of memory with a length, a direction and a task. Made by `withAddressRange` and by its subclasses.

    Methods may be called from any thread. Memory that goes away under a copy is impossible: `free` refuses while
    one is under way; memory that is mapped in no task is then freed at the end of the copy. In a forked child a
    wired descriptor refuses to work, for mlock(2) is not inherited: the child's copy of the memory is not wired. A
    pageable one goes on there with the child's copy-on-write memory, or with the same memory if it is that of a
    shared object.
    """

    _backing: Backing | None = None
    _length = 0
    _options = 0
    _tag = 0
    _maker = 0  # pid of the process that made it
    _wired_by = 0  # pid of the process whose memory is wired: by its options, or by prepare()
    _state = "not initialised"
    _prepared = 0
    _pinned_for_good = False  # by its options, not by prepare()
    _guard: process_local.Guard
    _windows: weakref.WeakSet[mapping_cache.Window]

    @staticmethod
    def _plain() -> IOMemoryDescriptor:
        return IOMemoryDescriptor()

    def getLength(self) -> int:
        """Return the length in bytes."""
        self._memory()
        return self._length

    def getDirection(self) -> IOOptionBits:
        """Return the direction of transfers: `kIODirectionNone`, `In`, `Out` or `InOut`."""
        self._memory()
        return IOOptionBits(self._options & DIRECTION_MASK)

    def getFlags(self) -> IOOptionBits:
        """Return the options it was made with, and its present direction."""
        self._memory()
        return IOOptionBits(self._options)

    def getTag(self) -> int:
        """Return the number set by `setTag`, 0 at first."""
        return self._tag

    def setTag(self, tag: int) -> None:
        """Keep a number of the caller's with the descriptor."""
        self._tag = tag

    @property
    def wiring(self) -> Wiring:
        """How firmly the memory stays where it is."""
        return self._memory().wiring

    def readBytes(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument` when the range passes the end of the descriptor's length.
        """
        backing = self._memory()
        self._check_range(offset, length)
        return backing.read(offset, length)

    def readBytesInto(self, offset: int, buffer: Buffer) -> int:
        """Fill the writable `buffer` from `offset` on; return its size in bytes. Raises as `readBytes`."""
        backing = self._memory()
        size = memoryview(buffer).nbytes
        self._check_range(offset, size)
        backing.read_into(offset, buffer)
        return size

    def writeBytes(self, offset: int, data: Buffer) -> int:
        """Copy all of `data` to `offset`; return its size in bytes. Raises as `readBytes`, with nothing written."""
        backing = self._memory()
        size = memoryview(data).nbytes
        self._check_range(offset, size)
        self._before_write(backing, offset, size)
        backing.write(offset, data)
        return size

    def prepare(self, forDirection: int = 0) -> None:
        """Pin the memory for a transfer, so that its physical addresses hold until `complete`.

        Calls are counted, in pairs with `complete`, from any thread. Memory that is pinned by its options is only
        counted. A descriptor cannot be freed while it is prepared.

        Parameters
        ----------
        forDirection : int
            0 for the descriptor's own direction, or directions of the transfer, with `kIODirectionPrepareNoFault`
            (refuse rather than fault pages in) and `kIODirectionPrepareToPhys32` (refuse memory above 4 GiB).

        Raises
        ------
        IOReturnError
            `kIOReturnCannotWire` when pinning is impossible or over a limit, and why; `kIOReturnBadArgument`;
            `kIOReturnNoResources` for memory above 4 GiB, or a hugetlb pool that is exhausted; `kIOReturnNotReady`
            for memory that is volatile; for existing memory `kIOReturnVMError` and `kIOReturnUnsupported`, as
            `withAddressRanges`. Then nothing is prepared.
        """
        self._memory()
        if forDirection & ~(DIRECTION_MASK | kIODirectionPrepareToPhys32 | kIODirectionPrepareNoFault):
            raise IOReturnError(IOReturn.kIOReturnBadArgument, f"direction {forDirection:#x} has unknown bits")
        with self._guard:
            backing = self._memory()  # again: another thread may have freed it
            fresh = bool(backing.parts) or backing.wiring is not Wiring.PINNED
            if fresh and backing.purgeable:
                backing.purgeable.hold()
            undo = fresh and not backing.parts  # those have undone it where it failed
            try:
                if fresh:
                    if forDirection & kIODirectionPrepareNoFault:
                        self._require_resident(backing)
                    backing.pin()
                    undo, self._wired_by = True, os.getpid()
                if forDirection & kIODirectionPrepareToPhys32:
                    _require_low(self._runs(backing))
            except BaseException:
                if undo:
                    self._unwire(backing)
                raise
            self._prepared += 1

    def complete(self, forDirection: int = 0) -> None:  # noqa: ARG002 (IOKit's)
        """Undo one `prepare`; the last one lets the kernel move the memory again.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady` when it is not prepared.
        """
        self._memory()
        with self._guard:
            backing = self._memory()
            if not self._prepared:
                raise IOReturnError(IOReturn.kIOReturnNotReady, f"{self!r} is not prepared: nothing to complete")
            self._prepared -= 1
            if backing.parts or not (self._prepared or self._pinned_for_good):
                self._unwire(backing)

    @staticmethod
    def _unwire(backing: Backing) -> None:
        backing.unpin()
        if backing.purgeable:
            backing.purgeable.let_go()

    def _require_resident(self, backing: Backing) -> None:
        resident = backing.page_counts()[0] * PAGE_SIZE
        if resident < backing.size:
            raise IOReturnError(
                IOReturn.kIOReturnCannotWire,
                f"{backing.size - resident} bytes are not resident, and kIODirectionPrepareNoFault forbids faults",
            )

    def map(self, options: int = 0) -> IOMemoryMap:
        """Map it in this process; as `createMappingInTask` with `kIOMapAnywhere`."""
        return self.createMappingInTask(kernel_task, 0, int(options) | mapping_cache.ANYWHERE)

    def createMappingInTask(
        self,
        intoTask: AnyTask,
        atAddress: int,
        options: int,
        offset: int = 0,
        length: int = 0,
    ) -> IOMemoryMap:
        """Map the memory, or a part of it, in a task: this process or another.

        Parameters
        ----------
        intoTask : Task, int or psutil.Process
            The task to map it in.
        atAddress : int
            Where, if not `kIOMapAnywhere`; nothing may be mapped there. Its place in a page is that of `offset`.
        options : IOMapOptions
            `kIOMapAnywhere`; `kIOMapReadOnly`; `kIOMapUnique` for addresses of its own; `kIOMapPrefault` to have
            every page in place; `kIOMapGuardedSmall` or `Large` for a page or 64 KiB on each side that nobody can
            touch.
        offset, length : int
            The part, in bytes, any; `length` 0: to the end.

        Returns
        -------
        IOMemoryMap
            At the addresses of the descriptor itself, or of a mapping that there is already, where those will do
            (not unique, not guarded, anywhere), as in IOKit.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`; `kIOReturnNoResources`: the address is not free; `kIOReturnUnsupported`: a cache
            mode, or private memory at a second place; `kIOReturnNoMemory`. For another task also
            `kIOReturnNotPermitted`, `kIOReturnNotFound` and `kIOReturnTimeout`: it cannot be stopped, and why.

        Notes
        -----
        One thread of another task is stopped for it, for a quarter of a millisecond (ptrace(2); python-ptrace is
        needed, the extra `remote`), and goes on as if nothing had happened.
        """
        task = as_task(intoTask)
        self._memory()
        length = length or self._length - offset
        self._check_range(offset, length)
        with self._guard:
            place = mapping_cache.Place(atAddress, options, offset, length, self._memory().in_page(offset))
            return memory_map.open_map(self, task, place)

    def getPageCounts(self) -> tuple[int, int]:
        """Return how many pages are resident, and how many of those are dirty, as the kernel says.

        Dirty: written to, and not lazily freed since. All of a shared object is dirty, for it has no file.
        """
        with self._guard:
            return self._memory().page_counts()

    def getDMAMapLength(self) -> tuple[int, int]:
        """Return how many bytes the pages have that hold it, and the place of its first byte in its page.

        They are counted range by range: a page that holds bytes of two counts for each.
        """
        backing = self._memory()
        return backing.span(0, self._length), backing.in_page(0)

    def free(self) -> None:
        """Give the memory back; the descriptor cannot be used afterwards. Idempotent, and so is leaving `with`.

        Memory that other descriptors have parts of (`IOSubMemoryDescriptor`, `IOMultiMemoryDescriptor`, ranges of its
        addresses) goes with the last of those.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while a `memoryview` of it is alive or a copy is under way: nothing is freed then.
        """
        if self._backing is None:
            return
        with self._guard:
            if self._prepared and self._wired_by == os.getpid():
                message = f"{self!r} is prepared {self._prepared} times: call complete() as often first"
                raise IOReturnError(IOReturn.kIOReturnBusy, message)
            if not self._bequeath():
                self._close()

    release = free

    def _before_write(self, backing: Backing, offset: int, length: int) -> None:
        if not backing.parts and backing.purgeable:
            with self._guard:
                self._memory()  # again: another thread may have freed it
                backing.purgeable.before_write(offset, length)

    def _refuse_if_mapped(self) -> None:
        if self._windows and (mapped := memory_map.uses(self)):
            message = f"{self!r} is mapped {mapped} times: call unmap() as often first"
            raise IOReturnError(IOReturn.kIOReturnBusy, message)

    def _close(self) -> None:
        if self._backing is None:  # another thread was faster
            return
        self._refuse_if_mapped()
        try:
            self._backing.close()
        except BufferError as error:
            message = f"{self!r} is in use ({error}): release its memoryviews and arrays first"
            raise IOReturnError(IOReturn.kIOReturnBusy, message) from None
        self._backing = None
        self._state = "released"

    def _memory(self) -> Backing:
        """Return where the bytes live, or raise `kIOReturnNotOpen`."""
        backing = self._backing  # once: another thread may free it
        if backing is None:
            raise IOReturnError(IOReturn.kIOReturnNotOpen, f"this {type(self).__name__} is {self._state}")
        if self._wired_by != os.getpid() and backing.wiring is not Wiring.PAGEABLE:
            raise IOReturnError(
                IOReturn.kIOReturnNotOpen,
                f"this {type(self).__name__} is wired memory of process {self._wired_by}, and fork does not pass "
                f"wiring on to process {os.getpid()}: make the buffer after the fork, or a pageable one before it",
            )
        return backing

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._length:
            raise IOReturnError(
                IOReturn.kIOReturnBadArgument,
                f"offset {offset} with length {length} is not inside of the descriptor's {self._length} bytes",
            )

    def __repr__(self) -> str:
        direction = ("none", "in", "out", "inout")[self._options & 3]
        return f"<{type(self).__name__}, length {self._length}, direction {direction}, {self._state}>"

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        backing = self._backing
        if backing is not None and backing.shared:
            remedy = "iobmd.share hands it to another process, which calls iobmd.attach; withCopy makes another one"
        else:
            remedy = "withCopy makes another one; shared memory (shared=True) goes to other processes by iobmd.share"
        raise TypeError(f"a {type(self).__name__} owns its memory and cannot be copied or pickled; {remedy}")

    def __len__(self) -> int:
        return self.getLength()

    def __enter__(self) -> Any:
        self._memory()
        return self

    def __exit__(self, *_error: object) -> None:
        self.free()


def _require_low(table: RunTable) -> None:
    if table.highest() >> 32:
        raise IOReturnError(
            IOReturn.kIOReturnNoResources,
            f"memory at {table.highest():#x} lies above 4 GiB, and kIODirectionPrepareToPhys32 forbids that; make "
            "it with inTaskWithPhysicalMask(…, 0xffffffff)",
        )
