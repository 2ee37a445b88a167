"""The context of an event: a random source, readers of the kernel's files, targets, and results."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from iobmd.constants import IOPurgeable, IOReturn
from iobmd.errors import IOReturnError

from . import kernel
from .board import PATTERN, SCRATCH_SLICE, TARGETS, Target, Thread, pattern
from .report import CODES, CONTROLS, REASONS
from .targets import lock_path

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import iobmd

    from .board import Board
    from .profiles import Profile


_REASONS = tuple(REASONS)
_PATTERNS = 8  # size of memory that a worker retains; some workers have little memory


class Found(Exception):  # noqa: N818 (a finding, which ends the event)
    """An event found a fault: its name in the report, and a sentence."""

    def __init__(self, fault: str, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class Skipped(Exception):  # noqa: N818
    """The event has nothing to work on, and does not count."""


@contextlib.contextmanager
def insist(release: Callable[[], object]) -> Iterator[None]:
    """Release an object at the end of the block, repeatedly while another thread has the last file descriptor."""
    try:
        yield
    finally:
        deadline = time.monotonic() + 10
        while True:
            try:
                release()
                break
            except IOReturnError as error:
                if error.code != IOReturn.kIOReturnNoResources or time.monotonic() > deadline:
                    raise
            time.sleep(0.001)


@dataclass(frozen=True)
class Peer:
    """A target in use."""

    pid: int
    generation: int
    words: memoryview
    expected: bytes
    scratch: int
    """Address of this thread's slice of its scratch memory."""

    @property
    def was_killed(self) -> bool:
        """Whether the supervisor has killed it."""
        return self.words[Target.KILLED] >= self.generation

    @property
    def has_ended(self) -> bool:
        """Whether it has exited, for whatever reason."""
        return self.was_killed or kernel.state(self.pid) in ("", "Z", "X")

    def __getitem__(self, word: Target) -> int:
        number: int = self.words[word]
        return number


class Held(NamedTuple):
    """Pinned memory that is held for many events, and its recorded properties."""

    buffer: iobmd.IOMemoryDescriptor
    address: int
    size: int
    frames: tuple[int, ...]
    content: bytes
    """The last 4096 bytes."""
    is_existing: bool
    """Whether it is prepared existing memory instead of a buffer."""


class Purges:
    """The purges of all volatile memory of the process by its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = self._ended = 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Count a purge, which lasts as long as the block."""
        with self._lock:
            self._begun += 1
        try:
            yield
        finally:
            with self._lock:
                self._ended += 1

    def ended(self) -> int:
        """Return the number of those that have ended, for `none_since`."""
        return self._ended

    def none_since(self, ended: int) -> bool:
        """Return whether none has been running since `ended` returned this number."""
        return self._begun == ended


class Shared:
    """The data that the threads of a worker share."""

    def __init__(self, folder: Path, board: Board, profile: Profile, patience: float) -> None:
        self.folder, self.board, self.profile, self.patience = folder, board, profile, patience
        self.pagemap = kernel.Pagemap()
        self.shows_frames = kernel.shows_frames()
        self.purges = Purges()
        self._patterns: dict[int, bytes] = {}

    def pattern(self, seed: int) -> bytes:
        """Return the pattern of a seed."""
        if seed not in self._patterns:
            if len(self._patterns) >= _PATTERNS:
                self._patterns.clear()
            self._patterns[seed] = pattern(seed, PATTERN)
        return self._patterns[seed]


