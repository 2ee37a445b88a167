"""The kernel modules that guests load, decompressed and in the order of their dependencies."""

import lzma
import re
import subprocess
from pathlib import Path

from . import cpio

WANTED = ("vfio_iommu_type1", "vfio_pci", "uio_pci_generic", "uio_cif", "zram", "lzo_rle", "lz4", "zstd")
_NAME = re.compile(r"\.ko.*$")
_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")


def pack(tree: Path, archive: Path) -> None:
    """Write the required modules of lib/modules/RELEASE to `archive`, with their order in /modules/order."""
    found = load(tree, WANTED)
    with archive.open("wb") as file, cpio.Archive(file) as packed:
        packed.file("/modules/order", "".join(f"{name}\n" for name in found).encode(), 0o644)
        for name, code in found.items():
            packed.file(f"/modules/{name}.ko", code, 0o644)


def load(tree: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Return the modules and their dependencies, each after those on which it depends, except built-in ones."""
    there = {_name(path): path for path in tree.glob("kernel/**/*.ko*")}
    loaded: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in loaded or name not in there:
            return
        code = _read(there[name])
        needs = _DEPENDS.search(code)
        for needed in filter(None, needs[1].decode().split(",") if needs else ()):
            add(needed.replace("-", "_"))
        loaded[name] = code

    for name in wanted:
        add(name)
    return loaded


def _name(path: Path) -> str:
    return _NAME.sub("", path.name).replace("-", "_")


def _read(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", path], stdout=subprocess.PIPE, check=True).stdout
    return path.read_bytes()
