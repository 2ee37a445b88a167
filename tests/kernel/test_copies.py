"""Python's copy protocols: each kernel resource has one owner."""

import copy
import os
import pickle
from collections.abc import Callable

import pytest

import iobmd
from iobmd.units import PAGE_SIZE

MAKE = pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])


@pytest.mark.usefixtures("nothing_left")
@MAKE
def test_a_descriptor_has_one_owner(make: object) -> None:
    with iobmd.allocate(PAGE_SIZE, wired=False) as buffer:
        buffer.writeBytes(0, b"mine")
        with pytest.raises(TypeError, match="use withCopy to copy it"):
            make(buffer)  # type: ignore[operator]
        assert buffer.readBytes(0, 4) == b"mine"


@pytest.mark.usefixtures("nothing_left")
def test_copies_of_a_task_are_the_task() -> None:
    """A second owner would close whichever file has received the descriptor number in the meantime."""
    task = iobmd.Task(os.getppid())
    for other in (copy.copy(task), copy.deepcopy(task), copy.deepcopy({"task": task})["task"]):
        assert other is task
    with pytest.raises(TypeError, match="send the pid"):
        pickle.dumps(task)
    assert task.alive


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
@MAKE
def test_a_command_has_one_transfer(make: Callable[[object], object]) -> None:
    """A copy that is collected would unpin memory whose addresses the command still hands out."""
    with iobmd.allocate(PAGE_SIZE, wired=False) as buffer, iobmd.IODMACommand.withSpecification() as command:
        buffer.prepare()
        command.setMemoryDescriptor(buffer)
        buffer.complete()
        with pytest.raises(TypeError, match=r"IODMACommand .* cannot be copied"):
            make(command)
        assert buffer.wiring is iobmd.Wiring.PINNED
        assert command.genIOVMSegments() == buffer.segments()


@pytest.mark.usefixtures("nothing_left")
@MAKE
def test_uses_that_end_once(make: Callable[[object], object]) -> None:
    buffer = iobmd.allocate(PAGE_SIZE, wired=False, purgeable=True)
    with buffer, iobmd.PurgeableCache(bytes) as cache:
        cache[3].release()
        for one in (cache, buffer.nonvolatile()):
            with pytest.raises(TypeError, match="cannot be copied"):
                make(one)
        assert len(cache) == 1
