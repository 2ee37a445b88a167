"""The sdist, and a wheel for each platform, compiled from it by zig's C compiler.

zig is a package of the index (`ziglang`): clang with the headers of the C libraries and of Linux, and stubs of each
version of glibc. A wheel therefore does not depend on the C library of the machine that builds it, and no container
is needed.
"""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ..vm.cross import TREE, headers


class Target(NamedTuple):
    """A platform to build for."""

    triple: str
    """The name that zig uses, with the version of glibc."""
    machine: str
    platform: str
    """The tag of the wheel: glibc 2.17 is the oldest for both architectures, musl 1.2 is that of Alpine 3.13."""


TARGETS = {
    "manylinux-x86_64": Target("x86_64-linux-gnu.2.17", "x86_64", "manylinux_2_17_x86_64"),
    "musllinux-x86_64": Target("x86_64-linux-musl", "x86_64", "musllinux_1_2_x86_64"),
    "manylinux-aarch64": Target("aarch64-linux-gnu.2.17", "aarch64", "manylinux_2_17_aarch64"),
    "musllinux-aarch64": Target("aarch64-linux-musl", "aarch64", "musllinux_1_2_aarch64"),
}


def run(
    command: Sequence[str | Path], directory: Path | None = None, variables: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Run a command, and return its output. If it fails, its output is printed, and `CalledProcessError` raised."""
    try:
        return subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
            env={**os.environ, **variables},
        ).stdout
    except subprocess.CalledProcessError as error:
        print(error.stdout, end="", flush=True)
        raise


def sdist(tools: Path, output: Path) -> Path:
    """Build the sdist into the directory `output`."""
    output.mkdir(parents=True, exist_ok=True)
    run(
        [tools / "bin/python", "-m", "build", "--sdist", "--no-isolation", "--outdir", output, TREE],
        variables=_dated(),
    )
    return max(output.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)


def wheel(tools: Path, sdist: Path, target: Target, work: Path, output: Path) -> Path:
    """Build a wheel from the sdist in the directory `work`, and write it to `output` with the appropriate tag.

    auditwheel chooses the tag from the symbols that the extensions use, and refuses unknown libraries.
    Raises `ValueError` if the tag is not that of the target: an extension has begun to use a newer C library.
    """
    with tarfile.open(sdist) as archive:  # for each target, because setuptools reuses objects
        archive.extractall(work, filter="data")
    compiler = f"{tools}/bin/python -m ziglang cc -target {target.triple} -I{headers(work / 'include')}"
    source = work / sdist.name.removesuffix(".tar.gz")
    run(
        [tools / "bin/python", "-m", "build", "--wheel", "--no-isolation", "--outdir", work, source],
        variables={
            # Without optimization, zig makes programs abort on undefined behavior. -s: symbols are only useful to
            # debuggers.
            "CC": f"{compiler} -fno-sanitize=undefined",
            "LDSHARED": f"{compiler} -shared -s",
            "_PYTHON_HOST_PLATFORM": f"linux-{target.machine}",
        }
        | _dated(),
    )
    (built,) = work.glob("*.whl")
    if target.platform.startswith("musllinux"):
        built = _with_alpine_libc(tools, built, target, work)
    tagged = work / "tagged"
    auditwheel: list[str | Path] = [tools / "bin/auditwheel", "repair", "--wheel-dir", tagged, built]
    run(auditwheel, variables={"PATH": f"{tools / 'bin'}:{os.environ['PATH']}"})
    (found,) = tagged.glob("*.whl")
    if target.platform not in found.stem.split("-")[-1].split("."):
        raise ValueError(f"{found.name} is not for {target.platform}: auditwheel show --verbose {built} shows why")
    return Path(shutil.move(found, output / found.name))


def _with_alpine_libc(tools: Path, wheel: Path, target: Target, work: Path) -> Path:
    """Return the wheel with extensions that need musl under its name on Alpine, which auditwheel recognizes.

    zig uses the name libc.so. The loader accepts that too, but auditwheel finds another file of that name on this
    host.
    """
    python: list[str | Path] = [tools / "bin/python", "-m", "wheel"]
    run([*python, "unpack", "--dest", work / "unpacked", wheel])
    (root,) = (work / "unpacked").iterdir()
    for extension in root.rglob("*.so"):
        name = f"libc.musl-{target.machine}.so.1"
        run([tools / "bin/patchelf", "--replace-needed", "libc.so", name, extension])
    (work / "packed").mkdir()
    run([*python, "pack", "--dest-dir", work / "packed", root])
    (packed,) = (work / "packed").glob("*.whl")
    return packed


def _dated() -> dict[str, str]:
    """Return the timestamp of archived files: that of the last commit, so that equal sources yield equal files."""
    if "SOURCE_DATE_EPOCH" in os.environ or not (TREE / ".git").exists():
        return {}
    return {"SOURCE_DATE_EPOCH": run(["git", "log", "-1", "--format=%ct"], TREE).strip()}
