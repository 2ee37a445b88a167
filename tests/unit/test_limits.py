"""The framework of the tests: inherited state is set, each test has a time limit, and the host is restored."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

INHERITED = r"""
import json, os, resource, signal, subprocess, sys
from support import inherited
inherited.set_to_expected()
def signals(text):
    fields = dict(line.split(":\t") for line in text.splitlines() if line.startswith("Sig"))
    held = int(fields["SigBlk"], 16) | int(fields["SigIgn"], 16)
    return [number for number in range(1, 65) if held >> number - 1 & 1]
program = signals(subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout)
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
    os.kill(os.getpid(), number)  # ignored when this process began, and still
if not (pid := os.fork()):
    signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGHUP))
    os.kill(os.getpid(), signal.SIGHUP)
    os._exit(0)
print(json.dumps({
    "program": program,
    "fork": os.waitpid(pid, 0)[1],
    "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE),
    "umask": os.umask(0),
    "environment": {name: os.environ.get(name) for name in ("LANG", "LC_ALL", "COLUMNS", "TERM", "PYTHONWARNINGS")},
}))
"""


def test_children_inherit_what_the_tests_expect() -> None:
    """A process whose caller ignores and blocks all signals, and sets other limits, another umask and environment."""

    def disturb() -> None:
        for number in range(1, 65):
            if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
                signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGCHLD, signal.SIGALRM])
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        os.umask(0o777)

    environment = os.environ | {
        "PYTHONPATH": str(TESTS), "LC_ALL": "tr_TR", "COLUMNS": "7", "TERM": "xterm", "PYTHONWARNINGS": "error",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", INHERITED],
        env=environment,
        preexec_fn=disturb,
        restore_signals=False,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    # Job control signals are unchanged; 32 and 33 belong to the C library, through which no program can set them.
    assert set(found["program"]) <= {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, 32, 33}
    assert found["fork"] == signal.SIGHUP, "the fork survives a signal that is not ignored there"
    assert found["descriptors"][0] == min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert found["umask"] == 0o022
    assert found["environment"] == {
        "LANG": "C.UTF-8", "LC_ALL": None, "COLUMNS": None, "TERM": "dumb", "PYTHONWARNINGS": None,
    }  # fmt: skip


def run_tests(folder: Path, text: str, *options: str) -> tuple[int, str, float]:
    """Run a file of tests like this one; return the exit status, the output and the seconds."""
    (folder / "test_inner.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "conftest", *options]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "-c", "/dev/null", "--rootdir", folder, folder],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_a_test_that_takes_too_long_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    (tmp_path / "setting").write_text("before")
    text = f"""
import subprocess
import pytest
@pytest.mark.timeout(1, func_only=True)
def test_waits(setting):
    setting({str(tmp_path / "setting")!r}, "changed")
    subprocess.run(["sleep", "1000"])
def test_next():
    pass
"""
    status, output, seconds = run_tests(tmp_path, text, "--timeout-method=signal")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "1 failed, 1 passed" in output
    assert "Timeout" in output
    assert (tmp_path / "setting").read_text() == "before"
    assert seconds < 100


HANGS = """
import ctypes, subprocess
from pathlib import Path
import pytest
from support import guard
guard.MARGIN = 1
@pytest.mark.timeout(5, func_only=True)  # within which a busy machine lets it hang
def test_hangs(setting):
    setting({setting!r}, "changed")
    sleeper = subprocess.Popen(["sleep", "1000"])
    Path({pid!r}).write_text(str(sleeper.pid))
    # Locked twice with the GIL held, so that no handler and no other thread of Python can run.
    lock = ctypes.PyDLL(None).pthread_mutex_lock
    mutex = ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)
"""


def test_a_test_that_hangs_in_native_code_is_ended_and_the_host_restored(tmp_path: Path) -> None:
    (tmp_path / "setting").write_text("before")
    text = HANGS.format(setting=str(tmp_path / "setting"), pid=str(tmp_path / "pid"))
    status, output, seconds = run_tests(tmp_path, text, "--timeout-method=signal")
    assert status == -signal.SIGABRT
    assert "test_inner.py::test_hangs did not end within 6 s" in output
    assert re.search(r'File ".*test_inner\.py", line \d+ in test_hangs', output), "its stack is printed"
    end = time.monotonic() + 20
    while (tmp_path / "setting").read_text() != "before" or _lives(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert seconds < 100


def test_tests_that_are_killed_leave_the_host_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "setting").write_text("before")
    text = f"""
import os, signal
def test_dies(setting):
    setting({str(tmp_path / "setting")!r}, "changed")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    status, _output, _seconds = run_tests(tmp_path, text)
    assert status == -signal.SIGKILL
    end = time.monotonic() + 20
    while (tmp_path / "setting").read_text() != "before":
        assert time.monotonic() < end
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
