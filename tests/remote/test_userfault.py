"""Programs that serve their own page faults: no operation waits for a stopped thread."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import kernel
from support.child import in_child, started
from support.targets import ProgramResources, Target, build, check_unchanged, children, until

import iobmd
from iobmd import IOMapOptions, IOMemoryDescriptor, IOReturn, IOReturnError, Wiring
from iobmd.task import job

MIB = 1 << 20
INOUT = 3

pytestmark = [pytest.mark.needs("compiler", "root"), pytest.mark.usefixtures("may_trace", "nothing_left")]


class ServedTarget(Target):
    """The program, with the addresses of the range whose faults it serves and of an ordinary range, 1 MiB each."""

    def __init__(self, handler: str = "poll", main: str = "read", mode: str = "serve") -> None:
        super().__init__([build("userfault"), handler, main, mode])
        self.area, self.plain = map(int, self.line().split())
        self.reads_commands = main == "read"
        self.before = ProgramResources.of(self.pid)

    def check_unharmed(self) -> None:
        """Check that it runs untraced with its original resources, and that its handler still serves faults."""
        assert until(lambda: not traced(self.pid) and not children(self.pid)), (self.state(), children(self.pid))
        check_unchanged(self.pid, self.before)
        if self.reads_commands:
            self.tell("check")
            assert self.line() == "intact"


def traced(pid: int) -> list[str]:
    """Return the threads that are traced, or stopped by a tracer."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        text = (thread / "status").read_text()
        if "TracerPid:\t0\n" not in text or "State:\tt" in text:
            found.append(thread.name)
    return found


def soon(action: Callable[[], object], seconds: float = 20) -> object:
    """Return the result of `action` in a forked child, which is killed if it takes too long."""
    begin = time.monotonic()
    result = in_child(action)
    assert time.monotonic() - begin < seconds
    return result


def copied(target: ServedTarget, **how: object) -> bytes:
    with iobmd.copy(target.pid, target.area, MIB, wired=False, **how) as buffer:
        return buffer.readBytes(0, MIB)


def prepared(target: ServedTarget) -> Wiring:
    with IOMemoryDescriptor.withAddressRange(target.area, MIB, INOUT, target.pid) as memory:
        memory.prepare()
        wiring = memory.wiring
        assert kernel.status("VmPin", target.pid) >= MIB
        memory.complete()
        return wiring


