"""The checks of a wheel: auditing tools, its contents, and an import by an interpreter of its platform."""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..vm import foreign
from ..vm.architecture import ARCHITECTURES
from .build import Target, run

_LEFTOVERS = re.compile(r"\.(?:pyx|pxd|pxi|h|o|py[co])$|(?:^|/)(?:build|tests|docs)/|(?:^|/)\.|~$")
_INSTALLED = (
    "iobmd/py.typed",
    "/share/man/man1/iobmd.1",
    "/share/bash-completion/completions/iobmd",
    "/licenses/LICENSE",
)
_PYTHON = "3.11"  # the oldest supported version
_PROGRAM = """
import iobmd, platform
with iobmd.allocate(1 << 16, wired=False) as buf:
    buf.writeBytes(0, b"hello")
    assert buf.readBytes(0, 5) == b"hello"
print("imported by Python", platform.python_version(), "on", platform.machine())
"""


def of_metadata(tools: Path, file: Path) -> None:
    """Check that an index accepts the metadata and can render the description."""
    run([tools / "bin/twine", "check", "--strict", file])


def of_symbols(tools: Path, wheel: Path) -> None:
    """Check that the extensions use only the stable ABI of the Python version in the wheel's tag."""
    run([tools / "bin/abi3audit", "--strict", "--verbose", wheel])


def of_contents(wheel: Path) -> None:
    """Raise `ValueError` if the wheel lacks a file, or contains leftovers of a build or symbols for debuggers."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        if leftovers := [name for name in names if _LEFTOVERS.search(name)]:
            raise ValueError(f"{wheel.name} contains {', '.join(leftovers)}")
        if missing := [path for path in _INSTALLED if not any(name.endswith(path) for name in names)]:
            raise ValueError(f"{wheel.name} does not contain {', '.join(missing)}")
        for name in names:
            if name.endswith(".so") and (found := _symbol_sections(archive.extract(name, folder))):
                raise ValueError(f"{name} in {wheel.name} has the sections {', '.join(found)}")


def _symbol_sections(extension: str) -> list[str]:
    listed = run(["readelf", "--section-headers", "--wide", extension])
    return re.findall(r"^ *\[ *\d+\] (\.z?debug\S*|\.symtab)", listed, re.M)


def loaded(wheel: Path, target: Target, work: Path) -> str:
    """Install the wheel, load it by the means available on this machine, and return a description of the result.

    Wheels for glibc are imported, under emulation if necessary. Debian has no Python for musl: instead, musl's loader
    resolves the symbols of every extension, and those that it does not find must belong to Python.
    """
    site = _installed(wheel, target, work / "site")
    if target.platform.startswith("musllinux"):
        return _resolved_by_musl(site, target)
    if target.machine == "x86_64":
        return run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{_PROGRAM}"]).strip()
    root = foreign.python(ARCHITECTURES[target.machine], _PYTHON)
    python: list[str | Path] = ["qemu-aarch64-static", "-L", root, root / f"usr/bin/python{_PYTHON}"]
    variables = {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    return run([*python, "-P", "-c", _PROGRAM], variables=variables).strip()


def _installed(wheel: Path, target: Target, site: Path) -> Path:
    """Install the wheel as pip would on its platform, according to its tags, without its dependencies."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    choice: list[str | Path] = [
        "--target",
        site,
        "--platform",
        target.platform,
        "--python-version",
        "3.11",
        "--only-binary=:all:",
    ]
    run([*command, *choice, wheel])
    return site


def _resolved_by_musl(site: Path, target: Target) -> str:
    extensions = sorted(site.rglob("*.so"))
    loader: list[str | Path] = ["/lib/ld-musl-x86_64.so.1"]
    if target.machine != "x86_64":
        root = foreign.musl(ARCHITECTURES[target.machine])
        loader = [f"qemu-{target.machine}-static", root / f"lib/ld-musl-{target.machine}.so.1"]
    for extension in extensions:
        listed = subprocess.run([*loader, "--list", extension], capture_output=True, text=True, check=False)
        missing = re.findall(r": (\S+): symbol not found", listed.stdout + listed.stderr)
        if not missing or [name for name in missing if not re.match(r"_?Py", name)]:
            raise ValueError(f"musl does not load {extension.name}: {listed.stdout}{listed.stderr}")
    return f"{len(extensions)} extensions resolved by musl's loader"
