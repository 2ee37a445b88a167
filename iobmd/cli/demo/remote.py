"""The part of `iobmd demo` on memory in another task: allocation, equal page frames, and a copy as of one moment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from iobmd import pagemap
from iobmd.api import allocate, copy
from iobmd.cli import folding
from iobmd.errors import IOReturnError
from iobmd.units import format_size, format_time

if TYPE_CHECKING:
    from iobmd.cli.demo.client import Piece
    from iobmd.task.task import Task

_SIZE = 64 << 10


def demonstrate(task: Task, piece: Piece) -> dict[str, Any] | str:
    """Allocate memory in a task, and copy its memory as of one moment; return the reason if that is impossible."""
    data = os.urandom(_SIZE)
    try:
        with allocate(_SIZE, task=task, shared=True) as buffer, buffer.map() as here:
            there = buffer.getBytesNoCopy()
            buffer.writeBytes(0, data)
            seen = task.read(there, _SIZE) == data
            seen = seen and bytes(memoryview(here)) == data  # also faults each page into this process
            frames = [_frames(task, there), _frames(os.getpid(), here.getAddress())]
            found = {
                "size": _SIZE,
                "address": there,
                "wiring": buffer.wiring.value,
                "seen": seen,
                "same_frames": None if None in frames[0] else frames[0] == frames[1],
                "stopped_us": buffer.task_stopped_ns // 1000,
            }
        with copy(task, piece.address, piece.size, freeze=True, wired=False) as frozen:
            return found | {"frozen": piece.size, "frozen_stopped_us": frozen.source_stopped_ns // 1000}
    except IOReturnError as error:
        return str(error)


def _frames(task: Task | int, address: int) -> list[int | None]:
    return [page.pfn for page in pagemap.pages(task, address, _SIZE)]


def is_as_documented(found: dict[str, Any] | str) -> bool:
    """Return whether the result is as documented."""
    return isinstance(found, str) or (found["seen"] and found["same_frames"] is not False)


def show(found: dict[str, Any] | str) -> None:
    """Print the result as text."""
    if isinstance(found, str):
        print()
        folding.show(f"No memory in the other process: {found}", folding.terminal_width())
        return
    frames = {True: "the same in both", False: "NOT the same", None: "hidden"}[found["same_frames"]]
    print(f"\nMemory in the other process, {format_size(found['size'])}, {found['wiring']}:")
    stopped, frozen = (format_time(found[key] / 1e6) for key in ("stopped_us", "frozen_stopped_us"))
    print(f"  allocated there:       at {found['address']:#x}; stopped it for {stopped}")
    print(f"  written here:          {'seen' if found['seen'] else 'NOT seen'} there; page frames are {frames}")
    print(f"  copied at one moment:  {format_size(found['frozen'])}; stopped it for {frozen}")
