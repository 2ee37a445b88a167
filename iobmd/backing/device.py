"""Memory of a device, mapped in no task until it is mapped or accessed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from iobmd._native import mapping as native
from iobmd._native import pagemap
from iobmd.backing.mapped import span
from iobmd.backing.pageless import PagelessBacking, collected
from iobmd.errors import UnsupportedError
from iobmd.memory import shmem
from iobmd.memory.mlock import Wiring
from iobmd.memory.shmem import FileExtent
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd._native.pagemap import RunTable
    from iobmd.device.region import Region


class DeviceBacking(PagelessBacking):
    """A region of device memory, which has no page frames: nothing pins it, and its addresses are fixed.

    It owns the region. Reads and writes map the pages that they access, temporarily.
    """

    refusal = (
        "this is memory of a device, mapped in no task: map() maps it in this process, and exportDMABuffer() passes "
        "it to the driver of another device; IOMapper maps main memory only"
    )
    wiring = Wiring.DEVICE

    def __init__(self, region: Region) -> None:
        super().__init__(span(region.in_page, region.size))
        self._region = region
        self.cache_mode = region.cache

    @property
    def runs(self) -> RunTable:
        """Its bus addresses, as one run. Raises `kIOReturnUnsupported` if they are unknown."""
        if self._region.address is None:
            raise UnsupportedError(f"the kernel does not report the address of {self._region.what}")
        return pagemap.listed([(self._region.address, self._region.size)])

    def in_page(self, offset: int) -> int:
        """Return the offset of a byte in its page."""
        return (self._region.in_page + offset) % PAGE_SIZE

    # --- its bytes

    def file_extents(self, offset: int, length: int) -> list[FileExtent]:
        """Return the pages of its file that contain a range. Raises as `Region.pages`."""
        start, size = self._region.pages(offset, length)
        return [FileExtent(self._region.file(), start, size, PAGE_SIZE, PAGE_SIZE, self._region)]

    @contextlib.contextmanager
    def _mapped(self, offset: int, length: int) -> Iterator[tuple[Mapping, int]]:
        """Map a range temporarily; yield the mapping, and the position of the range in it."""
        first = offset if self._region.maps_parts else 0
        mapping = shmem.show(self.file_extents(first, offset + length - first))
        try:
            yield mapping, self.in_page(first) + offset - first
        finally:
            mapping.close()

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, starting at `offset`, by the widest aligned accesses."""
        return collected(self, offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes at `offset`, by the widest aligned accesses."""
        if not (size := memoryview(buffer).nbytes):
            return
        if not self._region.mappable:
            self._region.read_into(offset, buffer)
            return
        with self._mapped(offset, size) as (mapping, position):
            mapping.read_into(position, buffer)

    def copy_to(self, offset: int, length: int, destination: int) -> int:
        """Copy bytes to memory of this process, by the widest aligned accesses."""
        native.Mapping.borrow(destination, length, True).write(0, self.read(offset, length))
        return 0

    def require_bytes(self, _offset: int, _length: int) -> None:
        """Do nothing: its bytes can be accessed."""

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`, by the widest aligned accesses."""
        if not (size := memoryview(data).nbytes):
            return
        if not self._region.mappable:
            self._region.write(offset, data)
            return
        with self._mapped(offset, size) as (mapping, position):
            mapping.write(position, data)

    def write_back(self, offset: int, length: int, *, drop: bool) -> None:  # noqa: ARG002 (the protocol's)
        """Complete write-combined stores; it is in no cache."""
        native.drain()

    def close(self) -> None:
        """Close the region. Idempotent."""
        self._region.close()

    drop = close
