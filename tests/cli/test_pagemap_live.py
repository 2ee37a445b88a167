"""`iobmd pagemap --watch` on a terminal: keys, sizes of the terminal, and its state afterwards."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Self

import pytest
from support.child import die_with_parent
from support.targets import Target, until_at_rest

PROGRAM = """
import mmap, sys
kept = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
kept.madvise(mmap.MADV_NOHUGEPAGE)
print("ready", flush=True)
for line in sys.stdin:
    kept[:4 << 20] = b"x" * (4 << 20)
    print("done", flush=True)
"""
ENTERED, LEFT = "\x1b[?1049h", "\x1b[?1049l"
PATIENCE = 60  # seconds for what takes one interval, on a busy machine
MARK = "<end of the output>"


class Terminal:
    """A command on a separate terminal, which is its controlling terminal."""

    def __init__(self, *command: str, columns: int = 80, lines: int = 24) -> None:
        self._leader, self.side = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self.side)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }

        def control() -> None:
            die_with_parent()
            os.setsid()
            fcntl.ioctl(self.side, termios.TIOCSCTTY, 0)
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)  # whatever this process inherited

        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=self.side,
            stdout=self.side,
            stderr=self.side,
            env=environment | {"TERM": "xterm-256color"},
            preexec_fn=control,  # noqa: PLW1509 (no thread of this process holds a lock that it needs)
        )
        self.text = ""
        self._seen = 0  # where the screen begins that `until` has returned

    def resize(self, columns: int, lines: int) -> None:
        """Set the size; the kernel sends SIGWINCH."""
        self._lines = lines
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._leader, keys.encode())

    def screens(self) -> list[tuple[int, str]]:
        """Return where each complete text of a screen begins, and the text without colors, from the one last seen."""
        found = []
        for part in re.finditer(r"\x1b\[H((?:(?!\x1b\[H).)*)", self.text[self._seen :], re.DOTALL):
            if part[1].count("\n") == self._lines - 1:
                text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part[1])
                found.append((self._seen + part.start(), re.sub(r" *\r?$", "", text, flags=re.MULTILINE)))
        return found

    def until(self, pattern: str) -> str:
        """Wait for a screen that matches a pattern, and return it.

        It may have been replaced since: if this process did not run for some intervals, it reads several screens.
        """
        end = time.monotonic() + PATIENCE
        while not (found := [(start, text) for start, text in self.screens() if re.search(pattern, text)]):
            shown = self.screens()[-1:]
            assert time.monotonic() < end, f"no {pattern} on the screen:\n{shown and shown[0][1]}"
            self.read()
        self._seen, text = found[0]
        return text

    def forget(self) -> None:
        """Discard the output so far."""
        self.text, self._seen = "", 0

    def read(self) -> bool:
        """Read more, briefly; return whether the terminal is still open."""
        if select.select([self._leader], [], [], 0.1)[0]:
            try:
                data = os.read(self._leader, 1 << 16)
            except OSError:  # EIO: all programs have closed it
                return False
            self.text += data.decode(errors="replace")
        return True

    def wait_for(self, text: str, count: int) -> None:
        """Wait until a text was written this number of times."""
        end = time.monotonic() + PATIENCE
        while self.text.count(text) < count:
            assert time.monotonic() < end, self.text[-2000:]
            self.read()

    def end(self) -> int:
        """Wait until the command has exited, and read all that it wrote; return its exit code."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < end
            self.read()
        os.write(self.side, MARK.encode())  # follows the output, which is read in parts of 4 KiB
        while MARK not in self.text:
            assert time.monotonic() < end
            self.read()
        self.text = self.text.replace(MARK, "")
        return self.process.returncode

    def is_restored(self) -> bool:
        """Return whether the modes are the original ones, the cursor is visible, and the normal screen is shown."""
        modes = self.text.rfind(ENTERED) < self.text.rfind(LEFT)
        cursor = self.text.rfind("\x1b[?25l") < self.text.rfind("\x1b[?25h")
        return modes and cursor and termios.tcgetattr(self.side) == self.before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)
        os.close(self.side)


@pytest.fixture
def target() -> Iterator[Target]:
    with Target([sys.executable, "-c", PROGRAM]) as made:
        until_at_rest(made.pid)  # before that, its own pages count as newly resident
        yield made


def watch(target: Target, *options: str, **size: int) -> Terminal:
    return Terminal("-m", "iobmd", "pagemap", str(target.pid), "--watch", "0.2", *options, **size)


def fill(target: Target) -> None:
    target.tell("fill")
    assert target.line() == "done"


