"""Shared buffers sent through multiprocessing, alone or in other objects: the receiver attaches the same pages."""

import contextlib
import copy
import gc
import io
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import resource_sharer
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
from support import sharing_child
from support.kernel import frames

import iobmd
from iobmd.units import PAGE_SIZE

_SHARED = iobmd.IOOptionBits.kIOMemoryKernelUserShared | iobmd.IOOptionBits.kIOMemoryPageable
METHODS = ["fork", "spawn", "forkserver"]


@pytest.fixture(autouse=True)
def nothing_in_transit() -> Iterator[None]:
    """End multiprocessing's thread, which closes a descriptor some time after the receiver has received it."""
    yield
    resource_sharer.stop(timeout=30)


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> BaseContext:
    return multiprocessing.get_context(request.param)


@pytest.mark.parametrize("holder", [sharing_child.Holder, sharing_child.LateHolder])
def test_inside_of_an_object(context: BaseContext, holder: type[sharing_child.Holder]) -> None:
    """A buffer is an argument of a new process, and is then sent through a pipe to a running one."""
    before = descriptors()
    made = [iobmd.allocate(8192, shared=True, wired=False), iobmd.allocate(200, shared=True, wired=False)]
    for number, buffer in enumerate(made):
        buffer.writeBytes(0, b"made%d" % number)
    near, far = context.Pipe()
    process = context.Process(target=sharing_child.answer_in, args=(holder(*made), far))
    process.start()
    assert near.poll(30), "the child does not answer"
    assert near.recv() == [(b"made0", 8192, "PAGEABLE"), (b"made1", 200, "PAGEABLE")]
    process.join(30)
    assert process.exitcode == 0
    for buffer in made:
        assert buffer.readBytes(100, 5) == b"reply"
        buffer.free()
    process.close()
    near.close()
    far.close()
    assert descriptors() == before


def descriptors() -> int:
    """Return how many descriptors of iobmd's memory this process has; multiprocessing has others."""
    gc.collect()
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(entry.readlink()))
    return sum("iobmd" in link for link in links)


def test_through_a_pipe_it_is_the_same_memory() -> None:
    near, far = multiprocessing.Pipe()
    with near, far, iobmd.allocate(8192, shared=True) as buffer:
        near.send({"nested": [buffer, buffer]})
        received = far.recv()["nested"]
        assert received[0] is received[1]
        with received[0] as attached:
            assert attached.wiring is buffer.wiring
            attached.writeBytes(4000, b"seen")
            assert buffer.readBytes(4000, 4) == b"seen"
            assert frames(attached.getBytesNoCopy(), 8192) == frames(buffer.getBytesNoCopy(), 8192)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_started_process_retains_no_memory(method: str) -> None:
    """The descriptor in transit is closed by `start`, not with the object of the process."""
    before = descriptors()
    context = multiprocessing.get_context(method)
    near, far = context.Pipe()
    with iobmd.allocate(8192, shared=True, wired=False) as buffer:
        buffer.writeBytes(0, b"moved")
        process = context.Process(target=sharing_child.look, args=(iobmd.share(buffer), far))
    process.start()
    assert descriptors() == before, "the new process has the only descriptor"
    assert near.poll(30), "the child does not answer"
    assert near.recv() == (b"moved", 8192, 8192)
    process.join(30)
    process.close()
    near.close()
    far.close()


def test_a_subclass_stays_a_subclass() -> None:
    near, far = multiprocessing.Pipe()
    made = sharing_child.NamedBuffer("ring")
    made.initWithPhysicalMask(iobmd.kernel_task, int(_SHARED), PAGE_SIZE, 1, 0)
    with near, far, made:
        near.send([made])
        with far.recv()[0] as received:
            assert (type(received), received.name) == (sharing_child.NamedBuffer, "ring")
            received.writeBytes(0, b"same")
            assert made.readBytes(0, 4) == b"same"
        with pytest.raises(TypeError, match=r"^NamedBuffer owns its memory.*iobmd\.share"):
            pickle.dumps(made)


def test_in_a_pool_of_processes() -> None:
    with iobmd.allocate(64, shared=True, wired=False) as buffer:
        with multiprocessing.get_context("forkserver").Pool(1) as pool:
            assert pool.map(sharing_child.increment, [buffer] * 3) == [1, 2, 3]
        assert buffer[0] == 3


def test_elsewhere_it_is_refused() -> None:
    with iobmd.allocate(64, shared=True, wired=False) as buffer, iobmd.share(buffer) as handle:
        for refused in (
            lambda: pickle.dumps(buffer),
            lambda: pickle.Pickler(io.BytesIO()).dump([buffer]),
            lambda: copy.copy(buffer),
            lambda: copy.deepcopy({"a": buffer}),
        ):
            with pytest.raises(TypeError, match=r"iobmd\.share"):
                refused()
        with pytest.raises(TypeError, match="multiprocessing"):
            pickle.dumps(handle)
    near, far = multiprocessing.Pipe()
    with near, far, iobmd.allocate(64) as private, pytest.raises(TypeError, match="shared=True"):
        near.send(private)


def test_a_shared_buffer_does_not_load_multiprocessing() -> None:
    """multiprocessing is not imported, because that takes as long as importing all of iobmd."""
    program = "import sys, iobmd; iobmd.share(iobmd.allocate(64, shared=True, wired=False)); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "multiprocessing.reduction" not in done.stdout.split()
