"""What all memory has in common that this process maps: pins, reading and writing, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd import pagemap, pinning
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.task import kernel_task
from iobmd.units import PAGE_SIZE
from iobmd.wiring import Wiring

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd._native.runs import RunTable
    from iobmd.purgeable import Purgeable


class MappedBacking:
    """Memory that this process maps as `mapping`, which the subclass makes."""

    mapping: Mapping

    def __init__(self, *, wired: bool) -> None:
        self.task = kernel_task
        self.runs: RunTable | None = None
        self.purgeable: Purgeable | None = None
        self._wired = wired
        self._pin: pinning.Pin | None = None
        self._immovable = False  # hugetlb pages, which stay where they are without a pin

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
        if self._pin or self._immovable:
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

    def page_counts(self) -> tuple[int, int]:
        """Count the pages that are resident, and those of them that were written to and not lazily freed since."""
        resident, written = pagemap.resident_and_dirty(self.task, self.address, self.size)
        lazily_freed = self.purgeable.lazily_freed() if self.purgeable else 0
        return resident, written - lazily_freed // PAGE_SIZE

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""
        return self.mapping.read(offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` from `offset` on."""
        self.mapping.read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""
        self.mapping.write(offset, data)

    def view(self, _offset: int, _size: int, _at: int, _writable: bool, _guard: int) -> Mapping:
        """Refuse: private pages can be at one place only."""
        raise _private()

    def show_in(self, _mapping: Mapping, _offset: int) -> None:
        """Refuse, as `view`."""
        raise _private()

    def close(self) -> None:
        """Unpin and unmap, which also unlocks. Raises BufferError while it is in use; idempotent."""
        self.mapping.seal()
        self.unpin()
        self.mapping.close()


def _private() -> IOReturnError:
    return IOReturnError(
        IOReturn.kIOReturnUnsupported,
        "private memory cannot be mapped at a second place; make it with kIOMemoryKernelUserShared (shared=True)",
    )
