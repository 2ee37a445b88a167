"""Debian's kernels: found, downloaded, and unpacked separately from the host's, never installed.

Nothing here needs root: apt works in a tree of its own in the cache, with the suites that carry the kernels, and
verifies what it fetches by Debian's keys as it does on any machine.
"""

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from . import cache, modules, vmlinux

SERIES = ("5.10", "6.1", "6.12", "6.18", "newest")
"""What the tests run on: every long-term kernel since io_uring's pins are usable, and the newest of all."""

_SUITES = {
    "debian": ("bookworm", "trixie", "trixie-backports"),
    "debian-security": ("bullseye-security", "bookworm-security", "trixie-security"),
}
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_IMAGE = re.compile(r"^linux-image-(\d+\.\d+\.\d[\d.+-]*(?:deb[\d.]+)?)-amd64$", re.MULTILINE)
_TRIES = 4
_LOOK_AGAIN = 7 * 86400  # seconds after which the mirror is queried again for the newest kernel of a series


class Kernel(NamedTuple):
    """A kernel in the cache."""

    series: str
    """The series that was asked for."""
    release: str
    """What uname(2) calls it."""
    image: Path
    """The ELF file of it, which boots faster than the compressed one."""
    modules: Path
    """An archive of the modules that guests load."""


def kernel(series: str) -> Kernel:
    """Return the newest kernel of a series, fetched if need be; where the mirror lacks the series, the newest of all.

    A mirror may list a version that it no longer carries: the previous one is then used.
    Raises `subprocess.CalledProcessError` when apt fails for each.
    """
    *others, last = by_age(_releases(), series)[:_TRIES]
    for release in others:
        with contextlib.suppress(subprocess.CalledProcessError):
            return _unpacked(series, release)
    return _unpacked(series, last)


def by_age(releases: list[str], series: str) -> list[str]:
    """Return the releases of a series, the newest first; of all series where there is none, and for "newest"."""
    own = [release for release in releases if release.startswith((f"{series}.", f"{series}-"))]
    return sorted(own or releases, key=lambda release: [int(n) for n in re.findall(r"\d+", release)], reverse=True)


def _unpacked(series: str, release: str) -> Kernel:
    place = cache.made(cache.folder() / release, functools.partial(_fetch, release))
    return Kernel(series, (place / "release").read_text(), place / "vmlinux", place / "modules.cpio")


def _releases() -> list[str]:
    """Return all that the mirror lists, as of some days ago, so that the cache is of use; or ever, if it is away."""
    known = cache.folder() / "releases"
    if known.exists() and time.time() - known.stat().st_mtime > _LOOK_AGAIN:
        with contextlib.suppress(subprocess.CalledProcessError):
            cache.made(known.with_name("releases.new"), _ask_mirror).replace(known)
    return cache.made(known, _ask_mirror).read_text().split()


def _ask_mirror(file: Path) -> None:
    releases = _IMAGE.findall(_apt("apt-cache", "pkgnames", "linux-image-", update=True))
    file.write_text("\n".join(releases))


def _fetch(release: str, place: Path) -> None:
    """Unpack what is needed of a release's packages into `place`: one package, or three since 6.19."""
    names = {f"linux-{part}-{release}-amd64" for part in ("image", "binary", "modules")}
    there = names & set(_apt("apt-cache", "pkgnames", "linux-").split())
    place.mkdir()
    with tempfile.TemporaryDirectory(dir=cache.folder()) as folder:
        _apt("apt-get", "download", *sorted(there), directory=folder)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
        root = Path(folder)
        (tree,) = (path for path in root.glob("**/lib/modules/*") if (path / "kernel").is_dir())
        (compressed,) = {*root.glob("boot/vmlinuz-*"), *tree.glob("vmlinuz*")}
        (place / "vmlinux").write_bytes(vmlinux.extract(compressed.read_bytes()))
        modules.pack(tree, place / "modules.cpio")
        (place / "release").write_text(tree.name)


def _apt(*command: str, update: bool = False, directory: str | None = None) -> str:
    """Run a command of apt in the cache's own tree, and return what it says."""
    tree = cache.folder() / "apt"
    for folder in ("etc/preferences.d", "etc/apt.conf.d", "state/lists/partial", "cache/archives/partial"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    (tree / "status").touch()
    (tree / "etc/sources.list").write_text(_sources())
    places = {"Etc": tree / "etc", "State": tree / "state", "Cache": tree / "cache", "State::status": tree / "status"}
    options = [f"-oDir::{name}={place}" for name, place in places.items()]
    options += ["-oAPT::Architecture=amd64", "-oAPT::Architectures=amd64", "-oAPT::Sandbox::User=", "-qq"]
    options += ["-oAcquire::Languages=none", "-oAcquire::Retries=3"]
    if update:
        subprocess.run(["apt-get", *options, "update"], check=True)
    return subprocess.run(
        [command[0], *options, *command[1:]], check=True, stdout=subprocess.PIPE, text=True, cwd=directory
    ).stdout


def _mirror() -> str:
    """Return where this host's apt gets Debian from, without the archive's name."""
    if chosen := os.environ.get("IOBMD_VM_MIRROR"):
        return chosen
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)"], capture_output=True, text=True, check=True
    ).stdout
    for site in listed.split():
        if site.rstrip("/").endswith("/debian"):
            return site.rstrip("/").removesuffix("/debian")
    sys.exit("apt has no Debian mirror here: set IOBMD_VM_MIRROR to one, without the /debian at its end")


def _sources() -> str:
    mirror = _mirror()
    return "".join(
        f"deb [signed-by={_KEYS}] {mirror}/{archive} {suite} main\n"
        for archive, suites in _SUITES.items()
        for suite in suites
    )
