"""The house (docs/design.md): imports go down only, files stay small, importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import iobmd

PACKAGE = Path(iobmd.__file__).parent
FLOORS = [
    {"__main__"},
    {"tools"},
    {"cli"},
    {"__init__"},
    {"cache"},
    {"api", "sharing", "dma"},
    {"iommu"},
    {"descriptors"},
    {"backing"},
    {"contents"},
    {"physical", "purgeable", "remote"},
    {"memory"},
    {"pagemap"},
    {"task"},
    {"host"},
    {"procfs"},
    {"_internal"},
    {"errors"},
    {"constants", "units", "_version"},
    {"_native"},
]
"""From the roof to the ground; what stands on one floor does not import each other."""


def rooms() -> dict[Path, str]:
    """Every Python file of the installed package, and its room."""
    return {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}


def floor(room: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if room in names)


def is_module(text: str) -> bool:
    """Whether a string is the name of a module of iobmd, for importlib or `python -m` to load."""
    place = PACKAGE.joinpath(*text.split(".")[1:])
    return text.startswith("iobmd.") and (place.is_dir() or place.with_suffix(".py").exists())


def imported(path: Path) -> set[str]:
    """The modules of iobmd that a file imports, at the top or inside of functions, or names in a string."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "iobmd":
            names |= {f"iobmd.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_module(node.value):
            names.add(node.value)
    found = {name.split(".")[1] for name in names if name.startswith("iobmd.")}
    return {room if any(room in names for names in FLOORS) else "__init__" for room in found}


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room = rooms()[path]
    for other in imported(path) - {room}:
        assert floor(other) > floor(room), f"{path.name} imports {other}, which does not stand below it"


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small(path: Path) -> None:
    """Not counting docstrings: those of one public class may be long."""
    text = path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)
    ]
    written = sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in docstrings)
    assert len(text.splitlines()) - written < 400


@pytest.mark.parametrize("module", ["iobmd", "iobmd.cli"])
def test_import_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"psutil", "rich", "argparse", "subprocess", "ctypes", "dataclasses", "ptrace"} & set(loaded)
