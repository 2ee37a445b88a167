"""Segments of memory for a device, within its limits: `IODMACommand` and `IOMemoryCursor`."""

from iobmd.dma.command import IODMACommand
from iobmd.dma.cursor import IOBigMemoryCursor, IOLittleMemoryCursor, IOMemoryCursor, IONaturalMemoryCursor

__all__ = [
    "IOBigMemoryCursor",
    "IODMACommand",
    "IOLittleMemoryCursor",
    "IOMemoryCursor",
    "IONaturalMemoryCursor",
]
