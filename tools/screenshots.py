"""The screenshots of the documentation: `make screenshots` runs commands on a fixed program, and draws their output.

tmux provides terminals of 80 and of 160 columns, and chromium draws the page of --html. With names of views as
arguments, only these are made; `--into FOLDER` writes them elsewhere.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parents[1] / "docs" / "screenshots"
SIZES = {80: 24, 160: 40}
"""Lines of a terminal by its columns."""
_PATIENCE = 120  # seconds
_NO_RANDOM_ADDRESSES = 0x0040000  # ADDR_NO_RANDOMIZE of personality(2)

PROGRAM = """
import ctypes, mmap, os, sys, threading
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.prctl(15, b"server", 0, 0, 0)
for _ in range(240):  # the heap: below the threshold at which malloc calls mmap
    ctypes.memset(libc.malloc(100_000), 1, 100_000)
anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
huge = mmap.mmap(-1, 64 << 20, flags=anonymous)
huge.madvise(mmap.MADV_HUGEPAGE)
huge[: 48 << 20] = b"h" * (48 << 20)
file = os.memfd_create("cache")
os.ftruncate(file, 32 << 20)
cache = mmap.mmap(file, 32 << 20)
cache[: 20 << 20] = b"c" * (20 << 20)
table = os.open(sys.argv[1], os.O_RDONLY)
base = mmap.mmap(table, 0, prot=mmap.PROT_READ)
sum(base[offset] for offset in range(0, len(base) * 3 // 4, 4096))
read = mmap.mmap(-1, 3 << 20, flags=anonymous)
read.madvise(mmap.MADV_NOHUGEPAGE)
sum(read[offset] for offset in range(0, 3 << 20, 4096))
old = mmap.mmap(-1, 12 << 20, flags=anonymous)
old.madvise(mmap.MADV_NOHUGEPAGE)
old[:] = b"o" * (12 << 20)
old.madvise(21)  # MADV_PAGEOUT: to swap, if there is any
locked = mmap.mmap(-1, 4 << 20, flags=anonymous)
libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(locked))), ctypes.c_size_t(4 << 20))
reserved = mmap.mmap(-1, 1 << 40, flags=anonymous | 0x4000, prot=0)
end = threading.Event()
threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()
print("ready", flush=True)
if sys.argv[2:] != ["busy"]:
    sys.stdin.read()
grown = []
while True:  # a working set of 6 MiB in the huge area, and growth of 1 MiB each second
    grown.append(bytearray(b"g") * (1 << 20))
    for _ in range(100):
        huge[8 << 20 : 14 << 20] = b"H" * (6 << 20)
        end.wait(0.01)
"""
"""Memory of every kind: heap, huge pages, shared, of a file, zero page, swapped, locked, and reserved addresses."""


class View(NamedTuple):
    """A command whose output is shown."""

    command: str
    """After `iobmd pagemap`; `PID` and `FILE` are replaced."""
    busy: bool = False
    """Whether the program works while it is shown."""
    seconds: float = 0
    """When a command that runs until it is ended is captured; 0: at its end."""


VIEWS = {
    "summary": View("PID"),
    "areas": View("PID --each"),
    "map": View("PID --map"),
    "runs": View("PID --runs"),
}
"""Views by the names of their files."""
PAGES = {"page-light": "", "page-dark": "theme=dark&search=heap"}
"""Pictures of the page of --html, and the part of its address after #."""


def main() -> None:
    """Make the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, prog="make screenshots")
    parser.add_argument("--into", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("views", nargs="*", metavar="VIEW", help=f"{', '.join(VIEWS)}, page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="iobmd-") as folder:
        for name in arguments.views or [*VIEWS, "page"]:
            if name != "page":
                _terminals(name, VIEWS[name], arguments.into, Path(folder))
                continue
            with _program(Path(folder), busy=False) as pid:
                _pages(pid, arguments.into, Path(folder))


@contextmanager
def _program(folder: Path, *, busy: bool) -> Iterator[int]:
    """Run the program, whose addresses are the same each time, and yield its pid."""
    file = folder / "database.bin"
    file.write_bytes(os.urandom(16 << 20))

    def prepare() -> None:
        ctypes.CDLL(None).personality(ctypes.c_ulong(_NO_RANDOM_ADDRESSES))

    # -I and -S: nothing depends on the environment, and few modules are loaded.
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(file), *(["busy"] if busy else [])]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=prepare,  # noqa: PLW1509 (there are no threads)
    ) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            time.sleep(1)  # until a pageout is complete
            yield process.pid
        finally:
            process.kill()


def _terminals(name: str, view: View, into: Path, folder: Path) -> None:
    with _program(folder, busy=view.busy) as pid:
        for columns, lines in SIZES.items():
            replaced = {"PID": str(pid), "FILE": str(folder / "database.bin")}
            words = [replaced.get(word, word) for word in view.command.split()]
            text = _screen(words, columns, lines, view.seconds)
            title = f"iobmd pagemap {view.command.replace('PID', str(pid)).replace('FILE', 'database.bin')}"
            path = into / f"{name}-{columns}.svg"
            path.write_text(_drawn(text.replace(f"{folder}/", ""), columns, title))
            print(f"{path.name}: {path.stat().st_size >> 10} KiB")


def _screen(words: list[str], columns: int, lines: int, seconds: float) -> str:
    """Return what a terminal shows, with escape sequences for colors."""
    tmux = ["tmux", "-L", f"iobmd-{os.getpid()}", "-f", "/dev/null"]
    command = shlex.join([sys.executable, "-m", "iobmd", "pagemap", *words])
    waiting = f"{shlex.join([*tmux, 'wait-for', '-S', 'end'])}; exec sleep {_PATIENCE}"
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    try:
        subprocess.run(
            [*tmux, "new-session", "-d", "-x", str(columns), "-y", str(lines), f"{command}; {waiting}"],
            check=True,
            env=environment | {"LC_ALL": "C.UTF-8"},
        )
        if seconds:
            time.sleep(seconds)
        else:
            subprocess.run([*tmux, "wait-for", "end"], check=True, timeout=_PATIENCE)
        done = subprocess.run([*tmux, "capture-pane", "-e", "-p"], check=True, capture_output=True, text=True)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    return done.stdout.rstrip()


def _drawn(text: str, columns: int, title: str) -> str:
    """Return a terminal as SVG; it names fonts that the reader has, and loads none."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(text), no_wrap=True, overflow="crop", crop=True, soft_wrap=False)
    return console.export_svg(title=title, theme=SVG_EXPORT_THEME, code_format=_FORMAT)


_FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: ui-monospace, "DejaVu Sans Mono", monospace }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def _pages(pid: int, into: Path, folder: Path) -> None:
    """Draw the page of --html, and the same picture as PNG for the README."""
    page = folder / "memory.html"
    for option, path in (
        ("--html", page),
        ("--png", into.parent / "pagemap.png" if into == FOLDER else into / "p.png"),
    ):
        subprocess.run([sys.executable, "-m", "iobmd", "pagemap", str(pid), option, str(path)], check=True)
        path.chmod(0o644)
    for name, state in PAGES.items():
        shot = folder / "shot.png"
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        places = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}", f"{page.as_uri()}#{state}"]
        command = [*browser, "--window-size=1200,1240", *places]
        subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE)
        path = into / f"{name}.png"
        with Image.open(shot) as image:
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path.name}: {path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
