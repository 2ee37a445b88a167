"""`IODMACommand`: segments of memory for a device, within its limits."""

from iobmd.dma.command import IODMACommand

__all__ = ["IODMACommand"]
