"""Memory of this process: private anonymous pages, or hugetlb pages where those alone can be had as wanted."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from iobmd import contiguous, headroom, pagemap, pinning, refusals
from iobmd._native import memory
from iobmd._native.mapping import Mapping
from iobmd.constants import IOReturn
from iobmd.contiguous import Want
from iobmd.errors import CannotWireError, IOReturnError
from iobmd.populate import populate
from iobmd.task import Task, kernel_task
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, round_up
from iobmd.wiring import Wiring, make_resident

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd._native.runs import RunTable
    from iobmd.pieces import Progress

_TRIES = 4


class AnonymousBacking:
    """Zeroed memory that this process maps.

    Parameters
    ----------
    size : int
        Bytes; rounded up to whole pages.
    wired : bool
        Keep it resident (mlock), and pinned where the kernel lets us.
    want : Want, optional
        What is asked of the physical addresses; then it has to be pinned.
    source : tuple of (Task, int), optional
        Fill it with the `size` bytes at this address of this task.
    progress : callable, optional
        Told how many of those bytes are copied.
    """

    def __init__(
        self,
        size: int,
        *,
        wired: bool,
        want: Want | None = None,
        source: tuple[Task, int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.task = kernel_task
        self._wired = wired
        self._pin: pinning.Pin | None = None
        self._hugetlb = False
        self.runs: RunTable | None = None
        if wired or source:
            headroom.require(size, swappable=not wired)
        for _attempt in range(_TRIES):
            self.mapping = self._obtain(size, want)
            try:
                self._fill(size, source, progress, populated=want is not None)
                if not wired or self._wire(size, want, source):
                    return
            except BaseException:
                self.close()
                raise
            self.close()
        message = f"the kernel moved the pages at each of {_TRIES} tries to pin {want}"
        raise IOReturnError(IOReturn.kIOReturnNoResources, message)

    @staticmethod
    def _obtain(size: int, want: Want | None) -> Mapping:
        try:
            if want:
                return contiguous.obtain(want)
            huge = HUGE_PAGE_SIZE if size >= HUGE_PAGE_SIZE else PAGE_SIZE
            return Mapping.anonymous(round_up(size, PAGE_SIZE), huge)
        except IOReturnError:
            raise
        except (OSError, OverflowError) as error:
            raise refusals.own(error, f"cannot map {format_size(size)}") from None

    def _fill(
        self, size: int, source: tuple[Task, int] | None, progress: Progress | None, *, populated: bool
    ) -> None:
        huge = HUGE_PAGE_SIZE if self.size >= HUGE_PAGE_SIZE and not populated else 0
        if huge and (self._wired or source):
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages: slower, nothing else
                memory.advise(self.address, self.size, memory.MADV_HUGEPAGE)
        if self._wired:
            # Large memory is faulted in on several threads, by the copy or by `populate`: this reserves the limit.
            make_resident(self.address, self.size, populate=not huge)
        if source:
            task, address = source
            task.copy_in(address, self.address, size, huge=huge, progress=progress)
        elif huge and self._wired:
            populate(self.address, self.size)
            make_resident(self.address, self.size)

    def _wire(self, size: int, want: Want | None, source: tuple[Task, int] | None) -> bool:
        """Pin; return False where pinning moved pages away from where they are wanted, and another try may do."""
        try:
            self.pin()
        except CannotWireError:
            if not self._take_hugetlb(want or Want(size)):
                if want:
                    raise
                return True  # resident, then, and it says so
            self._fill(size, source, None, populated=True)
        if not want:
            return True
        if self.runs is None:  # hidden: then it was to be in one huge page
            return pagemap.is_huge(self.address, self.size)
        return want.accepts(self.runs)

    def _take_hugetlb(self, want: Want) -> bool:
        """Without pins, hugetlb pages are the next best: compaction does not move them."""
        mapping = contiguous.from_pools(want)
        if mapping:
            self.mapping.close()
            self.mapping = mapping
            self.runs = pinning.visible_runs(self.address, self.size)
            self._hugetlb = True
        return mapping is not None

    def pin(self) -> None:
        """Pin every page, and read where it lies. Raises `kIOReturnCannotWire`."""
        pin = pinning.Pin(self.address, self.size)
        try:
            # Read afterwards: a pin may move a page once.
            self.runs = pinning.visible_runs(self.address, self.size)
        except BaseException:
            pin.release()
            raise
        self._pin = pin

    def unpin(self) -> None:
        """Let the kernel move the pages again."""
        if self._pin:
            self._pin.release()
        self._pin = self.runs = None

    @property
    def wiring(self) -> Wiring:
        """How firmly it stays where it is."""
        if self._pin or self._hugetlb:
            return Wiring.PINNED
        return Wiring.RESIDENT if self._wired else Wiring.PAGEABLE

    @property
    def address(self) -> int:
        """Address in this process."""
        return self.mapping.address

    @property
    def size(self) -> int:
        """Bytes mapped, whole pages."""
        return self.mapping.size

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""
        return self.mapping.read(offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` from `offset` on."""
        self.mapping.read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""
        self.mapping.write(offset, data)

    def close(self) -> None:
        """Unpin and unmap, which also unlocks. Raises BufferError while it is in use; idempotent."""
        self.mapping.seal()
        self.unpin()
        self.mapping.close()
