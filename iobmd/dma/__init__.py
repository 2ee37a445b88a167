"""`IODMACommand`: what a device is told about memory, within its limits."""

from iobmd.dma.command import IODMACommand

__all__ = ["IODMACommand"]