def test_keys(target: Target) -> None:
    """Each key does what the last line says; changes are those of the tick, and those since the start."""
    with watch(target) as terminal:
        shown = terminal.until(r"rss .* tick +since +mapping")
        assert "sort:changes" in shown
        assert len(shown.splitlines()) == 24
        terminal.press("g")
        terminal.until(r"address +rss .*mapping")
        terminal.press("g")
        terminal.until("group:mapping")
        terminal.press("s")
        terminal.until("sort:since")
        terminal.press("S")
        terminal.until("sort:changes")
        terminal.press("/")
        terminal.press("[stack")
        terminal.until(r"filter: \[stack")
        terminal.press("]\r")
        names = terminal.until(r"/ \[stack\]")
        assert [line.split()[-1] for line in names.partition("mapping\n")[2].splitlines() if "K" in line] == [
            "[stack]"
        ]
        terminal.press("\x1b")
        terminal.until("/ filter")
        terminal.press("p")
        terminal.until("paused")
        fill(target)
        end = time.monotonic() + 0.7  # three intervals
        while time.monotonic() < end:
            terminal.read()
        assert not any("newly resident" in text for _start, text in terminal.screens())
        terminal.press("p")
        terminal.until(r"this tick: .*\+4(\.\d)?M newly resident")
        shown = terminal.until(r"this tick: +-\n")
        assert re.search(r"since [\d:]+: .*\+4(\.\d)?M newly resident", shown)
        assert re.search(r"\+4(\.\d)?M .*\[anon\]", shown), shown  # the kernel may also have moved pages
        assert "\x1b[32m+4" in terminal.text  # in the color of the legend
        terminal.press("r")
        terminal.until(r"since [\d:]+: -\n")
        terminal.press("?")
        terminal.until("any key: back")
        terminal.press("x")
        terminal.until("sort:changes")
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.is_restored()
        assert "nothing changed" in terminal.text.rpartition(LEFT)[2]


@pytest.mark.parametrize(("columns", "lines"), [(40, 20), (60, 12), (132, 50)])
def test_resizing(target: Target, columns: int, lines: int) -> None:
    """The screen is drawn again in the new size, also while nothing is read, and each row has its name."""
    with watch(target) as terminal:
        terminal.until("group:mapping")
        terminal.press("p")
        terminal.until("paused")
        terminal.resize(columns, lines)
        terminal.until("paused")
        for key, wanted in (("g", "tick +since"), ("?", "any key: back"), ("?", "tick +since")):
            terminal.press(key)
            shown = terminal.until(wanted).split("\n")
            assert len(shown) == lines
            assert max(map(len, shown)) <= columns
        heading = next(number for number, line in enumerate(shown) if re.search(wanted, line))
        assert re.search(r"[\[a-zA-Z]", shown[heading + 1].split()[-1])
        terminal.press("q")
        assert terminal.end() == 0


@pytest.mark.parametrize("ending", ["SIGTERM", "SIGHUP", "\x03", "\x1c", "q", "target"])
def test_the_terminal_is_restored(target: Target, ending: str) -> None:
    with watch(target) as terminal:
        terminal.until("group:mapping")
        assert not terminal.is_restored()
        if ending.startswith("SIG"):
            terminal.process.send_signal(signal.Signals[ending])
        elif ending == "target":
            target.process.kill()
            target.process.wait()
        else:
            terminal.press(ending)
        assert terminal.end() == 0
        assert terminal.is_restored()
        assert ("has exited" in terminal.text) == (ending == "target")


def test_the_terminal_is_restored_after_an_error() -> None:
    program = (
        "from iobmd.tools.pagemap.screen import full_screen; from rich.console import Console\n"
        "with full_screen(Console()): raise OSError('a defect')"
    )
    with Terminal("-c", program) as terminal:
        assert terminal.end() == 1
        assert ENTERED in terminal.text
        assert terminal.is_restored()
        assert "a defect" in terminal.text.rpartition(LEFT)[2]


SHELL = """
import os, signal, sys
pid = os.fork()
if not pid:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
while True:
    _pid, status = os.waitpid(pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    print(f"job {pid} is stopped", flush=True)
"""
"""A shell with one job: the kernel stops no process whose session has no such parent."""


def test_suspending(target: Target) -> None:
    """Ctrl-Z restores the terminal before the process stops, and SIGCONT occupies it again."""
    command = ("-m", "iobmd", "pagemap", str(target.pid), "--watch", "0.2")
    with Terminal("-c", SHELL, *command) as terminal:
        for _time in range(2):
            terminal.until("group:mapping")
            terminal.press("\x1a")
            terminal.wait_for("is stopped", 1)
            assert terminal.is_restored()
            job = re.search(r"job (\d+)", terminal.text.rpartition(LEFT)[2])
            assert job
            terminal.forget()
            os.kill(int(job[1]), signal.SIGCONT)
            terminal.wait_for(ENTERED, 1)
        terminal.until("group:mapping")
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.is_restored()


def test_without_a_keyboard(target: Target) -> None:
    """If only the output is a terminal, the screen is the same; signals end it."""
    program = (
        "import os, sys; os.dup2(os.open('/dev/null', os.O_RDONLY), 0); "
        "from iobmd.tools.pagemap import main; "
        f"sys.exit(main(['{target.pid}', '--watch', '0.2']))"
    )
    with Terminal("-c", program) as terminal:
        terminal.until("mapping")
        fill(target)
        terminal.until(r"since [\d:]+: .*\+4(\.\d)?M newly resident")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 0
        assert terminal.is_restored()
