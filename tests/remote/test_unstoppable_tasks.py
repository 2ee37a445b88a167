"""Tasks that cannot be stopped: each refusal names its reason, and the task continues as before."""

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import program_32_bit
from support.child import CAP_SYS_ADMIN, in_child, until_asleep
from support.targets import Target, children, until, until_at_rest, until_blocked
from support.threads import running

import iobmd
from iobmd import IOReturn, IOReturnError
from iobmd.remote import session
from iobmd.units import PAGE_SIZE

PTRACE_SEIZE, PTRACE_DETACH, PTRACE_INTERRUPT = 0x4206, 17, 0x4207
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, WALL = 0x4211, 0x40000000


def refusal(pid: int, match: str) -> IOReturn:
    with pytest.raises(IOReturnError, match=match) as caught:
        iobmd.allocate(PAGE_SIZE, task=pid, wired=False)
    return caught.value.code


def refused(pid: int) -> tuple[IOReturn, str]:
    """Check a refusal in a child, which cannot use pytest.raises."""
    try:
        iobmd.allocate(PAGE_SIZE, task=pid, wired=False).free()
    except IOReturnError as error:
        return error.code, str(error)
    raise AssertionError("it is not refused")


@contextlib.contextmanager
def program(*command: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    one = subprocess.Popen(command, **options)  # type: ignore[call-overload]
    try:
        if command[0] == "sleep":
            until_asleep(one.pid)
        yield one
        assert one.poll() is None, "it did not survive"
    finally:
        one.kill()
        one.wait()
        for pipe in (one.stdin, one.stdout):
            if pipe:
                pipe.close()


def test_traced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that a debugger traces is refused, with the debugger's name, until it detaches."""
    with program("sleep", "1000") as target:
        script = (
            "import ctypes, sys, time\n"
            f"assert ctypes.CDLL(None).ptrace({PTRACE_SEIZE}, {target.pid}, 0, 0) == 0\n"
            "print('traced', flush=True); sys.stdin.read()\n"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as debugger:
            assert debugger.stdout
            assert debugger.stdout.readline() == "traced\n"
            assert (
                refusal(target.pid, rf"traced by process {debugger.pid} \(python") == IOReturn.kIOReturnNotPermitted
            )
            # Another user of iobmd is such a tracer too, but only briefly, so that iobmd waits for it.
            monkeypatch.setattr(session, "PATIENCE", 60)
            threading.Timer(0.3, debugger.stdin.close).start()  # type: ignore[union-attr]
            iobmd.allocate(PAGE_SIZE, task=target.pid, wired=False).free()


def test_kernel_thread() -> None:
    """Refused as such (pid 2 is kthreadd, unless the pid namespace hides it)."""
    if Path("/proc/2/comm").read_text().strip() != "kthreadd":
        pytest.skip("no kernel thread is visible in this pid namespace")
    assert refusal(2, "is a kernel thread") == IOReturn.kIOReturnUnsupported
    with pytest.raises(IOReturnError, match="is a kernel thread") as caught:
        iobmd.snapshot(2)
    assert caught.value.code == IOReturn.kIOReturnUnsupported


def test_zombie_and_gone() -> None:
    target = subprocess.Popen(["true"])
    os.waitid(os.P_PID, target.pid, os.WEXITED | os.WNOWAIT)
    assert refusal(target.pid, "zombie") == IOReturn.kIOReturnNotFound
    task = None
    with program("sleep", "1000") as other:
        task = iobmd.Task(other.pid)
    target.wait()
    with pytest.raises(IOReturnError) as caught:
        iobmd.allocate(PAGE_SIZE, task=task)
    assert caught.value.code == IOReturn.kIOReturnNotFound


@pytest.mark.needs("root")
def test_another_user() -> None:
    with program("sleep", "1000") as target:
        code, message = in_child(lambda: refused(target.pid), uid=65534)
    assert code == IOReturn.kIOReturnNotPermitted
    assert "belongs to uid 0" in message


@pytest.mark.needs("root")
def test_seccomp_without_the_right_to_suspend_it() -> None:
    filtered = (
        "import time; from support import child; child.deny_calls({'userfaultfd': 1})\n"
        "print(1, flush=True); time.sleep(999)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with program(sys.executable, "-c", filtered, stdout=-1, env=environment) as target:
        assert target.stdout
        target.stdout.readline()
        code, message = in_child(lambda: refused(target.pid), drop=CAP_SYS_ADMIN)
        assert code == IOReturn.kIOReturnNotPermitted
        assert "seccomp filter" in message
        assert "CAP_SYS_ADMIN" in message
        code, message = in_child(lambda: refused(target.pid), deny={"userfaultfd": errno.EPERM})
        assert code == IOReturn.kIOReturnNotPermitted
        assert "itself" in message
        with iobmd.allocate(PAGE_SIZE, task=target.pid, wired=False) as buffer:
            buffer.writeBytes(0, b"suspended temporarily")


def test_this_process_itself() -> None:
    """This process makes its own system calls: buffers in it need no ptrace, however it is specified."""
    for itself in (os.getpid(), iobmd.kernel_task, iobmd.Task(os.getpid())):
        with iobmd.allocate(PAGE_SIZE, task=itself, wired=False, shared=True) as buffer:
            assert buffer.task_stopped_ns == 0
            assert len(memoryview(buffer)) == PAGE_SIZE


def test_no_pidfd() -> None:
    with program("sleep", "1000") as target:
        code, message = in_child(lambda: refused(target.pid), deny={"pidfd_getfd": errno.EPERM})
        assert code == IOReturn.kIOReturnNotPermitted
        assert "pidfd_getfd" in message
        assert not [name for name in Path(f"/proc/{target.pid}/fd").iterdir() if name.name not in "012"]


@pytest.mark.needs("programs_32_bit")
def test_32_bit_program(tmp_path: Path) -> None:
    """On aarch64, its system call instruction differs, so that none is found."""
    program_32_bit.write(tmp_path / "small")
    with program(str(tmp_path / "small")) as target:
        until_at_rest(target.pid)
        assert refusal(target.pid, "32-bit program") == IOReturn.kIOReturnUnsupported


DIVERTED = """
import ctypes, sys
selector = ctypes.c_char(b"\\0")  # SYSCALL_DISPATCH_FILTER_ALLOW, at present
assert ctypes.CDLL(None).prctl(59, 1, 0, 0, ctypes.byref(selector)) == 0  # PR_SET_SYSCALL_USER_DISPATCH
print("ready", flush=True)
print(sys.stdin.readline().strip(), flush=True)
"""


@pytest.mark.needs("diverted_calls")
def test_a_program_that_diverts_its_system_calls() -> None:
    """Its handler would receive those of iobmd, as soon as it sets its selector."""
    libc, config = ctypes.CDLL(None), (ctypes.c_uint64 * 4)()
    with Target([sys.executable, "-c", DIVERTED]) as target:
        until_blocked(target.pid)
        assert libc.ptrace(PTRACE_SEIZE, target.pid, 0, 0) == 0
        assert libc.ptrace(PTRACE_INTERRUPT, target.pid, 0, 0) == 0
        os.waitpid(target.pid, WALL)
        shown = libc.ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, target.pid, 32, config) == 0
        assert libc.ptrace(PTRACE_DETACH, target.pid, 0, 0) == 0
        if not shown:
            pytest.skip("this kernel does not show it to a tracer (PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG)")
        areas = Path(f"/proc/{target.pid}/maps").read_text()
        assert refusal(target.pid, "diverts its system calls to a handler") == IOReturn.kIOReturnUnsupported
        assert Path(f"/proc/{target.pid}/maps").read_text() == areas
        target.tell("continues")
        assert target.line() == "continues"


# The C library creates the child by vfork, and opens its input there, before it executes the program.
FORKS = """
import os, sys
action = (os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)
os.posix_spawn("/bin/sleep", ["sleep", "0"], {}, file_actions=[action])
print("on", flush=True)
sys.stdin.read()
"""


def test_a_thread_that_does_not_stop(tmp_path: Path) -> None:
    """A parent that waits for its vfork child to execute a program can be stopped when the child has done so."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with program(sys.executable, "-c", FORKS, pipe, stdin=-1, stdout=-1) as target:
        # Not only in this state, in which it also waits for a disk.
        assert until(lambda: children(target.pid) and "State:\tD" in Path(f"/proc/{target.pid}/status").read_text())
        assert refusal(target.pid, "did not stop within 2 s") == IOReturn.kIOReturnTimeout
        # The tracer ends with this thread, and the parent still waits until the pipe is opened.
        assert until(lambda: "TracerPid:\t0" in Path(f"/proc/{target.pid}/status").read_text())
        assert "State:\tD" in Path(f"/proc/{target.pid}/status").read_text()
        assert target.stdout
        pipe.write_bytes(b"")
        assert target.stdout.readline() == b"on\n"
        iobmd.allocate(PAGE_SIZE, task=target.pid, wired=False).free()


def test_no_address_space_there() -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))

    with program("sleep", "1000", preexec_fn=limit) as target:
        maps = Path(f"/proc/{target.pid}/maps").read_text()
        with pytest.raises(IOReturnError, match="RLIMIT_AS") as caught:
            iobmd.allocate(1 << 30, task=target.pid, wired=False)
        assert caught.value.code == IOReturn.kIOReturnNoMemory
        assert Path(f"/proc/{target.pid}/maps").read_text() == maps


def test_two_users_at_once() -> None:
    """Several threads and processes use a program one after another, and it is not disturbed."""

    def use() -> int:
        for _ in range(20):
            with iobmd.allocate(8192, task=target.pid, wired=False) as buffer:
                buffer.writeBytes(0, b"x")
        return 0

    with program("sleep", "1000") as target:
        with running(use, use, use):
            in_child(use)
        assert "iobmd" not in Path(f"/proc/{target.pid}/maps").read_text()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_interrupt_leaves_nothing_there() -> None:
    """Ctrl-C at any moment: the memory exists or not, but never without a buffer that owns it."""

    class Interrupt(Exception):  # noqa: N818
        pass

    def allocate_and_interrupt() -> int:
        libc = ctypes.CDLL(None)
        # For an interrupt in a __del__: pytest's hook would retain it, and with it the frames that refer to the
        # buffer.
        sys.unraisablehook = lambda _what: None
        armed = False

        def interrupt(_number: int, _frame: object) -> None:
            if armed:
                raise Interrupt

        signal.signal(signal.SIGALRM, interrupt)
        hits = 0
        for number in range(10_000):
            buffer, armed = None, True
            try:
                libc.ualarm(1 + number * 7 % 1500, 0)
                buffer = iobmd.allocate(PAGE_SIZE, task=target.pid, wired=False)
                armed = False
            except Interrupt:
                armed = False
                hits += 1
            libc.ualarm(0, 0)
            if buffer is not None:
                buffer.free()
            assert "iobmd" not in Path(f"/proc/{target.pid}/maps").read_text(), number
            if number >= 300 and hits > 10:
                break
        return hits

    with program("sleep", "1000") as target:
        # In a child, because the time limit of this test uses such an alarm too.
        assert in_child(allocate_and_interrupt) > 10
        assert "TracerPid:\t0" in Path(f"/proc/{target.pid}/status").read_text()
