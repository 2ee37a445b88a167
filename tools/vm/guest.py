"""Booting a guest, and evaluating its output."""

import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from .kernels import Kernel
from .machine import Link, Machine

BOOT = 60
"""Seconds within which a guest must start; it takes 5 to 15, but emulated processors sometimes hang in patched
code."""

_UP = "@@UP "
_EXIT = re.compile(r"^@@EXIT (\d+) ", re.MULTILINE)
_SUMMARY = re.compile(r"^=+ (.*\d+ passed.*) in [\d.]+s.* =+$", re.MULTILINE)
_OOPS = re.compile(
    r"^.*(?:Oops|Kernel panic|kernel BUG|BUG: |WARNING: (?:CPU: |\S+ at )|protection fault|soft lockup|hung_task).*$",
    re.MULTILINE,
)


class Outcome(NamedTuple):
    """The result of a guest."""

    output: str
    """Its output."""
    log: str
    """The kernel's messages."""
    failure: str
    """Why it counts as failed, "" if it does not."""
    seconds: float

    @property
    def came_up(self) -> bool:
        """Whether its first process, and thus the tests, started."""
        return _UP in self.output

    @property
    def summary(self) -> str:
        """The counts in the test runner's summary."""
        found = _SUMMARY.search(self.output)
        return found[1] if found else ""


class EndedError(Exception):
    """The guests were ended before this one was complete."""


class Guests:
    """Guests that run at the same time, each booted by a thread; the end of the `with` block ends all of them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._ended = True
            for qemu in self._running:
                qemu.kill()

    def boot(
        self, kernel: Kernel, machine: Machine, initramfs: Path, timeout: float, see: Callable[[str], None]
    ) -> Outcome:
        """Boot a guest, which runs its script and powers off.

        Parameters
        ----------
        kernel, machine
            The kernel and the hardware of the guest.
        initramfs : Path
            The initramfs to boot; the log is written next to it.
        timeout : float
            Seconds after its start after which it is ended, and has failed.
        see : callable
            Called with each line of its output.

        Raises
        ------
        EndedError
            The `with` block had already ended.
        """
        log = initramfs.with_name("kernel.log")
        log.touch()
        begin = time.monotonic()
        lines: list[str] = []
        with self._start(machine.command(kernel, initramfs, log), machine.link) as qemu:
            alarm = _Alarm(qemu)
            try:
                alarm.set(BOOT, f"not started within {BOOT} s")
                assert qemu.stdout
                for line in qemu.stdout:
                    lines.append(line.replace("\r", ""))
                    see(lines[-1].rstrip("\n"))
                    if line.startswith(_UP):
                        alarm.set(timeout, f"still running after {timeout:.0f} s")
                status = qemu.wait()
            finally:
                alarm.cancel()
                qemu.kill()
                with self._lock:
                    self._running.discard(qemu)
        if self._ended:
            raise EndedError
        output, messages = "".join(lines), log.read_text(errors="replace")
        seconds = time.monotonic() - begin
        ended = alarm.expired or _ended(status)
        return Outcome(output, messages, ended or verdict(output, messages), seconds)

    def _start(self, words: list[str], link: Link | None) -> subprocess.Popen[str]:
        with self._lock:
            if self._ended:
                raise EndedError
            # The kernel kills the guest when this process ends, even if it is killed. Ctrl-C on the terminal does not
            # reach the guest.
            qemu = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=[link.socket] if link else [],
                start_new_session=True,
            )
            self._running.add(qemu)
        return qemu


class _Alarm:
    """Ends a guest when its time limit expires; `expired` is then the reason."""

    def __init__(self, qemu: subprocess.Popen[str]) -> None:
        self._qemu = qemu
        self._timer = threading.Timer(0, self._expire)
        self.expired = ""

    def set(self, seconds: float, why: str) -> None:
        """Set the timer to a number of seconds from now, replacing the previous setting."""
        self.cancel()
        self._timer = threading.Timer(seconds, self._expire, [why])
        self._timer.start()

    def cancel(self) -> None:
        """Cancel the timer."""
        self._timer.cancel()

    def _expire(self, why: str) -> None:
        self.expired = why
        self._qemu.kill()


def oops(log: str) -> str:
    """Return the first error that a kernel reported, "" if none."""
    found = _OOPS.search(log)
    return f"the kernel: {found[0].strip()}" if found else ""


def verdict(output: str, log: str) -> str:
    """Return why a guest failed, "" if it did not. A missing marker or test runner's summary is a failure too."""
    if found := oops(log):
        return found
    exit_status = _EXIT.search(output)
    if not exit_status:
        return "it ended without the end marker"
    if exit_status[1] != "0":
        return f"its tests ended with status {exit_status[1]}"
    return "" if _SUMMARY.search(output) else "its output contains no summary of the tests"


def _ended(status: int) -> str:
    if status < 0:
        return f"QEMU was ended by {signal.Signals(-status).name}"
    return f"QEMU ended with status {status}" if status else ""
