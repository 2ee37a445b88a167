"""The programs of a guest: Python, the packages that the tests need, and a shell.

They are those of this host, or Debian's where its programs cannot run.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from . import foreign
from .architecture import Architecture

PACKAGES = frozenset({"pytest", "pytest-timeout", "hypothesis", "psutil", "rich", "typing_extensions"})
"""Those that all tests need."""
UNUSED = {
    *("__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"),
    *("test", "tests", "tkinter", "turtledemo"),
}
_SHELL = "bin/busybox"
_STDLIB = Path(sysconfig.get_path("stdlib"))
_REQUIRED = re.compile(r"[\w.-]+")


def versions(names: frozenset[str]) -> str:
    """Return the versions of Python and of packages, for the name of an archive."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name in _with_requirements(names)]
    return "\n".join([sys.version, sys.base_prefix, *packages])


def stage(architecture: Architecture, root: Path) -> None:
    """Write the programs into the directory `root` of a guest, the packages into its directory `site`."""
    (_stage_debian if architecture.foreign else _stage_own)(architecture, root)
    stage_packages(architecture, PACKAGES, root)


def stage_packages(architecture: Architecture, names: frozenset[str], root: Path) -> None:
    """Write packages, with those that they require, into the directory `site` of a guest's directory `root`."""
    required, site = _with_requirements(names), root / "site"
    if architecture.foreign and required:
        foreign.install(architecture, required, site)
        for unused in [path for path in site.rglob("*") if path.name in UNUSED]:
            if unused.exists():  # it may have been deleted with its parent
                shutil.rmtree(unused)
        return
    for name in required:
        _copy_package(name, site)
    for path in _libraries([*site.rglob("*.so*")], root):
        _copy(path, _place(root, path))


def debian_packages(architecture: Architecture, names: tuple[str, ...]) -> Path:
    """Return a directory with packages of Debian for Python of this version, in the cache."""
    return foreign.packages(architecture, _debian_version(architecture), names)


def _stage_own(_architecture: Architecture, root: Path) -> None:
    shutil.copytree(_STDLIB, _place(root, _STDLIB), ignore=_not_used, ignore_dangling_symlinks=True)
    interpreter = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    _copy(Path(shutil.which("busybox") or f"/{_SHELL}"), root / _SHELL)
    for path in (interpreter, *_libraries([interpreter, *root.rglob("*.so*")], root)):
        _copy(path, _place(root, path))
    (root / "bin/python3").symlink_to(interpreter)


def _stage_debian(architecture: Architecture, root: Path) -> None:
    packages = foreign.python(architecture, _debian_version(architecture))
    for name in ("bin", "lib", "usr/bin", "usr/lib"):
        if (packages / name).is_dir() and not (packages / name).is_symlink():
            shutil.copytree(packages / name, root / name, ignore=_not_used, symlinks=True)
    (interpreter,) = (root / "usr/bin").glob("python3.*")
    (root / "bin").mkdir(exist_ok=True)
    (root / "bin/python3").symlink_to(f"/usr/bin/{interpreter.name}")


def _debian_version(architecture: Architecture) -> str:
    """Return the version of this Python, which must be one of Debian's: it compiles the modules of the guest's.

    These would take minutes under emulation.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version not in foreign.SUITES:
        known = " or ".join(foreign.SUITES)
        sys.exit(f"guests of {architecture.name} need Python {known}, which Debian has, and this is {version}")
    return version


def _with_requirements(names: frozenset[str]) -> list[str]:
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower()
        if name in found:
            continue
        found.add(name)
        for requirement in importlib.metadata.requires(name) or ():
            if ";" not in requirement and (required := _REQUIRED.match(requirement)):
                waiting.append(required[0])
    return sorted(found)


def _not_used(_folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in UNUSED or name.startswith("config-")}


def _copy_package(name: str, site: Path) -> None:
    """Copy a distribution's modules and metadata, without its scripts and tests."""
    for file in importlib.metadata.files(name) or ():
        source = Path(str(file.locate()))
        if ".." not in file.parts and not UNUSED & set(file.parts) and source.is_file():
            _copy(source, site / file)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def _place(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _libraries(programs: list[Path], root: Path) -> set[Path]:
    """Return the shared libraries that programs are linked with, and the dynamic loader."""
    found: set[Path] = set()
    for program in programs:
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
        found |= {Path(path) for path in re.findall(r"(/\S+) \(0x", listed)}
    return {path for path in found if not path.is_relative_to(root)}
