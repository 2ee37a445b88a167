"""The example docs/examples/far: copies of a task on another machine, byte for byte, and what can go wrong."""

import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support import rxe
from support.errors import code_of
from support.examples import EXAMPLES

import iobmd
from iobmd import IOReturn
from iobmd.units import PAGE_SIZE

sys.path.insert(0, str(EXAMPLES))

pytestmark = [pytest.mark.needs("rdma"), pytest.mark.usefixtures("rdma_machines")]
MIB = 1 << 20


class Task:
    """A task on the other machine."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid, self.address, self.checksum = self._line()

    def _line(self) -> tuple[int, int, int]:
        line = self.process.stdout.readline()
        pid, address, checksum = map(int, line.split())
        return pid, address, checksum

    def change(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.pid, self.address, self.checksum = self._line()


@contextmanager
def task(size: int) -> Iterator[Task]:
    process = rxe.start_there(f"python3 -m support.changing_task {size}")
    try:
        yield Task(process)
    finally:
        process.communicate(timeout=60)


def kill_agents() -> None:
    """Kill the agents on the other machine, but not the program that starts them."""
    found = "case $(tr '\\0' ' ' <$task/cmdline) in python3*far.agent*) kill -9 ${task#/proc/};; esac"
    rxe.run_there(f"sh -c {shlex.quote(f'for task in /proc/[0-9]*; do {found}; done')}")


def checksum(buffer: iobmd.IOBufferMemoryDescriptor) -> int:
    with memoryview(buffer) as view:
        return zlib.crc32(view)


@pytest.mark.parametrize("size", [100, 70_001, 20 * MIB], ids=str)
def test_a_snapshot_is_copied_byte_for_byte(size: int, record_property) -> None:
    """The contents are those of the snapshot, although the task has changed all of them since."""
    import far

    with task(size) as source:
        before = source.checksum
        with far.Snapshot(rxe.AGENT, source.pid, device=rxe.DEVICE) as snapshot:
            source.change()
            assert source.checksum != before
            with snapshot.copy(source.address, size) as buffer:
                assert buffer.wiring is iobmd.Wiring.PINNED
                assert checksum(buffer) == before
                buffer.verify()
                whole = buffer.readBytes(0, size)
            with snapshot.copy(source.address + 33, size - 33, wired=False) as rest:
                assert rest.readBytes(0, size - 33) == whole[33:]
        source.change()  # it still runs
        with far.withCopy(rxe.AGENT, source.pid, source.address, size, device=rxe.DEVICE, contiguous=True) as buffer:
            assert checksum(buffer) == source.checksum
            assert len(buffer.segments()) == 1
    record_property("withCopy from another machine", "works")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("when", ["before", "during"])
def test_the_agent_dies(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import far
    from far.queue_pair import QueuePair

    read = QueuePair.read

    def kill_first(*arguments: object) -> None:
        kill_agents()
        read(*arguments)

    with task(MIB) as source:
        with far.Snapshot(rxe.AGENT, source.pid, device=rxe.DEVICE) as snapshot:
            if when == "before":
                kill_agents()
            else:
                monkeypatch.setattr(QueuePair, "read", kill_first)
            code = code_of(lambda: snapshot.copy(source.address, MIB))
            assert code == IOReturn.kIOReturnNotResponding
        before = source.checksum
        source.change()  # the task has lost nothing
        assert source.checksum != before


@pytest.mark.needs("rdma_answers")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("wrong", ["key", "address"])
def test_the_other_side_refuses_what_is_not_registered(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import far
    from far.queue_pair import QueuePair

    read = QueuePair.read

    def misread(self, region, address: int, key: int, *check: object) -> None:
        read(self, region, address + MIB * (wrong == "address"), key ^ (wrong == "key"), *check)

    with task(MIB) as source, far.Snapshot(rxe.AGENT, source.pid, device=rxe.DEVICE) as snapshot:
        monkeypatch.setattr(QueuePair, "read", misread)
        assert code_of(lambda: snapshot.copy(source.address, MIB)) == IOReturn.kIOReturnNotPermitted


@pytest.mark.usefixtures("nothing_left")
def test_the_task_is_gone() -> None:
    import far

    with task(MIB) as source:
        pass
    assert code_of(lambda: far.Snapshot(rxe.AGENT, source.pid, device=rxe.DEVICE)) == IOReturn.kIOReturnNotFound


def test_memory_that_is_not_mapped_there() -> None:
    """An error of one range does not end the snapshot."""
    import far

    with task(MIB) as source, far.Snapshot(rxe.AGENT, source.pid, device=rxe.DEVICE) as snapshot:
        assert code_of(lambda: snapshot.copy(PAGE_SIZE, MIB)) == IOReturn.kIOReturnVMError
        with snapshot.copy(source.address, MIB) as buffer:
            assert checksum(buffer) == source.checksum


@pytest.mark.usefixtures("nothing_left")
def test_an_agent_that_does_not_start() -> None:
    import far

    assert code_of(lambda: far.Snapshot(["false"], 1, device=rxe.DEVICE)) == IOReturn.kIOReturnNotResponding
    with pytest.raises(FileNotFoundError):
        far.Snapshot(["/no/such/agent"], 1, device=rxe.DEVICE)
