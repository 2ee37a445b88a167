"""Debian's kernels: found, downloaded, and unpacked separately from the host's, never installed."""

import contextlib
import functools
import hashlib
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from . import cache, modules, vfio_modules
from .architecture import Architecture
from .debian import Archive

_SUITES = {
    "debian": ("bookworm", "trixie", "trixie-backports"),
    "debian-security": ("bullseye-security", "bookworm-security", "trixie-security"),
}
_IMAGE = r"^linux-image-(\d+\.\d+\.\d[\d.+-]*(?:deb[\d.]+)?)-{flavor}$"
_TRIES = 4
_LOOK_AGAIN = 7 * 86400  # seconds after which the mirror is queried again for the newest kernel of a series


class Kernel(NamedTuple):
    """A kernel in the cache."""

    series: str
    """The requested series."""
    release: str
    """Its release according to uname(2)."""
    image: Path
    """The file that QEMU boots: on x86-64 the ELF file, which boots faster than the compressed one."""
    modules: Path
    """An archive of the modules that guests load."""
    architecture: Architecture
    """Its architecture."""


class _Flavor(NamedTuple):
    """Debian's builds of the kernel for one architecture and page size."""

    architecture: Architecture
    name: str
    iommufd: bool
    """Whether its modules of VFIO are replaced by those with iommufd."""

    @property
    def packages(self) -> Archive:
        return Archive(f"apt-kernels-{self.architecture.debian}", self.architecture.debian, _SUITES)


def kernel(architecture: Architecture, series: str) -> Kernel:
    """Return the newest kernel of a series, downloaded if necessary; if the mirror has none, the newest of all.

    A series such as "6.12-16k" is one of kernels with pages of 16 KiB, and "6.12-iommufd" one with modules that
    Debian does not build. A mirror may list a version that it no longer carries: the previous one is then used.
    Raises `subprocess.CalledProcessError` if apt fails for each.
    """
    version, *words = series.split("-")
    pages = [word for word in words if word != "iommufd"]
    flavor = _Flavor(architecture, "-".join([architecture.debian, *pages]), pages != words)
    *others, last = by_age(_releases(flavor), version)[:_TRIES]
    for release in others:
        with contextlib.suppress(subprocess.CalledProcessError):
            return _unpacked(flavor, series, release)
    return _unpacked(flavor, series, last)


def by_age(releases: list[str], series: str) -> list[str]:
    """Return the releases of a series, newest first; of all series if it has none, and for "newest"."""
    own = [release for release in releases if release.startswith((f"{series}.", f"{series}-"))]
    return sorted(own or releases, key=lambda release: [int(n) for n in re.findall(r"\d+", release)], reverse=True)


def _unpacked(flavor: _Flavor, series: str, release: str) -> Kernel:
    key = hashlib.sha256(" ".join(modules.AT_START + modules.BY_TESTS).encode()).hexdigest()[:12]
    fetch = functools.partial(_fetch, flavor, release)
    kind = f"{flavor.name}{'-iommufd' * flavor.iommufd}"
    place = cache.made(cache.folder() / f"{release}-{kind}-{key}", fetch)
    return Kernel(
        series, (place / "release").read_text(), place / "vmlinux", place / "modules.cpio", flavor.architecture
    )


def _releases(flavor: _Flavor) -> list[str]:
    """Return the mirror's list, some days old at most so that the cache is useful; of any age if it is offline."""
    known, ask = cache.folder() / f"releases-{flavor.name}", functools.partial(_ask_mirror, flavor)
    if known.exists() and time.time() - known.stat().st_mtime > _LOOK_AGAIN:
        with contextlib.suppress(subprocess.CalledProcessError):
            cache.made(known.with_name(f"{known.name}.new"), ask).replace(known)
    releases = cache.made(known, ask).read_text().split()
    return vfio_modules.suitable(releases) if flavor.iommufd else releases


def _ask_mirror(flavor: _Flavor, file: Path) -> None:
    flavor.packages.update()
    image = re.compile(_IMAGE.format(flavor=flavor.name), re.MULTILINE)
    file.write_text("\n".join(image.findall(flavor.packages.apt("apt-cache", "pkgnames", "linux-image-"))))


def _fetch(flavor: _Flavor, release: str, place: Path) -> None:
    """Unpack the required files of a release's packages into `place`: one package, or three since Linux 6.19."""
    names = {f"linux-{part}-{release}-{flavor.name}" for part in ("image", "binary", "modules")}
    there = names & set(flavor.packages.apt("apt-cache", "pkgnames", "linux-").split())
    place.mkdir()
    with tempfile.TemporaryDirectory(dir=cache.folder()) as folder:
        root = Path(folder)
        flavor.packages.unpack(sorted(there), root)
        (tree,) = (path for path in root.glob("**/lib/modules/*") if (path / "kernel").is_dir())
        (packed,) = {*root.glob("boot/vmlinuz-*"), *tree.glob("vmlinuz*")}
        (place / "vmlinux").write_bytes(flavor.architecture.kernel(packed.read_bytes()))
        if flavor.iommufd:
            vfio_modules.replace_vfio(flavor.packages, release, flavor.name, tree, root / "iommufd")
        modules.pack(tree, place / "modules.cpio")
        (place / "release").write_text(tree.name)
