"""`--svg`, `--png`, `--html`: a picture in a file."""

from __future__ import annotations

import html
import sys
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from iobmd._internal.atomic_file import replacing
from iobmd.errors import UnsupportedError
from iobmd.physical import zones

from .drawing import Box, Drawing
from .grid import Grid
from .labels import shortened
from .look import Look
from .survey import Survey

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator
    from typing import BinaryIO

    from .drawing import Image, Label

_LIGHT = {"paper": "#ffffff", "ground": "#f3f4f6", "line": "#d5d8dc", "border": "#7c838b", "text": "#1b1f24"}
_DARK = {"paper": "#15181c", "ground": "#21262c", "line": "#3a4149", "border": "#8b949e", "text": "#e6e9ec"}
_SIZES = {"title": 19, "heading": 13, "plain": 12, "name": 11}
"""Font sizes by the role of a label."""

_SHADES = 6
"""Shades of the edges of letters in a PNG."""


def run(arguments: argparse.Namespace) -> None:
    """Write the picture."""
    kind, path = format_of(arguments) or ("html", arguments.html)
    look = Look(arguments)
    columns, rows = (1024, 96) if kind == "html" else (448, 128)  # a page can be zoomed
    grid = Grid(columns, physical_limit=rows if look.frames else 0)
    if look.frames:
        grid.reach(zones.end_of_memory())
    survey = Survey(look, grid)
    save(
        path,
        look.title,
        partial(_write_html, look, survey) if kind == "html" else partial(write, kind, Drawing(look, survey)),
    )
    look.require_task()


def format_of(arguments: argparse.Namespace) -> tuple[str, str] | None:
    """Return the requested format of an image, and the file; None if no image is requested."""
    if arguments.png is not None:
        _require_pillow()
        return "png", arguments.png
    return None if arguments.svg is None else ("svg", arguments.svg)


def save(path: str, title: str, write: Callable[[BinaryIO], str]) -> None:
    """Write a file, and report it on stderr."""
    with replacing("/dev/stdout" if path == "-" else path, 0o600) as file:
        what = write(file)
    print(f"{path}: {title}, {what}", file=sys.stderr)


def write(kind: str, drawing: Image, file: BinaryIO) -> str:
    """Write an image in a format, and return its size."""
    if kind == "svg":
        file.writelines(line.encode() for line in _svg(drawing))
    else:
        _write_png(drawing, file)
    return f"{drawing.width}x{drawing.height} pixels"


def _svg(drawing: Image) -> Iterator[str]:
    size = f'width="{drawing.width}" height="{drawing.height}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {drawing.width} {drawing.height}" '
    yield 'font-family="system-ui, sans-serif" shape-rendering="crispEdges">\n<style>\n'
    yield _style(_LIGHT | drawing.colors)
    for role, height in _SIZES.items():
        yield f"text.{role} {{ font-size: {height}px }}\n"
    yield "text.title, text.heading { font-weight: 600 }\n"
    yield "text.name { font-family: ui-monospace, 'DejaVu Sans Mono', monospace }\n"
    yield f"@media (prefers-color-scheme: dark) {{\n{_style(_DARK)}}}\n</style>\n"
    # Of thousands of boxes without a tooltip, those of one color make one path.
    for (kind, ink, strength, tip), items in groupby(drawing.items(), _looks):
        if kind is Box and not tip:
            yield _path(items, ink, strength)  # type: ignore[arg-type]
        else:
            yield from (_box(item) if isinstance(item, Box) else _label(item) for item in items)
    yield "</svg>\n"


def _looks(item: Box | Label) -> tuple[type, str, float, str]:
    return (Box, item.ink, item.strength, item.tip) if isinstance(item, Box) else (type(item), "", 1, "")


def _style(colors: dict[str, str]) -> str:
    return "".join(
        f"{'text' if name == 'text' else f'.{name}'} {{ fill: {color} }}\n" for name, color in colors.items()
    )


def _path(boxes: Iterable[Box], ink: str, strength: float) -> str:
    shape = "".join(f"M{box.x:.6g} {box.y:.6g}h{box.width:.6g}v{box.height:.5g}h{-box.width:.6g}z" for box in boxes)
    return f'<path class="{ink}"{_opacity(strength)} d="{shape}"/>\n'


def _opacity(strength: float) -> str:
    return f' opacity="{strength:.2g}"' if strength < 1 else ""


def _box(box: Box) -> str:
    shape = f'x="{box.x:.6g}" y="{box.y:.6g}" width="{box.width:.5g}" height="{box.height:.5g}"'
    return f'<rect class="{box.ink}"{_opacity(box.strength)} {shape}><title>{html.escape(box.tip)}</title></rect>\n'


def _label(label: Label) -> str:
    anchor = f' text-anchor="{label.anchor}"' if label.anchor != "start" else ""
    return (
        f'<text class="{label.role}" x="{label.x:.6g}" y="{label.y:.6g}"{anchor}>{html.escape(label.text)}</text>\n'
    )


def _write_html(look: Look, survey: Survey, file: BinaryIO) -> str:
    from . import page  # noqa: PLC0415 (the command starts sooner without)

    return page.write(look, survey, file, _LIGHT, _DARK)


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401, PLC0415 (an extra)
    except ImportError:
        message = "--png requires Pillow: pip install 'iobmd[plot]'; --svg and --html do not"
        raise UnsupportedError(message) from None


def _write_png(drawing: Image, file: BinaryIO) -> None:
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415

    tinted = partial(_tinted, _LIGHT | drawing.colors)
    # A byte for each pixel: a third of the memory, and smaller files.
    palette = {_LIGHT["paper"]: 0}
    image = Image.new("P", (drawing.width, drawing.height), 0)
    pen = ImageDraw.Draw(image)
    fonts = {role: ImageFont.load_default(size) for role, size in _SIZES.items()}
    shades = [
        palette.setdefault(tinted("text", shade / _SHADES, "paper"), len(palette)) for shade in range(_SHADES + 1)
    ]
    levels = [shades[round(level / 255 * _SHADES)] for level in range(256)]
    for item in drawing.items():
        if isinstance(item, Box):
            # The right and lower edges belong to the rectangle, which has at least one pixel.
            left, top = round(item.x), round(item.y)
            right, bottom = round(item.x + item.width) - 1, round(item.y + item.height) - 1
            fill = palette.setdefault(tinted(item.ink, item.strength, "ground"), len(palette))
            pen.rectangle((left, top, max(left, right), max(top, bottom)), fill=fill)
        else:
            font = fonts[item.role]
            text = shortened(item.text, item.room, font.getlength)
            width, height = round(font.getlength(text)) + 2, _SIZES[item.role] * 3 // 2
            tile = Image.new("L", (width, height))
            ImageDraw.Draw(tile).text((0, height * 3 // 4), text, fill=255, font=font, anchor="ls")
            start = round(item.x - {"start": 0, "middle": width / 2, "end": width}[item.anchor])
            inked = tile.point([0] * 32 + [255] * 224)
            image.paste(tile.point(levels), (start, round(item.y) - height * 3 // 4), inked)
    image.putpalette(bytes.fromhex("".join(color[1:] for color in palette)))
    image.save(file, "PNG")


def _tinted(colors: dict[str, str], ink: str, strength: float, ground: str) -> str:
    """Return an ink that covers the ground in part."""
    pairs = ((int(colors[name][index : index + 2], 16) for name in (ink, ground)) for index in (1, 3, 5))
    return "#" + "".join(f"{round(above * strength + below * (1 - strength)):02x}" for above, below in pairs)
