"""Python programs whose memory is read, and what the kernel reports of it."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from support import kernel

PATIENCE = 30  # seconds

PROGRAM = """
import ctypes, mmap, os, sys
PRIVATE, ANONYMOUS, NORESERVE, HUGETLB = mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS, 0x4000, 0x40000
kept = []
def at(area):
    kept.append(area)
    return ctypes.addressof(ctypes.c_char.from_buffer(area))
def memfd(size, flags=0):
    fd = os.memfd_create("source", flags)
    os.ftruncate(fd, size)
    return fd
{code}
print(*result, flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Source:
    """A Python program that runs `code`, which stores addresses of its memory in `result`, and then lines of code."""

    def __init__(self, code: str, *, before: str = "", user: int | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", before + PROGRAM.format(code=code)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=user, group=user,
            extra_groups=[] if user else None,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.addresses = [int(word) for word in self.process.stdout.readline().split()]
        self.pid = self.process.pid
        self._settle()

    def _settle(self) -> None:
        """Wait until it reads the next line, because it still touches its own pages before that."""
        end = time.monotonic() + PATIENCE
        while not Path(f"/proc/{self.pid}/syscall").read_text().startswith("0 0x0 "):
            assert time.monotonic() < end
            time.sleep(0.001)

    def execute(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"
        self._settle()

    def held(self) -> dict[str, int]:
        """Return the memory of the process according to the kernel, in bytes."""
        return {
            name: kernel.status(name, self.pid)
            for name in ("VmRSS", "RssAnon", "RssFile", "RssShmem", "VmPTE", "VmSwap")
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.end()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def leave(group: Path) -> None:
    """Wait until a cgroup has no process, so that it can be removed."""
    end = time.monotonic() + PATIENCE
    while group.read_text().strip() and time.monotonic() < end:
        time.sleep(0.01)
