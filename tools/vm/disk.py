"""The disk of a guest with an NVMe controller: what the guest is to write there, and whether it did."""

import random
from pathlib import Path

MIB = 1 << 20


def make(image: Path, mebibytes: int) -> Path:
    """Make an empty disk image, and return it."""
    with image.open("wb") as file:
        file.truncate(mebibytes * MIB)
    return image


def pattern(index: int) -> bytes:
    """Return what the guest writes to the MiB number `index`: no two are alike."""
    return random.Random(index).randbytes(MIB)


def compare(image: Path) -> str:
    """Return where an image is not what was to be written, "" when each byte is."""
    with image.open("rb") as file:
        for index in range(image.stat().st_size // MIB):
            if file.read(MIB) != pattern(index):
                return f"the MiB {index} of the disk image is not what was written"
    return ""
