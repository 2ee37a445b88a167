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
from xml.etree import ElementTree

from PIL import Image
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from iobmd import host

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
libc.prctl(15, b"shop", 0, 0, 0)
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
if sys.argv[2:] != ["busy"] and all(os.fork() for _ in range(2)):
    print("ready", flush=True)
end = threading.Event()
threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()
if sys.argv[2:] != ["busy"]:
    sys.stdin.read()  # the workers as well: until the end of the input
    os._exit(0)
print("ready", flush=True)
grown = []
while True:  # a working set of 6 of 12 MiB, and growth of 1 MiB each second
    grown.append(mmap.mmap(-1, 1 << 20, flags=anonymous))
    grown[-1][:] = b"g" * (1 << 20)
    for _ in range(50):
        old[2 << 20 : 8 << 20] = b"O" * (6 << 20)
        end.wait(0.02)
"""
"""A server with two workers, and memory of every kind, also swapped, locked and only reserved."""


class View(NamedTuple):
    """A command whose output is shown."""

    command: str
    """After `iobmd pagemap`; `PID` and `FILE` are replaced."""
    busy: bool = False
    """Whether the program works while it is shown."""
    seconds: float = 0
    """The time from the first output to the picture of a command that does not end by itself; 0: at its end."""
    until: str = ""
    """A text before which the picture ends: below it are names of the host on which it was made."""


VIEWS = {
    "summary": View("PID"),
    "areas": View("PID --each"),
    "processes": View("--processes --name shop"),
    "map": View("PID --map"),
    "watch": View("PID --watch 1", busy=True, seconds=6),
    "heat": View("PID --heat 4 --method written", busy=True),
    "file": View("--file FILE"),
    "host": View("--host", until="one unmovable page"),
}
"""Views by the names of their files."""
HEAT_IMAGE = "heat-image"
"""The picture of `--heat --svg`."""
PAGES = {"page-light": "", "page-dark": "theme=dark&search=heap"}
"""Pictures of the page of --html, and the part of its address after #."""


def main() -> None:
    """Make the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, prog="make screenshots")
    parser.add_argument("--into", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("views", nargs="*", metavar="VIEW", help=f"{', '.join(VIEWS)}, {HEAT_IMAGE}, page")
    arguments = parser.parse_args()
    if not host.has_swap():
        print("this host has no swap (swapon): the pictures will show no swapped memory", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="iobmd-") as folder:
        for name in arguments.views or [*VIEWS, HEAT_IMAGE, "page"]:
            if name == HEAT_IMAGE:
                with _program(Path(folder), busy=True) as pid:
                    _heat_image(pid, arguments.into / f"{name}.svg")
                continue
            if name != "page":
                _terminals(name, VIEWS[name], arguments.into, Path(folder))
                continue
            with _program(Path(folder), busy=False) as pid:
                _pages(pid, arguments.into, Path(folder))


@contextmanager
def _program(folder: Path, *, busy: bool) -> Iterator[int]:
    """Run the program, whose addresses are the same each time, and yield its pid."""
    file = folder / "database.bin"
    with file.open("wb") as written:
        written.write(os.urandom(16 << 20))
        os.fsync(written.fileno())
        os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the program reads a part of it again

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
            command = view.command.replace("PID", str(pid)).replace("FILE", "database.bin")
            text = _screen(command.split(), columns, lines, view, folder)
            path = into / f"{name}-{columns}.svg"
            path.write_text(_drawn(_general(text), columns, f"iobmd pagemap {command}"))
            print(f"{path.name}: {path.stat().st_size >> 10} KiB", flush=True)


def _general(text: str) -> str:
    """Replace the release of this kernel by its version."""
    release = os.uname().release
    return text.replace(release, ".".join(release.split(".")[:2]))


def _screen(words: list[str], columns: int, lines: int, view: View, folder: Path) -> str:
    """Return what a terminal shows of a command that runs in a folder, with escape sequences for colors."""
    # Another server each time: that of the view before may not have exited yet.
    tmux = ["tmux", "-L", f"iobmd-{os.getpid()}-{time.monotonic_ns()}", "-f", "/dev/null"]
    capture = [*tmux, "capture-pane", "-e", "-p", *(["-S", "-"] if view.until else [])]
    command = shlex.join([sys.executable, "-m", "iobmd", "pagemap", *words])
    waiting = f"{shlex.join([*tmux, 'wait-for', '-S', 'end'])}; exec sleep {_PATIENCE}"
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    try:
        subprocess.run(
            [
                *tmux,
                "new-session",
                "-d",
                "-x",
                str(columns),
                "-y",
                str(lines),
                "-c",
                str(folder),
                f"{command}; {waiting}",
            ],
            check=True,
            env=environment | {"LC_ALL": "C.UTF-8"},
        )
        if view.seconds:
            end = time.monotonic() + _PATIENCE
            while not subprocess.run(capture, check=True, capture_output=True).stdout.strip():
                assert time.monotonic() < end, "it shows nothing"
                time.sleep(0.5)
            time.sleep(view.seconds)
        else:
            subprocess.run([*tmux, "wait-for", "end"], check=True, timeout=_PATIENCE)
        done = subprocess.run(capture, check=True, capture_output=True, text=True)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    shown = done.stdout.splitlines()
    if view.until:
        shown = shown[: next(index for index, line in enumerate(shown) if view.until in line)]
    return "\n".join(shown).rstrip()


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


def _heat_image(pid: int, path: Path) -> None:
    command = [sys.executable, "-m", "iobmd", "pagemap", str(pid), "--heat", "6", "--count", "60"]
    subprocess.run([*command, "--method", "written", "--svg", str(path)], check=True)
    path.chmod(0o644)


def _pages(pid: int, into: Path, folder: Path) -> None:
    """Draw the page of --html, and --svg for the first page of the documentation."""
    page, picture = folder / "memory.html", folder / "memory.svg"
    for option, path in (("--html", page), ("--svg", picture)):
        subprocess.run([sys.executable, "-m", "iobmd", "pagemap", str(pid), option, str(path)], check=True)
    # The policy of the page covers its script and style, not the data, in which the release is replaced.
    for path in (page, picture):
        path.write_text(_general(path.read_text()))
    for name, state in PAGES.items():
        _shot(f"{page.as_uri()}#{state}", (1200, 1240), into / f"{name}.png", folder)
    _shot(picture.as_uri(), _size_of(picture), (into.parent if into == FOLDER else into) / "pagemap.png", folder)


def _size_of(picture: Path) -> tuple[int, int]:
    root = ElementTree.parse(picture).getroot()
    return int(root.attrib["width"]), int(root.attrib["height"])


def _shot(address: str, size: tuple[int, int], path: Path, folder: Path) -> None:
    shot = folder / "shot.png"
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    places = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}", address]
    command = [*browser, f"--window-size={size[0]},{size[1]}", *places]
    subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE)
    with Image.open(shot) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size >> 10} KiB", flush=True)


if __name__ == "__main__":
    main()
