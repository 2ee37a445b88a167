"""iobmd's extensions, and the C programs of its tests, compiled for the architecture of a guest."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

from . import cache
from .architecture import Architecture

TREE = Path(__file__).parents[2]
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "cython_ext", "iobmd", "tools")
_OPTIONS = ("-O2", "-Wall", "-Wextra", "-Werror", "-pthread")


def extensions(architecture: Architecture) -> Path:
    """Return a directory, in the cache, with the extensions in the places that they have in the source tree."""
    parts = [TREE / "pyproject.toml", *(TREE / "cython_ext").iterdir(), *(TREE / "tools/bench").glob("*.pyx")]
    digest = hashlib.sha256(architecture.compiler.encode())
    for path in sorted(parts):
        digest.update(path.read_bytes())
    place = cache.folder() / f"extensions-{architecture.name}-{digest.hexdigest()[:12]}"
    return cache.made(place, functools.partial(_build, architecture))


def programs(architecture: Architecture, sources: Iterable[Path], folder: Path) -> None:
    """Compile C programs into a directory, each under the name of its source without the suffix.

    Raises `subprocess.CalledProcessError` if one cannot be compiled.
    """
    compiler = architecture.compiler if architecture.foreign else "cc"
    folder.mkdir(parents=True)
    for source in sources:
        subprocess.run([compiler, *_OPTIONS, "-o", folder / source.stem, source], check=True)


def headers(place: Path) -> Path:
    """Make a directory with only the headers of this Python, without those of the host's C library, and return it.

    They are suitable for every target, because all targets have 64-bit pointers and the stable ABI depends on nothing
    else. Debian's pyconfig.h includes the file of the target, which is not installed, and is replaced by that of this
    machine.
    """
    place.mkdir(parents=True)
    for entry in Path(sysconfig.get_path("include")).iterdir():
        (place / entry.name).symlink_to(entry)
    (place / "pyconfig.h").unlink()
    (place / "pyconfig.h").symlink_to(sysconfig.get_config_h_filename())
    return place


def _build(architecture: Architecture, place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="iobmd-cross.") as folder:
        work = Path(folder)
        for name in _SOURCES:  # a copy, because setuptools reuses objects
            _copy(TREE / name, work / "source" / name)
        compiler = f"{architecture.compiler} -I{headers(work / 'include')}"
        variables = {
            "CC": compiler,
            "LDSHARED": f"{compiler} -shared -s",
            "_PYTHON_HOST_PLATFORM": f"linux-{architecture.name}",
        }
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--wheel-dir", work, work / "source"], check=True, env={**os.environ, **variables})
        (wheel,) = work.glob("*.whl")
        shutil.unpack_archive(wheel, work / "unpacked", "zip")
        for extension in (work / "unpacked").rglob("*.so"):
            copied = place / extension.relative_to(work / "unpacked")
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(extension, copied)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
