"""`--file`: which part of files and directories is in the page cache, and where in each file."""

from __future__ import annotations

import csv
import heapq
import json
import os
import shutil
import stat
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd.cli.encoding import can_write
from iobmd.cli.folding import show, terminal_width
from iobmd.pagemap.page_cache import FileCache, file_cache
from iobmd.printable import printable
from iobmd.units import PAGE_SIZE, format_count, format_size, round_up

from .document import VERSION, hidden_member, members, write_list
from .look import Hidden
from .table import shortened

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

_WIDTH, _ROWS = 100, 40
"""Columns and rows of the table in a file or a pipe."""
_SHADES, _LETTERS = " ░▒▓█", " .oO#"
_NAME = 20
"""Columns that a name has at least if the positions are shown."""
_PARTS = 64
"""Parts of a file in the JSON document, if the file itself was named."""


class Found(NamedTuple):
    """A file, and its part in the page cache."""

    path: str
    cache: FileCache


_ORDERS: dict[str, Callable[[Found], int | str]] = {
    "cached": lambda found: -found.cache.cached,
    "size": lambda found: -found.cache.size,
    "name": lambda found: found.path,
}


def run(arguments: argparse.Namespace) -> None:
    """Print the files."""
    walk = Walk(arguments.file)
    if arguments.json:
        _write(walk)
    elif arguments.csv:
        lines = csv.writer(sys.stdout, lineterminator="\n")
        lines.writerow(("path", *_FIELDS))
        for found in walk.files():
            lines.writerow((printable(found.path), *_values(found.cache)))
        for hidden in walk.hidden():
            print(hidden, file=sys.stderr)  # not on stdout, which programs read
    else:
        _show(walk, arguments.sort, arguments.top)
    sys.stdout.flush()
    walk.require_named()


class Walk:
    """The files that were named, and those in directories, each once.

    Symbolic links are followed only if they were named. Directories are opened so that their access times do not
    change, if this process may request that.
    """

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self.count = self.size = self.cached = self.dirty = 0
        self.whole = 0  # the size in whole pages, as which the cache holds each file
        self._seen: set[tuple[int, int]] = set()
        self._errors: list[OSError] = []
        self._error_of_named: OSError | None = None
        self.named = {path for path in paths if not os.path.isdir(path)}

    @property
    def has_failed(self) -> bool:
        """Whether a path that was named is missing or may not be read."""
        return self._error_of_named is not None

    def files(self, parts: int = 0) -> Iterator[Found]:
        """Iterate over the files; with `parts`, the named ones are divided into this number."""
        for path in self._paths:
            try:
                if os.path.isdir(path):
                    yield from self._below(path)
                else:
                    yield from self._file(path, os.stat(path), parts)
            except OSError as error:
                self._error_of_named = self._error_of_named or error

    def _below(self, top: str) -> Iterator[Found]:
        left = [top]
        while left:
            path = left.pop()
            try:
                fd = _opened(path)
            except OSError as error:
                if path == top:
                    raise
                self._errors.append(error)
                continue
            try:
                for name, is_directory in _entries(fd):
                    inside = os.path.join(path, name)
                    if is_directory:
                        left.append(inside)
                        continue
                    try:
                        yield from self._file(inside, os.stat(name, dir_fd=fd, follow_symlinks=False), 0)
                    except FileNotFoundError:  # deleted
                        pass
                    except OSError as error:
                        self._errors.append(error)
            finally:
                os.close(fd)

    def _file(self, path: str, found: os.stat_result, parts: int) -> Iterator[Found]:
        if not found.st_size and stat.S_ISREG(found.st_mode):
            self.count += 1
            yield Found(path, FileCache(0, 0, 0, 0, 0, 0, []))
            return
        if not stat.S_ISREG(found.st_mode) and path not in self.named:
            return
        if found.st_nlink > 1 and stat.S_ISREG(found.st_mode):
            key = found.st_dev, found.st_ino
            if key in self._seen:
                return
            self._seen.add(key)
        cache = file_cache(path, parts=parts)
        self.count += 1
        self.size += cache.size
        self.whole += round_up(cache.size, PAGE_SIZE)
        self.cached += cache.cached
        self.dirty += cache.dirty or 0
        yield Found(path, cache)

    def hidden(self) -> list[Hidden]:
        """Return what could not be inspected."""
        if not self._errors:
            return []
        what = format_count(len(self._errors), "file or directory", "files or directories")
        return [Hidden(what, f"such as: {_message(self._errors[0])}", "run as root")]

    def require_named(self) -> None:
        """Raise the first error on a path that was named."""
        if self._error_of_named:
            raise self._error_of_named


