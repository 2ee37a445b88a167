"""An existing system call instruction of a task: to write one would dirty its code, and race with its threads."""

from __future__ import annotations

import errno
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd._native.tracer import INSTRUCTION, INSTRUCTION_ALIGNMENT
from iobmd.errors import NotFoundError, UnsupportedError, VMError
from iobmd.remote.areas import areas
from iobmd.task import diagnosis

if TYPE_CHECKING:
    from iobmd.task.task import Task

_AT_PHENT, _AT_SYSINFO_EHDR = 4, 33  # getauxval(3): the size of a program header, the address of the vDSO
_PHENT_32_BIT = 32  # sizeof(Elf32_Phdr)
_SETTLED = 1.0  # seconds for a task to complete an exec, or to exit
_CODE = 4 << 20  # bytes of each executable area that are searched if there is no vDSO

_offset_in_vdso: int | None = None  # the same in every 64-bit task


def find(task: Task) -> int:
    """Return the address of a system call instruction of a task.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: it has none. `kIOReturnNotFound`: it exits.
    """
    deadline = time.monotonic() + _SETTLED
    while True:
        try:
            if found := _find(task):
                return found
        except NotFoundError:  # the task is executing a program, or exiting
            if not task.alive:
                raise
        if _is_32_bit(task):  # on aarch64, their instruction differs
            raise diagnosis.of_32_bits(task.pid)
        # During an exec a task has no code, and while it exits no memory.
        if not task.alive or (time.monotonic() > deadline and not areas(task)):
            raise diagnosis.without_memory(task.pid)
        if time.monotonic() > deadline:
            message = f"task {task.pid} has no usable system call instruction, not even in its vDSO"
            raise UnsupportedError(message)
        time.sleep(0.001)


def _find(task: Task) -> int:
    base = _vdso(task)
    if base and _offset_in_vdso is not None and is_at(task, base + _offset_in_vdso):
        return base + _offset_in_vdso
    return _search(task, base)


def is_at(task: Task, address: int) -> bool:
    """Return whether the instruction is at an address."""
    try:
        return task.read(address, len(INSTRUCTION)) == INSTRUCTION
    except VMError:
        return False


def _vdso(task: Task) -> int:
    return _auxiliary_vector(task, "=QQ").get(_AT_SYSINFO_EHDR, 0)


def _is_32_bit(task: Task) -> bool:
    return _auxiliary_vector(task, "=II").get(_AT_PHENT) == _PHENT_32_BIT


def _auxiliary_vector(task: Task, entry: str) -> dict[int, int]:
    """Return the values by key, {} if the task is exiting. Keys and values have the size of an address."""
    try:
        raw = Path(procfs.memory_file(task.pid, "auxv")).read_bytes()
    except OSError:
        return {}
    size = struct.calcsize(entry)
    return dict(struct.iter_unpack(entry, raw[: len(raw) // size * size]))


def _search(task: Task, base: int) -> int:
    """Return the address of the first one in the code of a task, or 0."""
    global _offset_in_vdso  # noqa: PLW0603
    try:
        # Only without a vDSO, which always has one, is every area parsed: a millisecond per thousand areas.
        vdso = procfs.find_vma(task.pid, base) if base else None
        code = [vdso] if vdso and vdso.name == "[vdso]" else areas(task)
        code = [area for area in code if "x" in area.perms and "r" in area.perms]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            raise diagnosis.without_memory(task.pid) from None
        raise diagnosis.refused(task.pid, error.errno or 0, "memory map") from None
    for area in code:
        try:
            found = _in(task.read(area.start, min(area.end - area.start, _CODE)))
        except VMError:  # [vsyscall], or the end of a file
            continue
        if found >= 0:
            if area.start == base:
                _offset_in_vdso = found
            return area.start + found
    return 0


def _in(code: bytes) -> int:
    """Return the offset of the first one in code, or -1."""
    found = code.find(INSTRUCTION)
    while found % INSTRUCTION_ALIGNMENT and found >= 0:
        found = code.find(INSTRUCTION, found + 1)
    return found
