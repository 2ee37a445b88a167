"""A separate process that ends a test which its time limit could not end, and restores the host if the tests die.

pytest-timeout interrupts a test by a signal handler of Python, which runs only once native code returns: not in a
system call that is restarted, not in a loop of native code, not in an uninterruptible sleep. The guard does not
depend on the process that it monitors. It makes that process print its stacks (SIGABRT, faulthandler), kills the
process and its children, and then restores the settings of the host that tests had changed. It also restores them if
the tests are killed in another way.

Run as a program, this module is the guard: its argument is a pidfd (pidfd_open(2)), and its input lines of JSON.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARGIN = 60.0
"""Seconds after its limit within which a test must end and restore the settings that it changed."""


class Guard:
    """The tests' end of the guard. A process has one; its forked children must not use it."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._undone = 0
        watched = os.pidfd_open(self._owner)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(watched), str(self._owner)],
                stdin=subprocess.PIPE,
                pass_fds=[watched],
                start_new_session=True,  # the tests handle Ctrl-C
            )
        finally:
            os.close(watched)

    def limit(self, test: str, seconds: float | None) -> None:
        """Set the time after which a test is ended; None removes it."""
        self._tell({"test": test, "seconds": seconds})

    @contextlib.contextmanager
    def undoing(self, *steps: tuple[str, ...]) -> Iterator[None]:
        """Perform the steps if this process ends within the `with` block; on a normal exit, the caller performs them.

        A step is ("write", path, text), ("run", program, …), or ("rmdir", path) for a cgroup and its processes.
        """
        self._undone += 1
        number = self._undone
        self._tell({"number": number, "steps": steps})
        try:
            yield
        finally:
            self._tell({"number": number, "steps": None})

    def close(self) -> None:
        """End the guard, which no longer has anything to restore."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, message: dict[str, object]) -> None:
        if os.getpid() != self._owner:
            return
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()


# --- the guard process


class _Watch:
    def __init__(self, watched: int, pid: int) -> None:
        self.watched, self.pid = watched, pid
        self.deadline: float | None = None
        self.test, self.seconds = "", 0.0
        self.steps: dict[int, list[list[str]]] = {}

    def run(self) -> None:
        """Execute messages until their end; end tests that take too long; restore settings if the tests died."""
        unread = b""
        while True:
            patience = None if self.deadline is None else max(self.deadline - time.monotonic(), 0)
            ready, _, _ = select.select([0, self.watched], [], [], patience)
            if 0 in ready:
                if not (data := os.read(0, 1 << 16)):
                    if self.steps:  # died instead of closing the guard
                        self.restore()
                    return
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    self.execute(json.loads(line))
            elif self.watched in ready:
                self.restore()
                return
            elif self.deadline is not None and time.monotonic() >= self.deadline:
                self.deadline = None
                self.end()

    def execute(self, message: dict[str, Any]) -> None:
        if "test" in message:
            self.test, seconds = message["test"], message["seconds"]
            self.seconds = seconds or 0
            self.deadline = None if seconds is None else time.monotonic() + seconds
        elif message["steps"] is None:
            self.steps.pop(message["number"], None)
        else:
            self.steps[message["number"]] = message["steps"]

    def end(self) -> None:
        message = f"{self.test} did not end within {self.seconds:.0f} s; the test run is ended"
        print(f"\n{message}", file=sys.stderr, flush=True)
        os.kill(self.pid, signal.SIGSTOP)  # so that it starts no further children
        for _ in range(3):
            for child in descendants(self.pid):
                if child != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
        os.kill(self.pid, signal.SIGABRT)
        os.kill(self.pid, signal.SIGCONT)
        if not select.select([self.watched], [], [], 5)[0]:
            os.kill(self.pid, signal.SIGKILL)

    def restore(self) -> None:
        for number in sorted(self.steps, reverse=True):
            for kind, *arguments in self.steps[number]:
                with contextlib.suppress(OSError):
                    if kind == "write":
                        Path(arguments[0]).write_text(arguments[1])
                    elif kind == "run":
                        subprocess.run(arguments, check=False)
                    elif kind == "rmdir":
                        _remove_cgroup(Path(arguments[0]))


def descendants(pid: int) -> list[int]:
    """Return the descendants of a process."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def _remove_cgroup(group: Path) -> None:
    end = time.monotonic() + 10
    while group.exists() and time.monotonic() < end:
        for line in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line), signal.SIGKILL)
        with contextlib.suppress(OSError):
            group.rmdir()
        time.sleep(0.05)


if __name__ == "__main__":
    _Watch(int(sys.argv[1]), int(sys.argv[2])).run()