def _opened(path: str) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # only its owner may request it
        return os.open(path, flags)


def _entries(fd: int) -> Iterator[tuple[str, bool]]:
    with os.scandir(fd) as entries:
        for entry in entries:
            yield entry.name, entry.is_dir(follow_symlinks=False)


def _message(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


_FIELDS = ("size_bytes", "cached_bytes", "dirty_bytes", "writeback_bytes", "recently_evicted_bytes")


def _values(cache: FileCache) -> tuple[int | None, ...]:
    return cache.size, cache.cached, cache.dirty, cache.writeback, cache.recently_evicted


def _write(walk: Walk) -> None:
    head = {"version": VERSION, "time": round(time.time()), "kernel": os.uname().release, "page_bytes": PAGE_SIZE}
    print("{" + members(head) + ',\n"files": [', end="")
    write_list(
        {"path": found.path}
        | dict(zip(_FIELDS, _values(found.cache), strict=True))
        | ({"part_bytes": found.cache.parts} if found.path in walk.named else {})
        for found in walk.files(_PARTS)
    )
    summary = {"files": walk.count, "size_bytes": walk.size, "cached_bytes": walk.cached, "dirty_bytes": walk.dirty}
    print(f'],\n"summary": {json.dumps(summary)},\n' + members(hidden_member(walk.hidden())) + "}")


def _show(walk: Walk, sort: str | None, top: int | None) -> None:
    width = terminal_width()
    columns = (width or _WIDTH) - 1
    rows = max(5, shutil.get_terminal_size((_WIDTH, _ROWS)).lines - 8) if width else _ROWS
    first = _first(walk, sort, top or rows)
    share = f" ({walk.cached * 100 / walk.whole:.0f} %)" if walk.whole else ""
    dirty = f", {format_size(walk.dirty)} of it not yet written back" if walk.dirty else ""
    files = format_count(walk.count, "file")
    if walk.count or not walk.has_failed:
        show(f"{format_size(walk.cached)} of {format_size(walk.whole)}{share} of {files} in memory{dirty}", width)
    for hidden in walk.hidden():
        show(str(hidden), width)
    if first:
        _show_table(first, columns)
    if walk.count > len(first):
        rest = walk.cached - sum(found.cache.cached for found in first)
        show(f"… {format_count(walk.count - len(first), 'more file')}, {format_size(rest)} (--csv lists all)", width)


def _show_table(rows: list[Found], columns: int) -> None:
    cells = max(0, min(64, columns - 30 - _NAME))
    places = cells >= 8
    print(f"\n{'cached':>10}{'of':>10}{'%':>5}  " + (f"{'position':{cells + 4}}" if places else "") + "file")
    for found in rows:
        cache = found.cache
        whole = round_up(cache.size, PAGE_SIZE)
        line = f"{format_size(cache.cached):>10}{format_size(whole):>10}{cache.share * 100:>5.0f}  "
        if places:
            line += f"[{_drawn(found.path, cells)}]  "
        print(line + shortened(printable(found.path), columns - len(line)))


def _first(walk: Walk, sort: str | None, rows: int) -> list[Found]:
    """Return the first files in the requested order, by default those with the most cached memory; count all."""
    order = _ORDERS[sort or "cached"]
    best = heapq.nsmallest(rows, walk.files(), key=order)
    return [found for found in best if sort or found.cache.cached or len(best) <= len(walk.named)]


def _drawn(path: str, cells: int) -> str:
    """Return the cached part of each of the parts of a file, which may have changed since it was counted."""
    try:
        cache = file_cache(path, parts=cells)
    except OSError:
        return "?".ljust(cells)
    signs = _SHADES if can_write(_SHADES) else _LETTERS
    last = round_up(cache.size - cache.part_size * (len(cache.parts) - 1), PAGE_SIZE)
    sizes = [cache.part_size] * (len(cache.parts) - 1) + [last]
    filled = (
        [signs[-(-held * 4 // size)] for held, size in zip(cache.parts, sizes, strict=True)] if cache.size else []
    )
    # A part of a file of few pages has several cells.
    return "".join(filled[at * len(filled) // cells] if filled else signs[0] for at in range(cells))
