"""Packages of Debian, for any architecture: downloaded and unpacked, never installed.

This requires no root: apt works in a separate tree in the cache, and verifies its downloads with Debian's keys as on
any machine.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from . import cache

_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Archive(NamedTuple):
    """Suites of Debian for one architecture, and the directory in the cache with apt's lists of their packages."""

    name: str
    architecture: str
    suites: Mapping[str, tuple[str, ...]]

    def update(self) -> None:
        """Download the lists of packages. Raises `subprocess.CalledProcessError` if apt fails."""
        self.apt("apt-get", "update")

    def unpack(self, packages: Iterable[str], place: Path) -> None:
        """Download packages and extract them into the directory `place`; the archives remain there too."""
        self.apt("apt-get", "download", *packages, directory=place)
        for package in place.glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, place], check=True)

    def apt(self, *command: str, directory: Path | None = None) -> str:
        """Run a command of apt, and return its output."""
        tree = cache.folder() / self.name
        for folder in ("etc/preferences.d", "etc/apt.conf.d", "state/lists/partial", "cache/archives/partial"):
            (tree / folder).mkdir(parents=True, exist_ok=True)
        (tree / "status").touch()
        (tree / "etc/sources.list").write_text(self._sources())
        places = {"Etc": tree / "etc", "State": tree / "state", "Cache": tree / "cache"}
        options = [f"-oDir::{name}={place}" for name, place in places.items()]
        options += [f"-oDir::State::status={tree / 'status'}", "-oAPT::Sandbox::User=", "-qq"]
        options += [f"-oAPT::Architecture={self.architecture}", f"-oAPT::Architectures={self.architecture}"]
        options += ["-oAcquire::Languages=none", "-oAcquire::Retries=3"]
        return subprocess.run(
            [command[0], *options, *command[1:]], check=True, stdout=subprocess.PIPE, text=True, cwd=directory
        ).stdout

    def _sources(self) -> str:
        mirror = _mirror()
        return "".join(
            f"deb [signed-by={_KEYS}] {mirror}/{archive} {suite} main\n"
            for archive, suites in self.suites.items()
            for suite in suites
        )


def unpacked(archive: Archive, name: str, packages: Iterable[str]) -> Path:
    """Return a directory with packages, from the cache; `name` is part of its name."""
    wanted = sorted(packages)

    def fetch(place: Path) -> None:
        archive.update()
        place.mkdir()
        archive.unpack(wanted, place)
        for file in place.glob("*.deb"):
            file.unlink()

    key = hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:12]
    return cache.made(cache.folder() / f"{name}-{archive.architecture}-{key}", fetch)


def _mirror() -> str:
    """Return the Debian mirror of this host's apt, without the archive's name."""
    if chosen := os.environ.get("IOBMD_VM_MIRROR"):
        return chosen
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)"], capture_output=True, text=True, check=True
    ).stdout
    for site in listed.split():
        if site.rstrip("/").endswith("/debian"):
            return site.rstrip("/").removesuffix("/debian")
    sys.exit("apt has no Debian mirror here: set IOBMD_VM_MIRROR to one, without the /debian at its end")