@pytest.fixture(params=["poll", "read"])
def handler(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["read", "spin"])
def main(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("freeze", [False, True], ids=["copy", "freeze"])
def test_copy(handler: str, main: str, freeze: bool) -> None:
    with ServedTarget(handler, main) as target:
        assert soon(lambda: copied(target, freeze=freeze)) == b"u" * MIB
        target.check_unharmed()


def test_prepare(handler: str, main: str) -> None:
    with ServedTarget(handler, main) as target:
        assert soon(lambda: prepared(target)) is Wiring.PINNED
        # With a wait, because compaction may be moving some pages.
        assert until(lambda: all(entry >> 63 for entry in kernel.entries(target.area, MIB, target.pid)), 5)
        target.check_unharmed()


def test_prepare_of_pages_protected_from_writes(handler: str) -> None:
    """Every page is present, but a pin, which is also for writing, needs the handler for each."""
    with ServedTarget(handler, "read", "protect") as target:
        assert soon(lambda: prepared(target)) is Wiring.PINNED
        target.check_unharmed()


def failing(action: Callable[[], object]) -> Callable[[], IOReturnError]:
    """Return a function that returns the error of `action`."""

    def run() -> IOReturnError:
        with pytest.raises(IOReturnError) as caught:
            action()
        return caught.value

    return run


def test_prepare_with_a_stalled_handler() -> None:
    """The error names the cause within seconds; the program continues during and after the call."""
    with ServedTarget(mode="stall") as target:
        error = soon(failing(lambda: prepared(target)), 9)
        assert isinstance(error, IOReturnError)
        assert error.code == IOReturn.kIOReturnTimeout
        assert "userfaultfd" in str(error)
        target.tell("serve")
        assert target.line() == "intact"
        target.check_unharmed()


def test_prefault_with_a_stalled_handler() -> None:
    """Populating the map is optional, and is abandoned after a time."""
    with ServedTarget(mode="stall") as target:

        def prefault() -> None:
            job.TIMEOUT = 0.5
            with IOMemoryDescriptor.withAddressRange(target.area, MIB, INOUT, target.pid) as memory:
                options = IOMapOptions.kIOMapAnywhere | IOMapOptions.kIOMapPrefault
                memory.createMappingInTask(target.pid, 0, options).unmap()

        soon(prefault, 5)
        target.tell("serve")
        assert target.line() == "intact"
        target.check_unharmed()


@pytest.mark.parametrize("freeze", [False, True], ids=["copy", "freeze"])
def test_copy_with_a_stalled_handler(freeze: bool) -> None:
    """The error is raised within the caller's time limit; the program continues to run."""
    with ServedTarget(mode="stall") as target:
        error = soon(failing(lambda: copied(target, freeze=freeze, timeout=0.5)), 8)  # without a limit: 10 s
        assert isinstance(error, IOReturnError)
        assert error.code == IOReturn.kIOReturnTimeout
        assert error.address == target.area
        target.tell("serve")
        assert target.line() == "intact"
        target.check_unharmed()


def test_freeze_of_pages_that_go_away_again() -> None:
    """Pages are missing at each stop: the copy is refused with the reason."""
    with ServedTarget(mode="drop", main="spin") as target:

        def copy() -> str:
            with pytest.raises(IOReturnError, match="userfaultfd") as caught:
                copied(target, freeze=True)
            assert caught.value.code == IOReturn.kIOReturnUnsupported
            return str(caught.value)

        assert "was missing at each stop" in str(soon(copy))
        target.check_unharmed()


def test_freeze_of_other_memory_of_a_task_that_hears_of_forks() -> None:
    """The clone of a child would wait until the handler, which is stopped, had read the report."""
    with ServedTarget(mode="fork") as target:

        def copy() -> bytes:
            with iobmd.copy(target.pid, target.plain, MIB, wired=False, freeze=True) as buffer:
                return buffer.readBytes(0, MIB)

        assert soon(copy, 5) == b"p" * MIB
        target.check_unharmed()


CALLS = {
    "copy": "iobmd.copy(pid, area, size, wired=False)",
    "freeze": "iobmd.copy(pid, area, size, wired=False, freeze=True)",
    "prepare": "iobmd.IOMemoryDescriptor.withAddressRange(area, size, 3, pid).prepare()",
}


@pytest.mark.parametrize("exception", ["KeyboardInterrupt", "TimeoutError"])
@pytest.mark.parametrize("call", CALLS)
def test_interrupt(call: str, exception: str) -> None:
    """A signal handler that raises an exception ends the wait for a fault handler that is stalled."""
    with ServedTarget(mode="stall") as target:
        script = (
            "import iobmd, signal, sys\n"
            f"def interrupt(*_): raise {exception}\n"
            "signal.signal(signal.SIGINT, interrupt)\n"
            f"pid, area, size = {target.pid}, {target.area}, {MIB}\n"
            f"try:\n    print('begin', flush=True)\n    {CALLS[call]}\n"
            f"except {exception} as error: sys.exit(7 if type(error) is {exception} else 8)\n"
        )
        with started([sys.executable, "-c", script], stdout=subprocess.PIPE) as program:
            assert program.stdout
            program.stdout.readline()
            time.sleep(0.5)
            assert program.poll() is None, "it waits"
            begin = time.monotonic()
            program.send_signal(signal.SIGINT)
            try:
                assert program.wait(10) == 7
            finally:
                program.kill()
            assert time.monotonic() - begin < 4, "the shortest time limit is 5 s, and 0.5 s of it are over"
        target.tell("serve")
        assert target.line() == "intact"
        target.check_unharmed()


@pytest.mark.parametrize("call", CALLS)
def test_killed_as_it_waits(call: str) -> None:
    """SIGKILL at that moment also leaves the program running and untraced, without remains of iobmd."""
    with ServedTarget(mode="stall") as target:
        script = (
            f"import iobmd\npid, area, size = {target.pid}, {target.area}, {MIB}\nprint(1, flush=True)\n{CALLS[call]}"
        )
        with started([sys.executable, "-c", script], stdout=subprocess.PIPE) as program:
            assert program.stdout
            program.stdout.readline()
            time.sleep(0.5)
            assert program.poll() is None, "it waits"
            program.kill()
            program.wait(10)
        assert until(lambda: not traced(target.pid))
        target.tell("serve")
        assert target.line() == "intact"
        target.check_unharmed()