class Context:
    """The data of one thread of a worker.

    Parameters
    ----------
    shared : Shared
        The data that the worker's threads share.
    number : int
        The thread's number on the board.
    chance : random.Random
        The source of all its choices.
    """

    def __init__(self, shared: Shared, number: int, chance: random.Random) -> None:
        self.shared, self.number, self.chance = shared, number, chance
        self.board, self.profile, self.pagemap = shared.board, shared.profile, shared.pagemap
        self._reclaimed, self._waited = kernel.reclaimed(), kernel.waited()
        self.row = shared.board.thread(number)
        self.held: deque[Held] = deque()
        self.control: tuple[int, tuple[int, ...]] | None = None
        """Memory that is only locked: its address, and the frames of its pages."""
        self.peer: Peer | None = None
        """The target in use, or the last one."""
        self._locks = [os.open(lock_path(shared.folder, place), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                       for place in range(TARGETS)]  # fmt: skip

    def host_reclaims(self) -> bool:
        """Return whether the host has reclaimed memory since this thread's last call, possibly volatile memory.

        Each thread compares for itself: several may lose memory to the same reclaim.
        """
        before, self._reclaimed = self._reclaimed, kernel.reclaimed()
        return before != self._reclaimed

    def host_waits(self) -> bool:
        """Return whether tasks waited for memory since this thread's last call, so that iobmd may have purged."""
        before, self._waited = self._waited, kernel.waited()
        return before != self._waited

    def count(self, control: str, number: int = 1) -> None:
        """Add to a number in the report's `control`."""
        self.row[Thread.FIRST_CONTROL + CONTROLS.index(control)] += number

    def refused(self, reason: str, code: IOReturn) -> None:
        """Count an expected refusal."""
        self.row[Thread.FIRST_REFUSAL + _REASONS.index(reason) * len(CODES) + CODES.index(code)] += 1

    @contextlib.contextmanager
    def target(self, word: Target = Target.PID) -> Iterator[Peer]:
        """Use a target that has the memory `word` inside a `with` block; it is not inspected during that time.

        Raises
        ------
        Skipped
            No such target is available now.
        """
        self.peer = None
        places = self._open_places(word)
        if not places or not self.profile.targets:
            raise Skipped
        place = self.chance.choice(places)
        fcntl.flock(self._locks[place], fcntl.LOCK_SH)
        try:
            words = self.board.target(place)
            generation = words[Target.GENERATION]
            if words[Target.CLOSED] or words[Target.KILLED] >= generation:
                raise Skipped
            expected = self.shared.pattern(words[Target.SEED])
            scratch = words[Target.SCRATCH] + self.number * SCRATCH_SLICE
            self.peer = Peer(words[Target.PID], generation, words, expected, scratch)
            yield self.peer
        finally:
            fcntl.flock(self._locks[place], fcntl.LOCK_UN)

    def _open_places(self, word: Target) -> Sequence[int]:
        found = []
        for place in range(TARGETS):
            words = self.board.target(place)
            if words[Target.GENERATION] and not words[Target.CLOSED] and words[word]:
                found.append(place)
        return found

    def pinned_frames(self, address: int, size: int) -> tuple[int, ...]:
        """Return the frames of pinned memory, all of them.

        A pin holds the frame, not the entry of the page table: reclaim and compaction unmap shared pages before they
        detect that they are pinned (shrink_folio_list() and migrate_folio_unmap() in the kernel), and restore them or
        leave that to the next access. Entries that are not present are therefore read again after an access.
        """
        frames = self.pagemap.frames(address, size)
        deadline = time.monotonic() + 2
        while 0 in frames and self.shared.shows_frames and time.monotonic() < deadline:
            kernel.read_memory(os.getpid(), address, size)
            frames = self.pagemap.frames(address, size)
        return frames

    # --- checks

    def check_bytes(self, actual: bytes, expected: bytes, what: str) -> None:
        """Raise `Found` unless the bytes are equal."""
        if actual == expected:
            return
        length = min(len(actual), len(expected))
        first = next((at for at in range(length) if actual[at] != expected[at]), length)
        there = f"{actual[first : first + 16].hex()} instead of {expected[first : first + 16].hex()}"
        killed = ", the target was killed during the comparison" if self.peer and self.peer.was_killed else ""
        raise Found("wrong_bytes", f"{what}: {len(actual)} of {len(expected)} bytes, at {first:#x} {there}{killed}")

    def check_frames(self, address: int, before: tuple[int, ...], what: str) -> None:
        """Raise `Found` unless each page of pinned memory has the frame that it had."""
        after = self.pinned_frames(address, len(before) * kernel.PAGE)
        if after == before:
            return
        moved = sum(old != new for old, new in zip(before, after, strict=True))
        raise Found("frames_moved", f"{what}: {moved} of {len(before)} pages of pinned memory moved")

    def check_state(self, state: int, content: bytes, expected: bytes, lost: int) -> None:
        """Raise `Found` unless memory that was volatile, and is now `state`, has the contents of this state.

        `lost` is the number of its pages that the kernel had reclaimed.
        """
        if state == IOPurgeable.kIOMemoryPurgeableVolatile:
            if lost:
                raise Found("wrong_purge_states", f"Volatile (intact) was returned, but {lost} pages were reclaimed")
            self.check_bytes(content, expected, "memory that was volatile")
        elif state == IOPurgeable.kIOMemoryPurgeableEmpty:
            if content.count(0) != len(content):
                raise Found("wrong_purge_states", "Empty was returned, but not all bytes are zero")
        else:
            raise Found("wrong_purge_states", f"state {state} was returned for volatile memory")

    def drain(self) -> None:
        """Free all memory that is held."""
        while self.held:
            release(self.held.pop())
        if self.control is not None:
            address, frames = self.control
            kernel.unmap(address, len(frames) * kernel.PAGE)
            self.control = None


def release(held: Held) -> None:
    """Free memory that is held; existing memory that was prepared is also unmapped."""
    if held.is_existing:
        held.buffer.complete()
    held.buffer.free()
    if held.is_existing:
        kernel.unmap(held.address, held.size)
