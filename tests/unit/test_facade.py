"""The names of `iobmd`: all there, whenever they are asked for, and not loaded before."""

import subprocess
import sys
from importlib.machinery import PathFinder

import pytest

import iobmd


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_every_name_is_there_and_listed() -> None:
    assert len(set(iobmd.__all__)) == len(iobmd.__all__)
    assert {*iobmd.__all__} <= {*dir(iobmd)}
    for name in iobmd.__all__:
        assert getattr(iobmd, name) is not None
    assert python("from iobmd import *; print(callable(allocate), kIODirectionInOut)").startswith("True")


def test_no_name_is_also_that_of_a_module() -> None:
    """Loading the module would put it in the place of what is promised."""
    assert not [name for name in iobmd.__all__ if PathFinder.find_spec(f"iobmd.{name}", iobmd.__path__)]


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'iobmd' has no attribute 'nonsense'"):
        _ = iobmd.nonsense
    with pytest.raises(ImportError, match="nonsense"):
        exec("from iobmd import nonsense")
    assert not hasattr(iobmd, "__wrapped__")


def test_modules_need_no_import_of_their_own() -> None:
    assert (
        python("import iobmd; print(iobmd.pagemap.areas.__name__, iobmd.iommu.IOMapper.__name__)") == "areas IOMapper"
    )


@pytest.mark.parametrize(
    "used", ["iobmd.IOReturn, iobmd.pagemap, iobmd.__version__", "iobmd.cli.main(['--version'])"]
)
def test_loaded_when_the_first_name_is_used(used: str) -> None:
    program = f"import sys, iobmd, iobmd.cli; {used}; print('iobmd.buffer' in sys.modules); "
    program += "iobmd.Task; print('iobmd.buffer' in sys.modules, 'allocate' in vars(iobmd))"
    assert python(program).splitlines()[-2:] == ["False", "True True"]


def test_the_first_use_is_in_many_threads() -> None:
    program = """
import threading, iobmd
start, found = threading.Barrier(16), []
def use():
    start.wait()
    found.append((iobmd.allocate, iobmd.Wiring.PINNED, iobmd.kernel_task))
threads = [threading.Thread(target=use) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), len(set(found)))
"""
    assert python(program) == "16 1"


def test_nothing_is_loaded_late() -> None:
    """Who has used one name may go where no file can be opened: memory is had, refusals are told."""
    program = """
import resource, sys, iobmd
iobmd.Task
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
    told = python(program).splitlines()
    assert told == ["kIOReturnNoResources", "kIOReturnNoResources", "[]"]
