"""Maps of registers whose accesses are recorded, to be compared with those that the device counted (tools/vm)."""

from collections.abc import Callable

from iobmd.tools.vm.accesses import Access

import iobmd

REPORT: list[str] = []
"""Lines for the host, printed at the end of the tests (tests/vm/conftest.py)."""


class Recorded:
    """A map of registers, all of whose accesses are recorded in a list."""

    def __init__(self, registers: iobmd.IOMemoryMap) -> None:
        self.registers = registers
        self.made: list[Access] = []

    def read(self, width: int, offset: int) -> int:
        self.made.append(Access("read", offset, width))
        read: Callable[[int], int] = getattr(self.registers, f"read{8 * width}")
        return read(offset)

    def write(self, width: int, offset: int, value: int) -> None:
        self.made.append(Access("write", offset, width))
        getattr(self.registers, f"write{8 * width}")(offset, value)


def widest(direction: str, offset: int, length: int) -> list[Access]:
    """Return the widest aligned accesses to a range, each byte once, in ascending order."""
    found = []
    while length:
        width = next(width for width in (8, 4, 2, 1) if width <= length and offset % width == 0)
        found.append(Access(direction, offset, width))
        offset, length = offset + width, length - width
    return found
