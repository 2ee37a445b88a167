"""The initramfs of a guest: the running Python, the packages that the tests need, and iobmd as built.

It consists of consecutive archives: the payload, which is packed for each run, the kernel's modules, and the base,
which changes only with Python and the packages, and is cached.
"""

import compileall
import functools
import hashlib
import importlib.metadata
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from . import cache, cpio

TREE = Path(__file__).parents[2]
PACKAGES = ("pytest", "pytest-timeout", "hypothesis", "psutil", "rich", "typing_extensions")
SHELL = "/bin/busybox"
_HERE = Path(__file__).parent
_STDLIB = Path(sysconfig.get_path("stdlib"))
_UNUSED = {
    *("__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"),
    *("test", "tests", "tkinter", "turtledemo"),
}
_REQUIRED = re.compile(r"[\w.-]+")


def base() -> Path:
    """Return the archive with Python, its standard library, the packages and a shell."""
    packages = sorted(_with_requirements(PACKAGES))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    made_of = "\n".join([sys.version, sys.base_prefix, *versions, _source("image.py"), _source("cpio.py")])
    key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    return cache.made(cache.folder() / f"base-{key}.cpio", functools.partial(_pack_base, packages))


def payload(archive: Path) -> None:
    """Write the archive with iobmd and its tests."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        ignored = shutil.ignore_patterns("__pycache__", "*.c", "_build")
        for name in ("iobmd", "tests", "docs/examples"):
            shutil.copytree(TREE / name, stage / name, ignore=ignored)
        shutil.copytree(TREE / "tools", stage / "iobmd/tools", ignore=ignored)
        shutil.copy(TREE / "pyproject.toml", stage)
        _compile(stage, Path("/iobmd"))
        with archive.open("wb") as file, cpio.Archive(file) as packed:
            packed.copy(stage, "/iobmd")
            packed.file("/init", (_HERE / "init").read_bytes())


def initramfs(file: Path, command: str, *parts: Path) -> None:
    """Write the initramfs of a guest: the shell script that it runs, `parts`, and the base."""
    with file.open("wb") as joined:
        with cpio.Archive(joined) as packed:
            packed.file("/run", command.encode())
        for part in (*parts, base()):
            with part.open("rb") as archive:
                shutil.copyfileobj(archive, joined)


def _source(name: str) -> str:
    return (_HERE / name).read_text()


def _with_requirements(names: tuple[str, ...]) -> set[str]:
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
    return found


def _pack_base(packages: list[str], archive: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        library = stage / _STDLIB.relative_to("/")
        shutil.copytree(_STDLIB, library, ignore=_not_used, ignore_dangling_symlinks=True)
        for name in packages:
            _copy_package(name, stage / "site")
        _compile(stage, Path("/"))
        with archive.open("wb") as file, cpio.Archive(file) as packed:
            packed.console()
            for empty in ("/proc", "/sys", "/tmp", "/root", "/modules"):
                packed.folder(empty)
            packed.file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
            packed.file(SHELL, Path(shutil.which("busybox") or SHELL).read_bytes())
            packed.copy(stage, "/")
            interpreter = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
            packed.file(interpreter, interpreter.read_bytes())
            packed.link("/bin/python3", str(interpreter))
            for library in _libraries([interpreter, *stage.rglob("*.so*")], stage):
                packed.file(library, library.resolve().read_bytes())


def _not_used(_folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in _UNUSED or name.startswith("config-")}


def _copy_package(name: str, site: Path) -> None:
    """Copy a distribution's modules and metadata, without its scripts and tests."""
    for file in importlib.metadata.files(name) or ():
        source = Path(str(file.locate()))
        if ".." in file.parts or _UNUSED & set(file.parts) or not source.is_file():
            continue
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, site / file)


def _compile(folder: Path, where: Path) -> None:
    """Compile beforehand: it takes seconds under emulation. Times are omitted, because an initramfs has none."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(folder, stripdir=folder, prependdir=where, quiet=2, invalidation_mode=mode)


def _libraries(programs: list[Path], stage: Path) -> set[Path]:
    """Return the shared libraries that programs are linked with, and the dynamic loader."""
    found: set[Path] = set()
    for program in programs:
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
        found |= {Path(path) for path in re.findall(r"(/\S+) \(0x", listed)}
    return {path for path in found if not path.is_relative_to(stage)}
