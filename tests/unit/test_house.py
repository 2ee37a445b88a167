"""The architecture (docs/design.md): imports only go down, without cycles, files are small, importing is fast."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import iobmd.tools
import pytest

import iobmd

PACKAGE = Path(iobmd.__file__).parent
TOOLS = Path(iobmd.tools.__file__).parent  # next to the package in a checkout, and inside it if installed
LEVELS = [
    {"__main__"},
    {"tools"},
    {"cli"},
    {"__init__"},
    {"cache", "dmabuf", "rdma"},
    {"api", "sharing", "dma"},
    {"iommu"},
    {"descriptors"},
    {"backing"},
    {"physical", "purgeable", "remote"},
    {"memory"},
    {"pagemap", "device"},
    {"task"},
    {"host"},
    {"procfs"},
    {"_internal"},
    {"errors"},
    {"constants", "printable", "units", "_version"},
    {"_native"},
]
"""From the top to the bottom; packages of one level do not import each other."""


MAP = Path(__file__).parents[2] / "docs" / "design.md"


def modules() -> dict[str, Path]:
    """Return the file of every module, by its name."""
    found = {}
    for name, root in (("iobmd", PACKAGE), ("iobmd.tools", TOOLS)):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def packages() -> dict[Path, str]:
    """Return every Python file, and its package."""
    return {path: (*name.split("."), "__init__")[1] for name, path in MODULES.items()}


def level(package: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if package in names)


def imported(path: Path) -> set[str]:
    """Return the modules of iobmd that a file imports, at the top or in functions, or names in a string."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "iobmd":
            names |= {f"iobmd.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and node.value in MODULES:
            names.add(node.value)
    found = {name.split(".")[1] for name in names if name.startswith("iobmd.")}
    return {package if any(package in names for names in LEVELS) else "__init__" for package in found}


@pytest.mark.parametrize("path", packages(), ids=lambda path: "/".join(path.parts[-2:]))
def test_imports_go_down(path: Path) -> None:
    package = packages()[path]
    for other in imported(path) - {package}:
        assert level(other) > level(package), f"{path.name} imports {other}, which is not below it"


def test_the_map_shows_these_levels() -> None:
    """The map has the packages in this order, and only existing modules."""
    (text,) = re.findall(r"^```text\n(.*?)^```$", MAP.read_text(), re.S | re.M)
    columns = [line if re.fullmatch(r"\w+(  \w+)*", line) else line[:16] for line in text.splitlines()]
    shown = [name.rstrip("/") for column in columns for name in column.split()]
    assert sorted(["__main__", *shown]) == sorted(name for names in LEVELS for name in names)
    assert [level(name) for name in shown] == sorted(level(name) for name in shown)
    assert {*re.findall(r"\b[a-z]+_\w+\b(?!/)", text)} <= {name.rpartition(".")[2] for name in MODULES}


def loaded_by(name: str) -> set[str]:
    """Return the modules that a module imports at run time, at its top or in functions, not for annotations."""
    names: set[str] = set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            of = ".".join([*above, *([node.module] if node.module else [])])
            names.update(full if (full := f"{of}.{alias.name}") in MODULES else of for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[name].read_text()))
    return names & MODULES.keys() - {name}


def test_no_modules_import_each_other() -> None:
    """There are no indirect cycles either, within a package or across packages."""
    left = {name: loaded_by(name) for name in MODULES}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, "these import each other"


@pytest.mark.parametrize("path", packages(), ids=lambda path: "/".join(path.parts[-2:]))
def test_files_stay_small(path: Path) -> None:
    """Docstrings do not count, because those of one public class may be long."""
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


def test_extensions_carry_no_debug_information() -> None:
    """Debug information was once most of a wheel (cython_ext/cflags)."""
    built = [*PACKAGE.glob("_native/*.so"), *TOOLS.glob("bench/*.so")]
    assert built
    assert not [path.name for path in built if b".debug_info" in path.read_bytes()]


TESTS = Path(__file__).parents[1]
FIGURES = {
    "support/edu.py": "the size of a buffer of QEMU's device",
    "support/fuse.py": "block sizes in messages of the protocol",
    "support/inherited.py": "a number of descriptors",
    "support/targets.py": "the size of a message",
    "unit/test_blocks.py": "page sizes of invented hosts",
    "unit/test_cacheline_aarch64.py": "a number of bytes",
    "unit/test_errors.py": "an invented address",
    "unit/test_iommu.py": "addresses of a device",
    "unit/test_limits.py": "a number of descriptors",
    "unit/test_units.py": "numbers and their text",
}
"""Tests in which 4096 is not the size of a page of this host."""


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_assumes_a_page_size(path: Path) -> None:
    """Pages are 4, 16 or 64 KiB: tests use `PAGE_SIZE` or mmap.PAGESIZE, except for sizes of messages."""
    text = path.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    messages = {id(size) for node in nodes if isinstance(node, ast.Call) and _receives(node) for size in node.args}
    lines = text.splitlines()
    found = [
        node.lineno
        for node in nodes
        if (isinstance(node, ast.BinOp) and _converts_frames(node))
        or (isinstance(node, ast.Constant) and id(node) not in messages and _is_written(node, lines))
    ]
    assert not found or str(path.relative_to(TESTS)) in FIGURES, f"lines {found} of {path.name} contain a page size"


def _receives(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr in {"read", "recv", "pread"}


def _is_written(number: ast.Constant, lines: list[str]) -> bool:
    """Return whether a number is written as the size of a small page; in hexadecimal it is a flag or an address."""
    return type(number.value) is int and lines[number.lineno - 1].encode()[number.col_offset :].startswith(b"4096")


def _converts_frames(shift: ast.BinOp) -> bool:
    """Return whether a shift by 12 converts between frames and addresses; 1 << 12 is a flag."""
    is_flag = isinstance(shift.left, ast.Constant) and shift.left.value == 1
    is_shift = isinstance(shift.op, ast.LShift | ast.RShift) and not is_flag
    return is_shift and isinstance(shift.right, ast.Constant) and shift.right.value == 12
