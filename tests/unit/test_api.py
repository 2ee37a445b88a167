"""The names of `iobmd`: all are available from the start, except in the command, which loads only some modules."""

import subprocess
import sys
from importlib.machinery import PathFinder

import pytest

import iobmd
from iobmd.cli import COMMANDS


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_every_name_is_there_and_listed() -> None:
    assert len(set(iobmd.__all__)) == len(iobmd.__all__)
    assert {*iobmd.__all__} <= {*dir(iobmd)}
    for name in iobmd.__all__:
        assert getattr(iobmd, name) is not None
    assert python("from iobmd import *; print(callable(allocate), kIODirectionInOut)").startswith("True")


def test_only_public_names_are_listed() -> None:
    """`dir` is unchanged after all modules of the library, and others, have been loaded."""
    listed = python("import iobmd, iobmd.iommu, iobmd.physical.zones; print(*dir(iobmd))").split()
    assert {*listed} == {*iobmd.__all__, "dmabuf", "host", "iommu", "pagemap", "rdma"}


def test_no_name_is_also_that_of_a_module() -> None:
    """Loading a module of the same name would replace the documented name."""
    assert not [name for name in iobmd.__all__ if PathFinder.find_spec(f"iobmd.{name}", iobmd.__path__)]


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'iobmd' has no attribute 'nonsense'"):
        _ = iobmd.nonsense
    with pytest.raises(ImportError, match="nonsense"):
        exec("from iobmd import nonsense")
    assert not hasattr(iobmd, "__wrapped__")


def test_modules_need_no_import_of_their_own() -> None:
    assert python("import iobmd; print(iobmd.pagemap.areas.__name__)") == "areas"


# The finder of editable packages has already loaded pathlib.
COMMAND = (
    "import sys; sys.modules.pop('pathlib', None); import iobmd_command; "
    "sys.argv[1:] = {}; code = iobmd_command.main(); print(*sys.modules, code)"
)


@pytest.mark.parametrize("arguments", [["--version"], ["pagemap", "self"], ["doctor", "--help"]], ids=str)
def test_commands_load_what_they_need(arguments: list[str]) -> None:
    *modules, code = python(COMMAND.format(arguments)).splitlines()[-1].split()
    assert code == "0"
    assert "iobmd.descriptors.buffer" not in modules
    slow = {"inspect", "pathlib", "shutil"}  # see cython_ext/limited.h, and ruff's settings
    assert arguments[-1] == "--help" or not slow & {*modules}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_finds_all_it_needs(name: str) -> None:
    """The command's modules must not depend on other code having loaded the library.

    Except for the ranks of an MPI program (`mpi_ranks`), which mpiexec starts where mpi4py is installed.
    """
    module = COMMANDS[name][0]
    program = f"import iobmd_command, importlib, pkgutil; module = importlib.import_module({module!r})\n"
    program += "for found in pkgutil.iter_modules(getattr(module, '__path__', []), module.__name__ + '.'):\n"
    program += "    if not found.name.endswith('.mpi_ranks'): importlib.import_module(found.name)\nprint('found')"
    assert python(program) == "found"


def test_nothing_is_loaded_late() -> None:
    """In a program that cannot open files, memory can be allocated, and refusals are reported."""
    program = """
import resource, sys, iobmd
before = set(sys.modules)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
with iobmd.allocate(4096, wired=False) as buffer:
    buffer.writeBytes(0, b"hello")
for refused in (lambda: iobmd.Task(1), lambda: iobmd.allocate(4096, shared=True)):
    try:
        refused().free()
    except iobmd.IOReturnError as error:
        print(error.code.name)
print(sorted(set(sys.modules) - before))
"""
    lines = python(program).splitlines()
    assert lines == ["kIOReturnNoResources", "kIOReturnNoResources", "[]"]
