"""`--svg`, `--png`, `--html`: a picture in a file."""

from __future__ import annotations

import html
import sys
from typing import TYPE_CHECKING

from iobmd._internal.atomic_file import replacing
from iobmd.errors import UnsupportedError
from iobmd.physical import zones

from .drawing import Box, Drawing, Label
from .grid import Grid
from .look import Look
from .survey import survey

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from typing import BinaryIO

COLUMNS, ROWS = 240, 160


def run(arguments: argparse.Namespace) -> None:
    """Write the picture."""
    kind, path = next((kind, path) for kind in _WRITERS if (path := getattr(arguments, kind)) is not None)
    look = Look(arguments)
    if kind == "png":
        _require_pillow()
    grid = Grid(COLUMNS, physical_limit=ROWS)
    if look.frames:
        grid.reach(zones.end_of_memory())
    drawing = Drawing(look, grid, survey(look, grid))
    with replacing("/dev/stdout" if path == "-" else path, 0o600) as file:
        _WRITERS[kind](drawing, file)
    print(f"{path}: {look.title}, {drawing.width}x{drawing.height} pixels", file=sys.stderr)
    look.require_task()


def _write_svg(drawing: Drawing, file: BinaryIO) -> None:
    file.writelines(line.encode() for line in _svg(drawing))


def _svg(drawing: Drawing) -> Iterator[str]:
    size = f'width="{drawing.width}" height="{drawing.height}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {drawing.width} {drawing.height}" '
    yield 'font-family="sans-serif" font-size="11" shape-rendering="crispEdges">\n'
    for item in drawing.items():
        yield _box(item) if isinstance(item, Box) else _label(item)
    yield "</svg>\n"


def _box(box: Box) -> str:
    shape = f'x="{box.x:g}" y="{box.y:.5g}" width="{box.width:g}" height="{box.height:.5g}" fill="{box.color}"'
    tip = f"><title>{html.escape(box.tip)}</title></rect>\n" if box.tip else "/>\n"
    return f"<rect {shape}{tip}"


def _label(label: Label) -> str:
    anchor = ' text-anchor="end"' if label.to_the_left else ""
    weight = ' font-weight="bold" font-size="14"' if label.strong else ""
    return f'<text x="{label.x:g}" y="{label.y:g}"{anchor}{weight}>{html.escape(label.text)}</text>\n'


def _write_html(drawing: Drawing, file: BinaryIO) -> None:
    file.write(_PAGE_HEAD.replace("TITLE", html.escape(drawing.look.title)).encode())
    _write_svg(drawing, file)
    file.write(_PAGE_TAIL.encode())


_PAGE_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<style>
body { margin: 0; background: #fff } svg { display: block; margin: auto }
#tip { position: fixed; display: none; white-space: pre; padding: 6px 9px; border-radius: 4px; pointer-events: none;
       background: #222; color: #fff; font: 12px ui-monospace, monospace }
rect.over { stroke: #000; stroke-width: 1 }
</style></head><body>
"""

# Browsers show the title of a shape with a delay: this shows it immediately, next to the pointer.
_PAGE_TAIL = """<div id="tip"></div>
<script>
const tip = document.getElementById("tip");
for (const title of document.querySelectorAll("rect > title")) {
  title.parentNode.dataset.tip = title.textContent;
  title.remove();
}
let over = null;
document.addEventListener("mousemove", event => {
  if (over) over.classList.remove("over");
  over = event.target.dataset && event.target.dataset.tip ? event.target : null;
  tip.style.display = over ? "block" : "none";
  if (!over) return;
  over.classList.add("over");
  tip.textContent = over.dataset.tip;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4) + "px";
});
</script></body></html>
"""


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401, PLC0415 (an extra)
    except ImportError:
        message = "--png requires Pillow: pip install 'iobmd[plot]'; --svg and --html do not"
        raise UnsupportedError(message) from None


def _write_png(drawing: Drawing, file: BinaryIO) -> None:
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415

    image = Image.new("RGB", (drawing.width, drawing.height), "white")
    pen = ImageDraw.Draw(image)
    fonts = {strong: ImageFont.load_default(14 if strong else 11) for strong in (False, True)}
    for item in drawing.items():
        if isinstance(item, Box):
            # The right and lower edges belong to the rectangle, which has at least one pixel.
            left, top = round(item.x), round(item.y)
            right, bottom = round(item.x + item.width) - 1, round(item.y + item.height) - 1
            pen.rectangle((left, top, max(left, right), max(top, bottom)), fill=item.color)
        else:
            anchor = "rs" if item.to_the_left else "ls"
            pen.text((item.x, item.y), item.text, fill="black", font=fonts[item.strong], anchor=anchor)
    image.save(file, "PNG")


_WRITERS = {"svg": _write_svg, "png": _write_png, "html": _write_html}
"""Writers by option."""
