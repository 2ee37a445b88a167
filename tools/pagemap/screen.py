"""The whole terminal: an alternate screen that is redrawn, and single key presses."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import signal
import sys
import termios
import time
import tty
from typing import TYPE_CHECKING, Any

from rich.live import Live

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, RenderableType

_SEQUENCES = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b": "escape",
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\b": "backspace",
    "\x04": "q",
}
_KEY = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Za-z])|.", re.DOTALL)


class FullScreen:
    """The terminal between `open` and `close`.

    Signals are handled between two steps of `keys`, so that nothing is left half written: Ctrl-Z restores the
    terminal before the process stops, and `fg` redraws it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._keyboard = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else -1
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._saved: list[Any] = []
        self._handlers: dict[int, Any] = {}
        self._wakeup: tuple[int, int] = (-1, -1)
        self._must_stop = self._was_continued = False
        self.has_ended = False
        """Whether the terminal was closed."""

    def open(self) -> None:
        """Occupy the terminal."""
        if self._keyboard >= 0:
            self._saved = termios.tcgetattr(self._keyboard)
        reading, writing = self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        del reading
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number, handler in (
            (signal.SIGWINCH, self._ignore),
            (signal.SIGTSTP, self._stop_later),
            (signal.SIGCONT, self._continued),
            (signal.SIGQUIT, signal.getsignal(signal.SIGINT)),
        ):
            self._handlers[number] = signal.signal(number, handler)
        self._occupy()

    def close(self) -> None:
        """Restore the terminal."""
        self._release()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        signal.set_wakeup_fd(-1)
        for fd in self._wakeup:
            if fd >= 0:
                os.close(fd)
        self._wakeup = (-1, -1)

    def draw(self, picture: RenderableType) -> None:
        """Replace what is shown."""
        if self._live:
            self._live.update(picture, refresh=True)

    def keys(self, deadline: float) -> list[str] | None:
        """Wait for keys until a time (`time.monotonic`); None: another event, and the screen must be drawn again."""
        watched = [self._wakeup[0]] + ([self._keyboard] if self._keyboard >= 0 else [])
        ready = select.select(watched, [], [], max(0.0, deadline - time.monotonic()))[0]
        if self._wakeup[0] in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakeup[0], 512)
            self._follow_signals()
            return None
        return self._read() if ready else []

    def _read(self) -> list[str]:
        try:
            data = os.read(self._keyboard, 512)
        except OSError:
            data = b""
        if not data:
            self.has_ended = True
        return [_SEQUENCES.get(key, key) for key in _KEY.findall(self._decoder.decode(data))]

    def _follow_signals(self) -> None:
        if self._must_stop:
            self._must_stop = False
            self._release()
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTSTP)  # until SIGCONT
            signal.signal(signal.SIGTSTP, self._stop_later)
            self._was_continued = True
        if self._was_continued:  # also after a SIGSTOP, during which the shell has changed the terminal
            self._was_continued = False
            self._release()
            self._occupy()

    def _occupy(self) -> None:
        if self._keyboard >= 0:
            tty.setcbreak(self._keyboard, termios.TCSANOW)
        self._live = Live(
            console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    def _release(self) -> None:
        live, self._live = self._live, None
        try:
            if live:
                live.stop()
        finally:
            if self._saved:
                with contextlib.suppress(termios.error):  # it was closed
                    termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._saved)

    def _ignore(self, _number: int, _frame: object) -> None:
        pass

    def _stop_later(self, _number: int, _frame: object) -> None:
        self._must_stop = True

    def _continued(self, _number: int, _frame: object) -> None:
        self._was_continued = True


@contextlib.contextmanager
def full_screen(console: Console) -> Iterator[FullScreen]:
    """Occupy the terminal in a `with` block; it is restored however the block ends."""
    screen = FullScreen(console)
    try:
        screen.open()
        yield screen
    finally:
        screen.close()
