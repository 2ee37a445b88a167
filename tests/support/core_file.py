"""A parser of core files that shares no code with iobmd (elf(5))."""

import os
import struct
from typing import NamedTuple


class Segment(NamedTuple):
    kind: int
    flags: int
    offset: int
    address: int
    size: int
    length: int


class Core:
    """A core file, parsed as elf(5) describes it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        assert data[:7] == b"\x7fELF\2\1\1"
        kind, machine = struct.unpack_from("=HH", data, 16)
        assert (kind, machine) == (4, {"x86_64": 62, "aarch64": 183}[os.uname().machine])
        (start,) = struct.unpack_from("=Q", data, 32)
        size, count = struct.unpack_from("=HH", data, 54)
        self.segments = []
        for index in range(count):
            fields = struct.unpack_from("=IIQQQQQQ", data, start + index * size)
            self.segments.append(Segment(*fields[:4], *fields[5:7]))

    @property
    def notes(self) -> list[tuple[int, bytes]]:
        (where,) = (one for one in self.segments if one.kind == 4)
        found, at = [], where.offset
        while at < where.offset + where.size:
            name, size, kind = struct.unpack_from("=III", self.data, at)
            at += 12 + (name + 3) // 4 * 4
            found.append((kind, self.data[at : at + size]))
            at += (size + 3) // 4 * 4
        assert at == where.offset + where.size
        return found

    def area(self, address: int) -> Segment:
        (found,) = (
            one for one in self.segments if one.kind == 1 and one.address <= address < one.address + one.length
        )
        return found

    def read(self, address: int, size: int) -> bytes:
        area = self.area(address)
        assert address + size <= area.address + area.size, "the file does not contain it"
        start = area.offset + address - area.address
        return self.data[start : start + size]
