"""The disk of a guest with an NVMe controller: the data that the guest must write, and the check that it did."""

import random
from pathlib import Path

MIB = 1 << 20


def make(image: Path, mebibytes: int) -> Path:
    """Create an empty disk image, and return its path."""
    with image.open("wb") as file:
        file.truncate(mebibytes * MIB)
    return image


def pattern(index: int) -> bytes:
    """Return the data that the guest writes to the MiB number `index`; no two are equal."""
    return random.Random(index).randbytes(MIB)


def compare(image: Path) -> str:
    """Return where an image differs from the data that was to be written; "" if it does not."""
    with image.open("rb") as file:
        for index in range(image.stat().st_size // MIB):
            if file.read(MIB) != pattern(index):
                return f"MiB {index} of the disk image is not what was written"
    return ""
