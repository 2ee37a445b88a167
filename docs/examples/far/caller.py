"""The caller: `withCopy` and `Snapshot` of a task on another machine."""

import contextlib
import subprocess
from collections.abc import Sequence
from typing import Self

import pyverbs.enums as verbs

import iobmd
import iobmd.rdma
from iobmd import IOBufferMemoryDescriptor, IOReturn, IOReturnError

from . import messages
from .queue_pair import QueuePair


def withCopy(  # noqa: N802 (IOKit's name)
    agent: Sequence[str], pid: int, address: int, size: int, *, device: str, **allocation: object
) -> IOBufferMemoryDescriptor:
    """Return a buffer with a copy of memory of a task on another machine. Parameters and errors as `Snapshot`."""
    with Snapshot(agent, pid, device=device) as snapshot:
        return snapshot.copy(address, size, **allocation)


class Snapshot:
    """The memory of a task on another machine, as of one moment, until `close`.

    Parameters
    ----------
    agent : sequence of str
        The command that starts the agent there, such as ``["ssh", "HOST", "python3", "-m", "far.agent", "mlx5_0"]``.
    pid : int
        The task, on the other machine.
    device : str
        The RDMA device of this machine.

    Raises
    ------
    IOReturnError
        Those of `iobmd.snapshot` and `iobmd.copy` on the other machine; `kIOReturnNotResponding`: the agent ended, or
        the other machine does not answer; `kIOReturnNotPermitted`: it refuses the access to its memory.
    """

    def __init__(self, agent: Sequence[str], pid: int, *, device: str) -> None:
        with contextlib.ExitStack() as undo:
            self._queue_pair = undo.enter_context(QueuePair(device))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._agent = subprocess.Popen(agent, text=True, **pipes)
            undo.callback(_end, self._agent)
            answer = self._ask(station=self._queue_pair.here, pid=pid)
            self._queue_pair.connect(messages.Station(*answer["station"]))
            self._undo = undo.pop_all()
        self.stopped_ns = answer["stopped_ns"]
        """For how long the task was stopped, at most."""

    def copy(self, address: int, size: int, **allocation: object) -> IOBufferMemoryDescriptor:
        """Return a buffer with a copy of a range, allocated by `iobmd.allocate` with the remaining keywords."""
        buffer = iobmd.allocate(size, **allocation)
        try:
            there = self._ask(address=address, size=size)
            try:
                with iobmd.rdma.register(buffer, self._queue_pair.domain, verbs.IBV_ACCESS_LOCAL_WRITE) as region:
                    self._queue_pair.read(region, there["address"], there["key"], self._require_agent)
            finally:
                self._say(done=True)
        except BaseException:
            buffer.free()
            raise
        return buffer

    def _ask(self, **message: object) -> dict:
        """Send a message, and return the answer."""
        self._say(**message)
        if (answer := messages.receive(self._agent.stdout)) is None:
            raise self._ended()
        return answer

    def _say(self, **message: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # the agent has ended: there is no answer either
            messages.send(self._agent.stdin, **message)

    def _require_agent(self) -> None:
        if self._agent.poll() is not None:
            raise self._ended()

    def _ended(self) -> IOReturnError:
        command = " ".join(self._agent.args)
        return IOReturnError(IOReturn.kIOReturnNotResponding, f"the agent ended, see its standard error: {command}")

    def close(self) -> None:
        """End the agent, and with it the snapshot. Idempotent."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _end(agent: subprocess.Popen[str]) -> None:
    """End an agent by the end of its input."""
    with contextlib.suppress(BrokenPipeError):
        agent.stdin.close()
    agent.stdout.close()
    agent.wait()
