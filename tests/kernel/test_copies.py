"""Python's copy protocols: each kernel resource has one owner."""

import copy
import os
import pickle

import pytest

import iobmd
from iobmd.units import PAGE_SIZE


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
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
