"""Maps: the same pages at additional addresses, in this process and in targets, and other pages after a redirect."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import iobmd
from iobmd import IOMapOptions, Task

from .. import kernel
from ..context import Found, insist

if TYPE_CHECKING:
    from ..context import Context

_ANYWHERE, _UNIQUE = int(IOMapOptions.kIOMapAnywhere), int(IOMapOptions.kIOMapUnique)
_READ_ONLY = int(IOMapOptions.kIOMapReadOnly)
_LASTING = 10.0  # seconds for which no event of another worker leaves its memory mapped


def here(context: Context) -> None:
    """Map shared memory at a second address in this process: both addresses have the same frames."""
    size = context.chance.choice((1, 3, 16)) * kernel.PAGE
    with iobmd.allocate(size, shared=True) as buffer, buffer.map(_UNIQUE) as mapped:
        content = context.chance.randbytes(size)
        buffer.writeBytes(0, content)
        context.check_bytes(bytes(mapped), content, "a map of shared memory")
        _check_same_frames(context, buffer.getBytesNoCopy(), context.pagemap, mapped.getAddress(), size)


def _check_same_frames(context: Context, address: int, other: kernel.Pagemap, there: int, size: int) -> None:
    mine = context.pagemap.frames(address, size)
    theirs = other.frames(there, size)
    if any(one and another and one != another for one, another in zip(mine, theirs, strict=True)):
        raise Found("wrong_addresses", "two maps of the same memory have different frames")


def read_only(context: Context) -> None:
    """Map a part read-only: the kernel refuses writes there, and writes at other addresses are visible."""
    with (
        iobmd.allocate(3 * kernel.PAGE, wired=False, shared=True) as buffer,
        buffer.createMappingInTask(
            iobmd.kernel_task, 0, _ANYWHERE | _UNIQUE | _READ_ONLY, kernel.PAGE, kernel.PAGE
        ) as mapped,
    ):
        content = context.chance.randbytes(kernel.PAGE)
        buffer.writeBytes(kernel.PAGE, content)
        context.check_bytes(bytes(mapped), content, "a read-only map")
        address = mapped.getAddress()
        found = [area for area in kernel.mappings() if area.start <= address < area.end]
        if not found or found[0].permissions[:2] != "r-":
            raise Found("wrong_addresses", f"a read-only map is mapped {found}")


def redirect(context: Context) -> None:
    """Redirect a map to other memory."""
    size = context.chance.choice((1, 4)) * kernel.PAGE
    first, second = context.chance.randbytes(size), context.chance.randbytes(size)
    with (
        iobmd.allocate(size, wired=False, shared=True) as old,
        iobmd.allocate(size, wired=False, shared=True) as new,
        old.map(_UNIQUE) as mapped,
    ):
        old.writeBytes(0, first)
        new.writeBytes(0, second)
        context.check_bytes(bytes(mapped), first, "a map before its redirection")
        mapped.redirect(new)
        context.check_bytes(bytes(mapped), second, "a map after its redirection")
        context.check_bytes(old.readBytes(0, size), first, "memory that was mapped before the redirection")


def in_target(context: Context) -> None:
    """Map shared memory in a target: it has the same pages there, and no mapping remains afterwards."""
    size = context.chance.choice((1, 8)) * kernel.PAGE
    with context.target() as peer, iobmd.allocate(size, shared=True) as buffer:
        task = Task(peer.pid)
        content = context.chance.randbytes(size)
        mapped = buffer.createMappingInTask(task, 0, _ANYWHERE)
        with insist(mapped.unmap):
            buffer.writeBytes(0, content)
            there = mapped.getAddress()
            context.check_bytes(task.read(there, size), content, "a map in a target")
            if not peer.was_killed and (seen := kernel.read_memory(peer.pid, there, size)):
                context.check_bytes(seen, content, "a map in a target, by process_vm_readv")
            task.write(there, content[::-1])
            context.check_bytes(buffer.readBytes(0, size), content[::-1], "memory that a target maps")
        if context.chance.random() < 0.2 and kernel.read_memory(peer.pid, there, 1) and not peer.was_killed:
            _check_gone(peer.pid, there)


def redirect_in_target(context: Context) -> None:
    """Redirect a map in a target to other memory."""
    first, second = context.chance.randbytes(kernel.PAGE), context.chance.randbytes(kernel.PAGE)
    with (
        context.target() as peer,
        iobmd.allocate(kernel.PAGE, wired=False, shared=True) as old,
        iobmd.allocate(kernel.PAGE, wired=False, shared=True) as new,
        contextlib.ExitStack() as stack,
    ):
        mapped = old.createMappingInTask(peer.pid, 0, _ANYWHERE)
        stack.enter_context(insist(mapped.unmap))
        old.writeBytes(0, first)
        new.writeBytes(0, second)
        there = mapped.getAddress()
        for expected in (first, second):
            if (seen := kernel.read_memory(peer.pid, there, kernel.PAGE)) or not peer.has_ended:
                context.check_bytes(seen, expected, "a map in a target, redirected or not")
            if expected is first:
                mapped.redirect(new)


def _check_gone(pid: int, address: int) -> None:
    """Check that nothing remains mapped; another worker may have mapped memory there, but not for long."""
    end = time.monotonic() + _LASTING
    while there := [area for area in kernel.mappings(pid) if area.start <= address < area.end]:
        if "iobmd" in there[0].name:
            return
        if time.monotonic() > end:
            raise Found("programs_disturbed", f"{there[0]} is mapped in a target where iobmd had mapped memory")
        time.sleep(0.01)
