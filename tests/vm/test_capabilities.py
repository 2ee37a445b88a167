"""What this kernel can do for `iobmd`: each works, or is refused with the promised error (docs/kernels.md)."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import pytest
from support import kernel
from support.child import in_child
from support.refusals import code_of

import iobmd
from iobmd import IOReturn, IOReturnError, Task, Wiring, host, pagemap
from iobmd._native import memory
from iobmd.cli import main
from iobmd.host.fact import Status
from iobmd.memory import pinning

pytestmark = pytest.mark.needs("guest")
MIB = 1 << 20
CONTENT = bytes(range(256)) * 4096


def wired() -> str:
    with iobmd.allocate(5 * MIB) as buffer:
        assert buffer.wiring is Wiring.PINNED
        buffer.verify()
        return "pinned, a ring a piece" if pinning._pins._no_tables else "pinned"


def prepared() -> None:
    with iobmd.allocate(MIB, wired=False) as buffer:
        buffer.prepare()
        assert sum(length for _, length in buffer.segments()) == MIB
        buffer.complete()
        assert buffer.wiring is Wiring.PAGEABLE


def contiguous() -> None:
    with iobmd.allocate(16 * MIB, contiguous=True) as buffer:
        assert len(buffer.segments()) == 1


def contiguous_and_shared() -> None:
    with iobmd.allocate(4 * MIB, contiguous=True, shared=True) as buffer:
        assert len(buffer.segments()) == 1


def masked() -> None:
    with (
        iobmd.policy(memory_budget=1 << 40, time_budget=300),
        iobmd.allocate(MIB, physical_mask=0xFFFFFFFF) as buffer,
    ):
        assert all(address + length <= 1 << 32 for address, length in buffer.segments())


def shared_in_huge_pages() -> str:
    with iobmd.allocate(4 * MIB, shared=True) as buffer:
        return "huge pages" if buffer.layout().huge else "small pages"


def purgeable() -> None:
    with iobmd.allocate(MIB, wired=False, purgeable=True) as buffer:
        buffer.writeBytes(0, CONTENT)
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableVolatile)
        was = buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableNonVolatile)
        # The kernel may take it at any time; what it must not is to take it untold.
        assert (was, buffer.readBytes(0, MIB)) in (
            (iobmd.IOPurgeable.kIOMemoryPurgeableVolatile, CONTENT),
            (iobmd.IOPurgeable.kIOMemoryPurgeableEmpty, bytes(MIB)),
        )
        buffer.writeBytes(0, CONTENT)
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableVolatile)
        memory.advise(buffer.getBytesNoCopy(), MIB, memory.MADV_PAGEOUT)  # discards what is lazily freed
        was = buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableNonVolatile)
        assert was == iobmd.IOPurgeable.kIOMemoryPurgeableEmpty
        assert buffer.readBytes(0, MIB) == bytes(MIB)


def purgeable_and_shared() -> None:
    with iobmd.allocate(MIB, wired=False, purgeable=True, shared=True) as buffer:
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableVolatile)
        iobmd.purge()
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableNonVolatile)


def copied() -> None:
    with iobmd.allocate(MIB) as source:
        source.writeBytes(0, CONTENT)
        with iobmd.copy(iobmd.current_task(), source.getBytesNoCopy(), MIB) as buffer:
            assert buffer.readBytes(0, MIB) == CONTENT


def in_another_task() -> None:
    with sleeper() as pid, iobmd.allocate(MIB, task=pid) as buffer:
        buffer.writeBytes(0, CONTENT)
        assert Task(pid).read(buffer.getBytesNoCopy(), MIB) == CONTENT
        assert kernel.entries(buffer.getBytesNoCopy(), 4096, pid)[0] >> 63


def frozen_copy() -> None:
    with iobmd.allocate(MIB, wired=False) as source:
        source.writeBytes(0, CONTENT)
        with sleeper() as pid, iobmd.copy(pid, source.getBytesNoCopy(), MIB, freeze=True) as buffer:
            assert buffer.readBytes(0, MIB) == CONTENT


@contextlib.contextmanager
def sleeper() -> Iterator[int]:
    """A forked child that waits to be ended."""
    pid = os.fork()
    if not pid:
        signal.pause()
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def mapped_twice() -> None:
    with iobmd.allocate(MIB, shared=True) as buffer, buffer.map(iobmd.IOMapOptions.kIOMapUnique) as mapping:
        buffer.writeBytes(0, CONTENT)
        assert bytes(memoryview(mapping)) == CONTENT


def looked_at() -> None:
    with iobmd.allocate(4 * MIB) as buffer:
        runs = list(pagemap.runs(buffer))
        assert sum(run.length for run in runs) == 4 * MIB
        assert pagemap.counts(iobmd.kernel_task, buffer.getBytesNoCopy(), 4 * MIB).present == 1024


def of_node_0() -> None:
    with iobmd.allocate(MIB, node=0):
        pass


def child_is_told() -> None:
    with iobmd.allocate(4096) as buffer:
        assert in_child(lambda: code_of(lambda: buffer.readBytes(0, 1))) == IOReturn.kIOReturnNotOpen


CAPABILITIES: dict[str, tuple[Callable[[], str | None], set[IOReturn]]] = {
    "wired memory": (wired, set()),
    "`prepare()` of pageable memory": (prepared, set()),
    "16 MiB contiguous": (contiguous, set()),
    "4 MiB contiguous and shared": (contiguous_and_shared, {IOReturn.kIOReturnNoResources}),
    "1 MiB below 4 GiB": (masked, set()),
    "4 MiB shared": (shared_in_huge_pages, set()),
    "memory of a NUMA node": (of_node_0, set()),
    "purgeable, private": (purgeable, set()),
    "purgeable, shared": (purgeable_and_shared, set()),
    "mapped at two places": (mapped_twice, set()),
    "`copy()`": (copied, set()),
    "`copy(freeze=True)`": (frozen_copy, {IOReturn.kIOReturnUnsupported}),
    "memory in another task": (in_another_task, {IOReturn.kIOReturnUnsupported}),
    "`iobmd.pagemap`": (looked_at, set()),
    "refusal of wired memory in a forked child": (child_is_told, set()),
}
"""Name: how to try it, and the errors that a kernel without it may be refused with."""


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("name", CAPABILITIES)
def test_works_or_is_refused(name: str, record_property) -> None:
    action, promised = CAPABILITIES[name]
    try:
        answer = action() or "works"
    except IOReturnError as error:
        if error.code not in promised:
            raise
        answer = f"refused: `{error.code.name}`"
    record_property(name, answer)


def test_of_the_kernel(record_property) -> None:
    """What `iobmd doctor` finds: where the answer is no it says what would help."""
    found = {fact.name: fact for fact in host.facts()}
    for name in ("io_uring", "PAGEMAP_SCAN", "MADV_FREE", "huge tmpfs", "userfaultfd", "pidfd_getfd"):
        assert found[name].status is Status.YES or found[name].remedy
        record_property(name, "works" if found[name].status is Status.YES else "no")


def test_doctor_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "advice"), [("MADV_POPULATE_WRITE", memory.MADV_POPULATE_WRITE), ("MADV_COLLAPSE", memory.MADV_COLLAPSE)]
)
def test_of_madvise(name: str, advice: int, record_property) -> None:
    with iobmd.allocate(4 * MIB, wired=False) as buffer:
        buffer.writeBytes(0, CONTENT)
        try:
            memory.advise(-(-buffer.getBytesNoCopy() // (2 * MIB)) * 2 * MIB, 2 * MIB, advice)
        except OSError as error:
            answer = f"no ({os.strerror(error.errno or 0)})"
        else:
            answer = "works"
    record_property(name, answer)
