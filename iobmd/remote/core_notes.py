"""Notes of an ELF core file: the registers of each thread, and the process (core(5), linux/elfcore.h)."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from iobmd import procfs
from iobmd._internal import pidns
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from iobmd.task.task import Task

    Registers = tuple[int, int, list[tuple[int, bytes]]]
    """A thread: its id, its blocked signals, and its register sets, each with the type of its note."""

_PRSTATUS, _FPREGSET, _PRPSINFO, _AUXV = 1, 2, 3, 6
_SIGINFO, _FILE = 0x53494749, 0x46494C45
_TIMES = (11, 12, 13, 14)
"""The processor times in stat, after the name, in clock ticks."""


class ProcessState(NamedTuple):
    """What a core file records of a process, as /proc shows it."""

    name: str
    fields: list[str]
    """Those of /proc/PID/stat after the name."""
    uid: int
    gid: int
    pending: int
    """Signals that wait for any thread."""

    @classmethod
    def of(cls, task: Task) -> Self | None:
        """Return the state of a process; None if it has exited."""
        try:
            status = procfs.status(task.pid)
            fields = procfs.stat(task.pid)
            uid, gid = (int(status[key].split()[0]) for key in ("Uid", "Gid"))
            return cls(status["Name"], fields, uid, gid, int(status["ShdPnd"], 16))
        except (OSError, KeyError):
            return None

    def number(self, index: int) -> int:
        """Return a field of stat, limited to 64 bits."""
        return int(self.fields[index]) & (1 << 64) - 1


UNKNOWN = ProcessState("", ["R", *["0"] * 50], 0, 0, 0)


def notes(
    task: Task,
    holder: int,
    state: ProcessState,
    threads: Sequence[Registers],
    files: Iterable[procfs.VMA],
) -> bytes:
    """Return the contents of the segment of notes.

    Parameters
    ----------
    task : Task
        The process.
    holder : int
        A process with the same memory, whose /proc files describe it.
    state : ProcessState
        The state of the process.
    threads : sequence
        The registers of the threads. Debuggers show the first one first: it is the main thread, if that exists.
    files : iterable of VMA
        The areas that map files.
    """
    ordered = sorted(threads, key=lambda thread: thread[0] != task.pid)
    found: list[bytes] = []
    for index, (tid, blocked, sets) in enumerate(ordered):
        (_, general), *others = sets
        found.append(_note(_PRSTATUS, _status(tid, blocked, general, state)))
        if not index:
            folder = Path(pidns.directory(holder))
            found += [
                _note(_PRPSINFO, _process(task.pid, state, (folder / "cmdline").read_bytes())),
                _note(_SIGINFO, bytes(128)),
                _note(_AUXV, (folder / "auxv").read_bytes()),
                _note(_FILE, _files(files)),
            ]
        # The owner of notes that only some processors have is the kernel (fs/binfmt_elf.c).
        found += [_note(kind, data, b"CORE\0" if kind == _FPREGSET else b"LINUX\0") for kind, data in others]
    return b"".join(found)


def _note(kind: int, data: bytes, owner: bytes = b"CORE\0") -> bytes:
    """Return a note; names and contents are padded to multiples of four bytes."""
    return struct.pack("=III", len(owner), len(data), kind) + _padded(owner) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _status(tid: int, blocked: int, general: bytes, state: ProcessState) -> bytes:
    """Return a `struct elf_prstatus`. No signal is reported: the thread was stopped, and continued."""
    parent, group, session = (state.number(index) & 0xFFFFFFFF for index in (1, 2, 3))
    header = struct.pack("=iiihxxQQIIII", 0, 0, 0, 0, state.pending, blocked, tid, parent, group, session)
    return header + b"".join(_times(state)) + general + struct.pack("=ixxxx", 1)


def _times(state: ProcessState) -> Iterator[bytes]:
    ticks = os.sysconf("SC_CLK_TCK")
    for index in _TIMES:
        seconds, rest = divmod(state.number(index), ticks)
        yield struct.pack("=QQ", seconds, rest * 1_000_000 // ticks)


def _process(pid: int, state: ProcessState, command: bytes) -> bytes:
    """Return a `struct elf_prpsinfo`."""
    letter = state.fields[0].encode()[:1]
    number = max(0, "RSDTZW".find(state.fields[0]))
    parent, group, session = (state.number(index) & 0xFFFFFFFF for index in (1, 2, 3))
    nice = int(state.fields[16])
    return struct.pack(
        "=bcbb4xQIIIIII16s80s",
        number, letter, state.fields[0] == "Z", nice, state.number(6), state.uid, state.gid, pid, parent, group,
        session, os.fsencode(state.name)[:15], command.rstrip(b"\0").replace(b"\0", b" ")[:79],
    )  # fmt: skip


def _files(areas: Iterable[procfs.VMA]) -> bytes:
    """Return the table of mapped files: the addresses and offsets, then the names."""
    table = list(areas)
    ranges = b"".join(struct.pack("=QQQ", area.start, area.end, area.offset // PAGE_SIZE) for area in table)
    names = b"".join(os.fsencode(area.name) + b"\0" for area in table)
    return struct.pack("=QQ", len(table), PAGE_SIZE) + ranges + names
