"""Programs that this host may lack: Debian's Python and packages, musl, and packages of the index."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from . import debian
from .architecture import Architecture

_LIBRARIES = (
    "libc6",
    "libgcc-s1",
    "libexpat1",
    "libffi8",
    "zlib1g",
    "libbz2-1.0",
    "liblzma5",
    "libuuid1",
    "libstdc++6",
)
SUITES = {"3.11": ("bookworm", "libssl3"), "3.13": ("trixie", "libssl3t64")}
"""By version of Python: the release of Debian that has it, and the name of OpenSSL there."""


def python(architecture: Architecture, version: str) -> Path:
    """Return a directory with Debian's Python of a version in `SUITES`, and a shell, in the cache."""
    suite, openssl = SUITES[version]
    name = f"python{version}"
    packages = (f"{name}-minimal", f"lib{name}-minimal", f"lib{name}-stdlib", *_LIBRARIES, openssl, "busybox-static")
    return debian.unpacked(_archive(suite, architecture), name, packages)


def packages(architecture: Architecture, version: str, names: Iterable[str]) -> Path:
    """Return a directory with Debian's packages for a version of Python in `SUITES`, in the cache."""
    return debian.unpacked(_archive(SUITES[version][0], architecture), f"packages-{version}", names)


def musl(architecture: Architecture) -> Path:
    """Return a directory with the C library musl, in the cache."""
    return debian.unpacked(_archive("bookworm", architecture), "musl", ["musl"])


def install(architecture: Architecture, names: Iterable[str], site: Path) -> None:
    """Install packages of the index into a directory, in the versions that are installed here."""
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in names]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    platforms = [f"--platform={name}_{architecture.name}" for name in ("manylinux2014", "manylinux_2_28")]
    choice = [*platforms, "--only-binary=:all:", "--no-compile"]
    subprocess.run([*command, *choice, "--target", site, *wanted], check=True)


def _archive(suite: str, architecture: Architecture) -> debian.Archive:
    return debian.Archive(f"apt-{suite}-{architecture.debian}", architecture.debian, {"debian": (suite,)})
