"""The initramfs of a guest: Python, the packages that the tests need, and iobmd as built.

It consists of consecutive archives: the payload, which is packed for each run, the modules of the kernel, and, in the
cache, the base and the packages of some profiles, which change only with their versions.
"""

import compileall
import functools
import hashlib
import py_compile
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import cache, cpio, cross, userland
from .architecture import Architecture
from .cross import TREE

_HERE = Path(__file__).parent


def base(architecture: Architecture) -> Path:
    """Return the archive with Python, its standard library, the packages and a shell."""
    return _cached("base", architecture, userland.versions(userland.PACKAGES), _pack_base)


def packages(architecture: Architecture, names: frozenset[str]) -> Path:
    """Return the archive with packages that only some tests need."""
    return _cached("packages", architecture, userland.versions(names), functools.partial(_pack_packages, names))


def _cached(kind: str, architecture: Architecture, versions: str, pack: Callable[[Architecture, Path], None]) -> Path:
    sources = [(_HERE / name).read_text() for name in ("image.py", "cpio.py", "userland.py", "foreign.py")]
    key = hashlib.sha256("\n".join([versions, *sources]).encode()).hexdigest()[:12]
    name = f"{kind}-{architecture.name}-{key}.cpio"
    return cache.made(cache.folder() / name, functools.partial(pack, architecture))


def debian_packages(architecture: Architecture, names: tuple[str, ...]) -> Path:
    """Return the archive with packages of Debian, whose Python has the version of that in `base`."""
    place = userland.debian_packages(architecture, names)
    return cache.made(place.with_name(f"{place.name}.cpio"), functools.partial(_pack_debian_packages, place))


def payload(archive: Path, architecture: Architecture) -> None:
    """Write the archive with iobmd, its tests and documentation, and the C programs of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        built = ("*.so",) if architecture.foreign else ()
        ignored = shutil.ignore_patterns("__pycache__", "_build", *built)
        for name in ("iobmd", "tests", "docs"):
            shutil.copytree(TREE / name, stage / name, ignore=ignored)
        shutil.copytree(TREE / "tools", stage / "iobmd/tools", ignore=ignored)
        for name in ("README.md", "pyproject.toml"):
            shutil.copy(TREE / name, stage)
        if architecture.foreign:
            shutil.copytree(cross.extensions(architecture), stage, dirs_exist_ok=True)
        _compile(stage, Path("/iobmd"))
        cross.programs(architecture, (TREE / "tests/support").glob("*.c"), stage / "programs")
        with archive.open("wb") as file, cpio.Archive(file) as packed:
            packed.copy(stage, "/iobmd")
            packed.file("/init", (_HERE / "init").read_bytes())
            packed.file("/usr/local/bin/cc", (_HERE / "cc").read_bytes())


def initramfs(file: Path, command: str, *parts: Path) -> None:
    """Write the initramfs of a guest: the shell script that it runs, and `parts`."""
    with file.open("wb") as joined:
        with cpio.Archive(joined) as packed:
            packed.file("/run", command.encode())
        for part in parts:
            with part.open("rb") as archive:
                shutil.copyfileobj(archive, joined)


def _pack_base(architecture: Architecture, archive: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        userland.stage(architecture, stage)
        _compile(stage, Path("/"))
        with archive.open("wb") as file, cpio.Archive(file) as packed:
            packed.console()
            for empty in ("/proc", "/sys", "/tmp", "/root"):
                packed.folder(empty)
            packed.file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
            packed.copy(stage, "/")


def _pack_packages(names: frozenset[str], architecture: Architecture, archive: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        userland.stage_packages(architecture, names, stage)
        _compile(stage, Path("/"))
        with archive.open("wb") as file, cpio.Archive(file) as packed:
            packed.copy(stage, "/")


def _pack_debian_packages(place: Path, archive: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, archive.open("wb") as file, cpio.Archive(file) as packed:
        stage = Path(folder)
        for name, there in (("usr/lib/python3/dist-packages", "site"), ("etc", "etc"), ("lib", "lib")):
            if (place / name).exists():
                shutil.copytree(place / name, stage / there, symlinks=True)
        for libraries in place.glob("usr/lib/*-linux-gnu"):
            shutil.copytree(libraries, stage / libraries.relative_to(place), symlinks=True)
        _compile(stage, Path("/"))
        packed.copy(stage, "/")


def _compile(folder: Path, where: Path) -> None:
    """Compile beforehand: it takes seconds under emulation. Times are omitted, because an initramfs has none."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(folder, stripdir=folder, prependdir=where, quiet=2, invalidation_mode=mode)
