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

from . import cache, modules, vmlinux
from .debian import Archive

SERIES = ("5.10", "6.1", "6.12", "6.18", "newest")
"""The kernels of the tests: every long-term series since io_uring's pins are usable, and the newest kernel."""

_ARCHIVE = Archive(
    "apt",
    "amd64",
    {
        "debian": ("bookworm", "trixie", "trixie-backports"),
        "debian-security": ("bullseye-security", "bookworm-security", "trixie-security"),
    },
)
_IMAGE = re.compile(r"^linux-image-(\d+\.\d+\.\d[\d.+-]*(?:deb[\d.]+)?)-amd64$", re.MULTILINE)
_TRIES = 4
_LOOK_AGAIN = 7 * 86400  # seconds after which the mirror is queried again for the newest kernel of a series


class Kernel(NamedTuple):
    """A kernel in the cache."""

    series: str
    """The requested series."""
    release: str
    """Its release according to uname(2)."""
    image: Path
    """Its ELF file, which boots faster than the compressed one."""
    modules: Path
    """An archive of the modules that guests load."""


def kernel(series: str) -> Kernel:
    """Return the newest kernel of a series, downloaded if necessary; if the mirror has none, the newest of all.

    A mirror may list a version that it no longer carries: the previous one is then used.
    Raises `subprocess.CalledProcessError` if apt fails for each.
    """
    *others, last = by_age(_releases(), series)[:_TRIES]
    for release in others:
        with contextlib.suppress(subprocess.CalledProcessError):
            return _unpacked(series, release)
    return _unpacked(series, last)


def by_age(releases: list[str], series: str) -> list[str]:
    """Return the releases of a series, newest first; of all series if it has none, and for "newest"."""
    own = [release for release in releases if release.startswith((f"{series}.", f"{series}-"))]
    return sorted(own or releases, key=lambda release: [int(n) for n in re.findall(r"\d+", release)], reverse=True)


def _unpacked(series: str, release: str) -> Kernel:
    key = hashlib.sha256(" ".join(modules.WANTED).encode()).hexdigest()[:12]
    place = cache.made(cache.folder() / f"{release}-{key}", functools.partial(_fetch, release))
    return Kernel(series, (place / "release").read_text(), place / "vmlinux", place / "modules.cpio")


def _releases() -> list[str]:
    """Return the mirror's list, some days old at most so that the cache is useful; of any age if it is offline."""
    known = cache.folder() / "releases"
    if known.exists() and time.time() - known.stat().st_mtime > _LOOK_AGAIN:
        with contextlib.suppress(subprocess.CalledProcessError):
            cache.made(known.with_name("releases.new"), _ask_mirror).replace(known)
    return cache.made(known, _ask_mirror).read_text().split()


def _ask_mirror(file: Path) -> None:
    _ARCHIVE.update()
    releases = _IMAGE.findall(_ARCHIVE.apt("apt-cache", "pkgnames", "linux-image-"))
    file.write_text("\n".join(releases))


def _fetch(release: str, place: Path) -> None:
    """Unpack the required files of a release's packages into `place`: one package, or three since Linux 6.19."""
    names = {f"linux-{part}-{release}-amd64" for part in ("image", "binary", "modules")}
    there = names & set(_ARCHIVE.apt("apt-cache", "pkgnames", "linux-").split())
    place.mkdir()
    with tempfile.TemporaryDirectory(dir=cache.folder()) as folder:
        root = Path(folder)
        _ARCHIVE.unpack(sorted(there), root)
        (tree,) = (path for path in root.glob("**/lib/modules/*") if (path / "kernel").is_dir())
        (compressed,) = {*root.glob("boot/vmlinuz-*"), *tree.glob("vmlinuz*")}
        (place / "vmlinux").write_bytes(vmlinux.extract(compressed.read_bytes()))
        modules.pack(tree, place / "modules.cpio")
        (place / "release").write_text(tree.name)
