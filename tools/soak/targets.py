"""The supervisor's handling of targets: it starts, inspects, stops and kills them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from iobmd.cli.child import python

from . import kernel
from .board import Board, Target

if TYPE_CHECKING:
    from pathlib import Path

_START = "import iobmd_command; from iobmd.tools.soak.target import main; main()"
"""`iobmd_command` is imported first, so that `import iobmd` does not load the library, which targets do not need."""
_RECENT = 5.0  # seconds after the kill of a worker within which a fault may be its consequence
_TOLERANCE_KB = 64  # inaccuracy of VmRSS counters, which the kernel keeps per processor


class _Resources(NamedTuple):
    """The resources of a target, which must be equal before and after any operation on it."""

    threads: int
    descriptors: tuple[str, ...]
    named: Counter[str]
    children: int
    shared_kb: int

    @classmethod
    def of(cls, pid: int, kind: str) -> _Resources:
        fields = kernel.status(pid)
        return cls(
            int(fields["Threads"]),
            kernel.descriptors(pid),
            Counter(
                f"{mapping.permissions} {mapping.name}" for mapping in kernel.mappings(pid) if mapping.name[:1] == "/"
            ),
            0 if kind == "forking" else len(kernel.children(pid)),
            kernel.kibibytes(fields, "RssShmem"),
        )


class TargetProcess:
    """One of the programs that workers copy from, map into and stop.

    Parameters
    ----------
    folder : Path
        The directory of the run.
    board : Board
        The shared memory of the run.
    number : int
        The number of the target's place on the board.
    kind : str
        A key of `target.KINDS`.
    check_shared : bool
        Whether its shared memory must not grow, because iobmd can determine which pages exist and reads no others.
    """

    def __init__(self, folder: Path, board: Board, number: int, kind: str, *, check_shared: bool) -> None:
        self.kind, self.number = kind, number
        self._folder, self._board, self._check_shared = folder, board, check_shared
        self.words = board.target(number)
        self._lock = os.open(lock_path(folder, number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._process: subprocess.Popen[bytes] | None = None
        self._generation = 0
        self._before: _Resources | None = None
        self._beats, self._beat_at = 0, 0.0
        self._inspecting_since = 0.0
        self._left_behind = False
        self._worker_killed_at = 0.0
        self.start()

    @property
    def pid(self) -> int:
        """The pid of the present process."""
        assert self._process is not None
        return self._process.pid

    @property
    def ready(self) -> bool:
        """Whether workers may use it."""
        return self.words[Target.GENERATION] == self._generation

    def start(self) -> None:
        """Start the program, or start it again."""
        self._generation += 1
        self._before, self._inspecting_since, self._left_behind = None, 0.0, False
        self.words[Target.CLOSED] = 1  # until its first inspection
        self.words[Target.SEED] = self.number * 1000 + self._generation
        arguments = [self._folder, self.number, self.kind, self._generation, os.getpid()]
        with (self._folder / f"target-{self.number}.log").open("ab") as log:
            self._process = subprocess.Popen(
                python("-c", _START, *map(str, arguments)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._beat_at = time.monotonic()

    def kill(self) -> None:
        """Kill it (SIGKILL) and wait for its end."""
        assert self._process is not None
        self.words[Target.KILLED] = self._generation
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)

    def worker_killed(self) -> None:
        """Record that a worker was killed: memory that it had mapped here remains; all else must be unchanged."""
        self._left_behind = True
        self._worker_killed_at = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Stop it briefly by SIGSTOP, unless it is starting: until then it does not end with the supervisor."""
        if not self.ready:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(self.pid, signal.SIGCONT)

    def watch(self, patience: float) -> None:
        """Report an unexpected exit, or work that has not progressed for `patience` seconds."""
        assert self._process is not None
        now = time.monotonic()
        if (code := self._process.poll()) is not None:
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            log = (self._folder / f"target-{self.number}.log").read_text(errors="replace")[-2000:]
            self._report(f"it ended, with {how}", log=log)
            self.words[Target.KILLED] = self._generation
            self.start()
        elif self.words[Target.BEATS] != self._beats:
            self._beats, self._beat_at = self.words[Target.BEATS], now
        elif now - self._beat_at > patience:
            self._report(f"its work has not progressed for {patience:g} s: {self.threads()}")
            self.kill()
            self.start()

    def threads(self) -> str:
        """Return the state and the tracer of each thread."""
        found = []
        with contextlib.suppress(OSError):
            for thread in kernel.threads(self.pid):
                with contextlib.suppress(OSError):
                    fields = kernel.status(f"{self.pid}/task/{thread}")
                    found.append(f"{thread} {fields['State']}, tracer {fields['TracerPid']}")
        return "; ".join(found)

    def inspect(self, limit: float) -> bool:
        """Compare its resources with the earlier ones; return whether that was possible, if not, try again later.

        No operation may be in progress: workers hold a shared lock (flock(2)) during each, which the kernel releases
        when they are killed. New operations are prevented for at most `limit` seconds.
        """
        if not self.ready:
            return True
        if not self._inspecting_since:
            self._inspecting_since = time.monotonic()
            self.words[Target.CLOSED] = 1
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - self._inspecting_since < limit:
                return False
            self._open()
            return True
        try:
            self._compare()
        except OSError:
            pass  # it has exited, which `watch` reports
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._open()
        return True

    def _open(self) -> None:
        self._inspecting_since = 0.0
        self.words[Target.CLOSED] = 0

    def _compare(self) -> None:
        if self._before is None:
            self._before = _Resources.of(self.pid, self.kind)
            return
        before = self._before
        deadline = time.monotonic() + 3  # the kernel ends pins and tracers shortly after their owner was killed
        while (wrong := self._differences(before)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for message in wrong:
            self._report(message)
        if wrong or self._left_behind:
            self._before = _Resources.of(self.pid, self.kind)
            self._left_behind = False

    def _differences(self, before: _Resources) -> list[str]:
        wrong = []
        traced = [thread for thread in kernel.threads(self.pid) if self._is_held(thread)]
        if traced:
            wrong.append(f"it remains traced or stopped: {self.threads()}")
        after = _Resources.of(self.pid, self.kind)
        if after.threads != before.threads:
            wrong.append(f"it has {after.threads} threads, not {before.threads}")
        if after.descriptors != before.descriptors:
            more, fewer = set(after.descriptors) - set(before.descriptors), set(before.descriptors) - set(after[1])
            wrong.append(f"its descriptors were changed: more {sorted(more)}, fewer {sorted(fewer)}")
        if after.children != before.children:
            wrong.append(f"it has {after.children} children, not {before.children}")
        if self._left_behind:
            return wrong
        if after.named != before.named:
            new, gone = after.named - before.named, before.named - after.named
            wrong.append(f"its mappings were changed: more {dict(new)}, fewer {dict(gone)}")
        if self._check_shared and after.shared_kb > before.shared_kb + _TOLERANCE_KB:
            wrong.append(f"its shared memory grew from {before.shared_kb} to {after.shared_kb} KiB")
        return wrong

    def _is_held(self, thread: int) -> bool:
        try:
            fields = kernel.status(f"{self.pid}/task/{thread}")
        except OSError:
            return False
        return fields["State"][0] in "tT" or fields["TracerPid"] != "0"

    def _report(self, message: str, **more: str) -> None:
        if (since := time.monotonic() - self._worker_killed_at) < _RECENT:
            message += f" (a worker was killed {since:.1f} s before)"
        self._board.report("programs_disturbed", f"target {self.kind}", message, target=self.pid, **more)

    def close(self) -> None:
        """End it."""
        self.kill()
        os.close(self._lock)


def lock_path(folder: Path, number: int) -> Path:
    """Return the file that every user of a target locks."""
    return folder / f"target-{number}.lock"
