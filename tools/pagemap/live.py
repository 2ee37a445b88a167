"""`--watch` on a terminal: a screen that is redrawn after each read, and reacts to keys."""

from __future__ import annotations

import time
from collections import Counter
from typing import IO, TYPE_CHECKING, TypeVar

from rich.console import Console

from iobmd.cli.folding import show as show_line
from iobmd.cli.folding import terminal_width

from .board import SORTS, draw
from .screen import FullScreen, full_screen
from .ticks import happened, ticks

if TYPE_CHECKING:
    import argparse

    from iobmd.pagemap.area import Area
    from iobmd.pagemap.change import Kind

    from .look import Look
    from .ticks import Tick

_T = TypeVar("_T")
_REMEMBERED = 8192
"""Maximum number of rows whose changes since the start are retained, for a process that keeps mapping new areas."""


class History:
    """The changes since the start, or since they were reset: of all areas, and by row."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        self.start = time.time()
        self.sums: Counter[Kind] = Counter()
        self.groups: dict[str, Counter[Kind]] = {}
        self.areas: dict[int, Counter[Kind]] = {}

    def add(self, tick: Tick) -> None:
        """Add the changes of a tick."""
        for name, sums in tick.changed_groups.items():
            _entry(self.groups, name).update(sums)
            self.sums.update(sums)
        for vma, _area, sums in tick.changed:
            _entry(self.areas, vma.start).update(sums)


def _entry(known: dict[_T, Counter[Kind]], key: _T) -> Counter[Kind]:
    if key not in known and len(known) >= _REMEMBERED:
        del known[next(iter(known))]  # the oldest
    return known.setdefault(key, Counter())


class View:
    """What is shown, and how; keys change it.

    Attributes
    ----------
    sort : str
        One of `SORTS`.
    each : bool
        Whether there is a row for each area instead of each mapping.
    paused, helping : bool
        Whether nothing is read, and whether the keys are explained.
    filter : str
        A part of the names of the rows that are shown.
    typing : bool
        Whether keys are added to the filter.
    offset : int
        The number of rows above the first that is shown.
    """

    def __init__(self, look: Look, *, each: bool) -> None:
        self.look = look
        self.history = History()
        self.sort = SORTS[0]
        self.each = each
        self.paused = self.helping = self.typing = False
        self.filter = ""
        self.offset = 0
        self.page = 1
        """The number of rows that fit."""

    def accepts(self, name: str) -> bool:
        """Return whether a row with this name passes the filter."""
        return self.filter.casefold() in name.casefold()

    def press(self, key: str) -> bool:
        """Follow a key; return whether it ends the view."""
        if self.typing:
            self._type(key)
        elif self.helping and key != "q":
            self.helping = False
        elif key in _MOVES:
            self.offset = max(0, self.offset + _MOVES[key] * (self.page if "page" in key else 1))
        elif key in "sS":
            step = 1 if key == "s" else -1
            self.sort = SORTS[(SORTS.index(self.sort) + step) % len(SORTS)]
        elif key == "/":
            self.typing = True
        elif key in ("p", " "):
            self.paused = not self.paused
        elif key == "g":
            self.each, self.offset = not self.each, 0
        elif key == "r":
            self.history.reset()
        elif key == "escape":
            self.filter = ""
        elif key in ("?", "h"):
            self.helping = True
        return key == "q" and not self.typing

    def _type(self, key: str) -> None:
        self.offset = 0
        if key in ("enter", "escape"):
            self.typing = False
            self.filter = self.filter if key == "enter" else ""
        elif key == "backspace":
            self.filter = self.filter[:-1]
        elif len(key) == 1 and key.isprintable():
            self.filter += key


_MOVES = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -1, "page down": 1}


class _Quit(Exception):  # noqa: N818 (it is not an error)
    pass


class _Watch:
    """The loop: between two reads, keys and signals are handled."""

    def __init__(self, look: Look, screen: FullScreen, console: Console, arguments: argparse.Namespace) -> None:
        self.view = View(look, each=getattr(arguments, "each", False))
        self._screen, self._console = screen, console
        self._tick: Tick | None = None

    def rank(self, area: Area) -> float:
        """Select the unchanged areas that are listed if there are many: those at the top of the order."""
        if not self.view.accepts(area.name):
            return -1.0
        values = {"pss": area.pss, "swap": area.swapped, "huge": area.huge, "size": area.size}
        return float(values.get(self.view.sort, area.resident) or 0)

    def show(self, tick: Tick) -> None:
        self.view.history.add(tick)
        self._tick = tick
        self._draw()

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.view.paused or time.monotonic() < deadline:
            # While it is paused, only events wake it.
            keys = self._screen.keys(time.monotonic() + 3600 if self.view.paused else deadline)
            for key in keys or ():
                if self.view.press(key):
                    raise _Quit
            if self._screen.has_ended:
                raise _Quit
            if keys != []:
                self._draw()

    def _draw(self) -> None:
        if self._tick:
            self._screen.draw(draw(self.view, self._tick, self._console.size))


def show(look: Look, files: tuple[IO[bytes], IO[bytes]], arguments: argparse.Namespace) -> None:
    """Show the ticks until they end, or the key q."""
    console = Console(highlight=False)
    begin = time.monotonic()
    watch = None
    try:
        with full_screen(console) as screen:
            watch = _Watch(look, screen, console, arguments)
            for tick in ticks(look, files, arguments.watch, arguments.count, wait=watch.wait, rank=watch.rank):
                watch.show(tick)
    except (_Quit, KeyboardInterrupt):
        pass
    finally:
        if watch:
            sums = watch.view.history.sums
            text = f"{look.title}, {time.monotonic() - begin:.0f} s: {happened(sums) or 'nothing changed'}"
            show_line(text, terminal_width())
