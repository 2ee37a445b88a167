"""The accesses to registers that a guest reports, compared with those that its devices have counted.

The devices are QEMU's, which records each access with its width. The guest reports all accesses that it makes to a
region, and no driver of its kernel accesses that region: the two lists must be equal.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_REGION = re.compile(r"^@@REGION (\S+) (0x[0-9a-f]+) (0x[0-9a-f]+)$", re.MULTILINE)
_REPORTED = re.compile(r"^@@ACCESS (\S+) (read|write) (0x[0-9a-f]+) (\d+)$", re.MULTILINE)
_COUNTED = re.compile(r"memory_region_ops_(read|write) .*\baddr (0x[0-9a-f]+) .*\bsize (\d+) name '(\S+)'")


class Access(NamedTuple):
    """One access to a register."""

    direction: str
    """"read" or "write"."""
    offset: int
    width: int
    """In bytes."""

    def __str__(self) -> str:
        return f"{self.direction} of {8 * self.width} bits at {self.offset:#x}"


def report(name: str, start: int, size: int, made: Iterable[Access]) -> list[str]:
    """Return the lines by which a guest reports its accesses to a region of QEMU, with its name and addresses."""
    return [
        f"@@REGION {name} {start:#x} {size:#x}",
        *(f"@@ACCESS {name} {one.direction} {one.offset:#x} {one.width}" for one in made),
    ]


def compare(output: str, trace: Path) -> str:
    """Return the first difference between the accesses that a guest reports and those counted, "" if none."""
    regions = {name: (int(start, 16), int(size, 16)) for name, start, size in _REGION.findall(output)}
    if not regions:
        return "the guest reported no accesses to registers"
    counted: dict[str, list[Access]] = {name: [] for name in regions}
    with trace.open(errors="replace") as lines:
        for line in lines:
            if (found := _COUNTED.search(line)) and found[4] in regions:
                start, size = regions[found[4]]
                if 0 <= (offset := int(found[2], 16) - start) < size:
                    counted[found[4]].append(Access(found[1], offset, int(found[3])))
    for name in regions:
        made = [
            Access(direction, int(offset, 16), int(width))
            for region, direction, offset, width in _REPORTED.findall(output)
            if region == name
        ]
        for number, (one, other) in enumerate(zip(made, counted[name], strict=False)):
            if one != other:
                return f"{name} counted a {other} as access {number}, and the guest made a {one}"
        if len(made) != len(counted[name]):
            return f"{name} counted {len(counted[name])} accesses, and the guest made {len(made)}"
    return ""
