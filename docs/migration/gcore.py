"""gcore: the private memory of a running process in a file, each area as of one moment.

Before: `gcore PID`, which stops the process until gdb has written all of its memory.
"""

import os
import sys
from pathlib import Path

import iobmd
from iobmd import pagemap

os.umask(0o077)  # the file is readable by its owner only
pid, path = int(sys.argv[1]), Path(sys.argv[2])
areas = [area.vma for area in pagemap.areas(pid) if area.anonymous]
with path.open("wb") as file:
    for start, end, permissions, *_rest in areas:
        if permissions.startswith("rw"):
            with iobmd.copy(pid, start, end - start, freeze=True, wired=False) as copied:
                stopped = copied.source_stopped_ns / 1e6
                print(f"{start:x}-{end:x} at {file.tell()}, stopped for {stopped:.2f} ms")
                file.write(copied)
