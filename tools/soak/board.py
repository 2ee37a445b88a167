"""Memory shared by the supervisor, its workers and its targets: counters that survive a SIGKILL of their writer.

A file of 64-bit words. Each word has one writer at a time: a thread of a worker, a target, or the supervisor.
"""

from __future__ import annotations

import json
import mmap
import os
import random
from enum import IntEnum
from pathlib import Path
from typing import Any

THREADS = 64
TARGETS = 32
_ROW = 256
_TARGET_ROW = 32
_HEADER = 64
_WORDS = _HEADER + THREADS * _ROW + TARGETS * _TARGET_ROW
KINDS = 96
"""Maximum number of kinds of events."""


class Thread(IntEnum):
    """Words of a worker's thread, followed by its counters of events, refusals and controls."""

    BEGAN = 0  # start of the current event: time.monotonic_ns(), 0 between two events
    KIND = 1  # index of that event's kind
    EVENTS = 2
    FIRST_KIND = 8
    FIRST_REFUSAL = FIRST_KIND + KINDS
    FIRST_CONTROL = 240


class Target(IntEnum):
    """Words of a target."""

    PID = 0
    GENERATION = 1  # number of the process in this place, from 1 on; written last, when it is ready
    CLOSED = 2  # no new operation may begin, because the supervisor is inspecting it
    KILLED = 3  # the last generation that the supervisor killed
    SEED = 4  # seed of its pattern
    PRIVATE = 5  # address of the pattern in private memory
    SHARED = 6  # address of the pattern in shared memory
    SPARSE = 7  # address of shared memory that it never touches
    SCRATCH = 8  # address of private memory that any worker may write to
    MOMENT = 9  # address of pages to which it writes consecutive numbers; 0: none
    FAULTING = 10  # address of memory whose page faults it serves itself; 0: none
    BEATS = 11  # number of completed pieces of work


PATTERN = 1 << 20
"""Bytes of a target's pattern."""
SPARSE = 4 << 20
SCRATCH_SLICE = 8192
"""Bytes of a target's scratch memory for each thread of the workers."""
MOMENT = 64 << 10


def pattern(seed: int, size: int = PATTERN) -> bytes:
    """Return the bytes of a pattern, in which no page is zero."""
    return random.Random(seed).randbytes(size)


class Board:
    """The shared memory of a run, in a directory with its other files."""

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        fd = os.open(folder / "board", flags, 0o600)
        try:
            if create:
                os.ftruncate(fd, _WORDS * 8)
            self._map = mmap.mmap(fd, _WORDS * 8)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        self._faults = os.open(folder / "faults", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    @property
    def stopping(self) -> bool:
        """Whether workers and targets end their work."""
        return bool(self._words[0])

    def stop(self) -> None:
        """Make workers end after their current event."""
        self._words[0] = 1

    def thread(self, number: int) -> memoryview:
        """Return the words of a worker's thread."""
        start = _HEADER + number * _ROW
        return self._words[start : start + _ROW]

    def target(self, number: int) -> memoryview:
        """Return the words of a target."""
        start = _HEADER + THREADS * _ROW + number * _TARGET_ROW
        return self._words[start : start + _TARGET_ROW]

    def report(self, fault: str, kind: str, message: str, **more: Any) -> None:
        """Record a fault by one write(2) in append mode, so that reports of several processes do not mix."""
        record = {"fault": fault, "kind": kind, "pid": os.getpid(), "message": message, **more}
        os.write(self._faults, json.dumps(record).encode() + b"\n")


def faults(folder: Path) -> list[dict[str, Any]]:
    """Return the faults recorded in a directory, without the incomplete line of a writer that was killed."""
    found = []
    for line in (folder / "faults").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
