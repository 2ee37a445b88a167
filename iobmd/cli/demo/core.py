"""The part of `iobmd demo` on snapshots: a core file of a running process, which gdb opens, if it is installed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iobmd.api import snapshot
from iobmd.cli import folding
from iobmd.errors import IOReturnError
from iobmd.printable import printable
from iobmd.units import format_size, format_time

if TYPE_CHECKING:
    from iobmd.cli.demo.client import Piece
    from iobmd.task.task import Task

_PATIENCE = 20  # seconds for gdb


def demonstrate(task: Task, piece: Piece) -> dict[str, Any] | str:
    """Write a core file of a task, and read its memory from there by gdb; return the reason if that is impossible."""
    with tempfile.TemporaryDirectory() as folder:
        core = Path(folder, "core")
        try:
            with snapshot(task) as held:
                written = held.core(core)
        except OSError as error:
            return error.strerror or str(error) if isinstance(error, IOReturnError) else str(error)
        found = {
            "stopped_us": written.stopped_ns // 1000,
            "seconds": round(written.seconds, 3),
            "size": written.written,
            "threads": written.threads,
        }
        gdb = shutil.which("gdb")
        return found | {"gdb": _opened(gdb, task, piece, folder) if gdb else None}


def _opened(gdb: str, task: Task, piece: Piece, folder: str) -> dict[str, Any]:
    """Return whether gdb finds the known bytes in the core file, and the innermost frame of the main thread."""
    program = str(Path(f"/proc/{task.pid}/exe").readlink())
    steps = (
        "set debuginfod enabled off",
        f"dump memory memory {piece.address:#x} {piece.address + piece.size:#x}",
        "bt 1",
    )
    command = [gdb, "-nx", "-q", "-batch", *(word for step in steps for word in ("-ex", step)), program, "core"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=_PATIENCE, check=False)
        data = Path(folder, "memory").read_bytes()
    except (OSError, subprocess.SubprocessError):
        return {"equal": False, "frame": None}
    frame = re.search(r"^#0 .*?(?:in )?(\w+) \(", os.fsdecode(done.stdout), re.MULTILINE)
    return {"equal": hashlib.sha256(data).hexdigest() == piece.sha256, "frame": frame and printable(frame[1])}


def is_as_documented(found: dict[str, Any] | str) -> bool:
    """Return whether the result is as documented."""
    return isinstance(found, str) or found["gdb"] is None or found["gdb"]["equal"]


def show(found: dict[str, Any] | str, piece: Piece) -> None:
    """Print the result as text."""
    if isinstance(found, str):
        print()
        folding.show(f"No core file of the other process: {found}", folding.terminal_width())
        return
    size, threads = format_size(found["size"]), found["threads"]
    print(f"\nA core file of the other process, {size}, {threads} thread{'s' * (threads != 1)}:")
    print(f"  snapshot:              stopped it for {format_time(found['stopped_us'] / 1e6)}")
    print(f"  written from there:    in {format_time(found['seconds'])}, while the process ran")
    if gdb := found["gdb"]:
        same = "equal" if gdb["equal"] else "DIFFERENT"
        where = f"; innermost frame: {gdb['frame']}" if gdb["frame"] else ""
        print(f"  opened by gdb:         {format_size(piece.size)} of its memory are {same}{where}")
    else:
        print("  not opened:            gdb is not installed")
