"""A process with known random data in several kinds of memory, from which the demonstration and benchmarks copy.

`python -m iobmd.cli.demo.client KIND=SIZE …` fills the memory, prints a JSON line for each kind, and waits until its
standard input is closed. `Client` starts it and reads the lines.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
from typing import NamedTuple, Self

from iobmd._native.crosstask import HeldBuffer
from iobmd.cli.child import python
from iobmd.units import PAGE_SIZE

MAP_HUGETLB = 0x40000
GUARDED_PAGE = 1
"""Index of the inaccessible page (PROT_NONE) of "guarded" memory."""


class Piece(NamedTuple):
    """Memory of the client: its kind, its address there, its size in bytes, and the SHA-256 of its contents."""

    kind: str
    address: int
    size: int
    sha256: str


class Client:
    """The process, as a context manager: `pid`, and `pieces` by kind, for the kinds that the host supports."""

    def __init__(self, **sizes: int) -> None:
        command = python("-m", "iobmd.cli.demo.client", *(f"{kind}={size}" for kind, size in sizes.items()))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        assert self._process.stdout
        lines = (self._process.stdout.readline() for _ in sizes)
        found = (Piece(**json.loads(line)) for line in lines if line)
        self.pieces = {piece.kind: piece for piece in found if piece.address}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.communicate()


def _map(kind: str, size: int) -> mmap.mmap | None:
    """Map memory of one kind and fill it; return None if the host does not support this kind."""
    if kind == "hugetlb":
        try:
            area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
        except OSError:
            return None
    elif kind in ("memfd", "file", "read-only"):
        area = _map_file(kind, size)
    else:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if kind == "THP":
        area.madvise(mmap.MADV_HUGEPAGE)
    elif kind in ("anonymous", "guarded"):
        area.madvise(mmap.MADV_NOHUGEPAGE)
    if kind not in ("untouched", "read-only"):
        for offset in range(0, size, 1 << 20):
            area[offset : offset + (1 << 20)] = os.urandom(min(1 << 20, size - offset))
    return area


def _map_file(kind: str, size: int) -> mmap.mmap:
    if kind == "memfd":
        descriptor = os.memfd_create("iobmd-client")
        os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size)
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        if kind == "file":
            return mmap.mmap(file.fileno(), size)
        file.write(os.urandom(size))
        file.flush()
        return mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)


def _forbid_a_page(address: int) -> None:
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE_SIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def main(arguments: list[str]) -> None:
    """Run as the client process."""
    kept = []
    for argument in arguments:
        kind, _, size = argument.partition("=")
        area = _map(kind, int(size))
        if area is None:
            print(json.dumps({"kind": kind, "address": 0, "size": 0, "sha256": ""}), flush=True)
            continue
        held = HeldBuffer(area, False)
        digest = hashlib.sha256(area).hexdigest()
        if kind == "guarded":
            _forbid_a_page(held.address + GUARDED_PAGE * PAGE_SIZE)
        kept.append((area, held))
        piece = {"kind": kind, "address": held.address, "size": held.size, "sha256": digest}
        print(json.dumps(piece), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
