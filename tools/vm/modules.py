"""The kernel modules of guests, decompressed, where modprobe finds them."""

import lzma
import re
import subprocess
import tempfile
from pathlib import Path

from . import cpio

AT_START = ("vfio_iommu_type1", "vfio_pci", "uio_pci_generic", "uio_cif", "zram", "lzo_rle", "lz4", "zstd")
"""Those that every guest loads when it starts."""
BY_TESTS = ("vivid", "virtio_pci", "virtio_net", "crc32_generic", "ib_uverbs", "rdma_rxe")
"""Those that tests load, with parameters."""
_NAME = re.compile(r"\.ko.*$")
_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")


def pack(tree: Path, archive: Path) -> None:
    """Write the required modules of `tree`, which is lib/modules/RELEASE, to `archive`, with an index for modprobe.

    /modules lists those to load when a guest starts.
    """
    found = load(tree, AT_START + BY_TESTS)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "lib/modules", tree.name)
        place.mkdir(parents=True)
        for name, code in found.items():
            (place / f"{name}.ko").write_bytes(code)
        subprocess.run(["busybox", "depmod", "-b", folder, tree.name], check=True)
        with archive.open("wb") as file, cpio.Archive(file) as packed:
            packed.file("/modules", "".join(f"{name}\n" for name in AT_START if name in found).encode(), 0o644)
            packed.copy(place.parent, "/lib/modules")


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
