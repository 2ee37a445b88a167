"""Frames by an independent reading of pagemap."""

from support import kernel

PFN = (1 << 55) - 1


def frames(address: int, size: int) -> list[int]:
    """Return the frame of each page of this process."""
    return [entry & PFN for entry in kernel.entries(address, size)]
