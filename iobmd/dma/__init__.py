"""Segments of memory for a device, within its limits: `IODMACommand` and `IOMemoryCursor`."""

from iobmd.dma.command import (
    IODMACommand,
    kIODMACommandOutputBig32,
    kIODMACommandOutputBig64,
    kIODMACommandOutputHost32,
    kIODMACommandOutputHost64,
    kIODMACommandOutputLittle32,
    kIODMACommandOutputLittle64,
)
from iobmd.dma.cursor import IOBigMemoryCursor, IOLittleMemoryCursor, IOMemoryCursor, IONaturalMemoryCursor

__all__ = [
    "IOBigMemoryCursor",
    "IODMACommand",
    "IOLittleMemoryCursor",
    "IOMemoryCursor",
    "IONaturalMemoryCursor",
    "kIODMACommandOutputBig32",
    "kIODMACommandOutputBig64",
    "kIODMACommandOutputHost32",
    "kIODMACommandOutputHost64",
    "kIODMACommandOutputLittle32",
    "kIODMACommandOutputLittle64",
]
