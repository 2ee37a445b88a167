"""Parsers of /proc (proc(5)) for processes and the host; sizes are in bytes."""

import errno
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TextIO

from iobmd._internal import pidns
from iobmd._internal.pidns import directory
from iobmd._native import maps as native
from iobmd.errors import BusyError
from iobmd.printable import printable

HUGE = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Private_Hugetlb", "Shared_Hugetlb")
"""Counters of smaps for memory that is mapped by huge pages in the page tables: by a PMD, or as hugetlb pages."""

PF_EXITING = 0x00000004
PF_KTHREAD = 0x00200000
"""A flag of kernel threads (linux/sched.h)."""

_FIELD = r"(\w+(?:\(\w+\))?):\s+(\d+) kB"
_ESCAPE = r"\\([0-7]{3})"


Read = Callable[[int, int], bytes]
"""Reads at most a number of bytes from a descriptor, as os.read."""


class VMA(NamedTuple):
    """One virtual memory area: a line of /proc/PID/maps. Addresses and `offset` are in bytes."""

    start: int
    """The first address."""
    end: int
    """The end address."""
    perms: str
    """The permissions, as in ``rw-p``."""
    offset: int
    """The offset in the file."""
    inode: int
    """The inode of the file; 0 for anonymous memory."""
    name: str
    """The path of the file, or a name such as ``[heap]``; empty for anonymous memory."""
    device: str = ""
    """The device of the file's file system, as "major:minor" in hexadecimal."""

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x} {self.perms} {printable(self.name) or '[anon]'}"


_BATCH = 64
"""Areas queried at a time: 64 calls take about as long as generating and reading one chunk of text."""

USER_END = 1 << 56
"""The end of user addresses: no 64-bit architecture has more (x86-64 with five levels of page tables has these).

Above it, x86-64 maps [vsyscall], which only the text of maps shows, and aarch64 ignores the top byte, a tag: pagemap
would report the pages at the address without it.
"""


_LAST = (1 << 64) - 1


def _parse(text: bytes, low: int = 0, high: int = _LAST) -> Iterable[VMA]:
    areas = map(VMA._make, native.parse(text, low, min(high, _LAST)))
    return map(_unescaped, areas) if b"\\" in text else areas


def _unescaped(area: VMA) -> VMA:
    # The newline is the only line separator that the kernel escapes.
    return area._replace(name=re.sub(_ESCAPE, lambda match: chr(int(match[1], 8)), area.name))


_FEW = 256
"""Areas that are read before the areas of the task are counted; most tasks have fewer."""
_MANY = 1 << 20
"""Maximum number of areas that are counted."""


class _Limit:
    """A limit on the number of areas read, so that a task cannot make the reading endless.

    /proc/PID/maps is generated while it is read, in ascending order of addresses. If a task keeps moving its areas to
    higher addresses, the end is never reached. Therefore, after the first few areas, all areas are counted at once,
    which takes a microsecond each and is faster than they can be moved, and at most twice that number is read; a task
    that merely grows while it is read has fewer.
    """

    def __init__(self, pid: int | str) -> None:
        self._pid = pid
        self._seen = 0
        self._most = _FEW
        self._counted = False

    def add(self, areas: int) -> None:
        """Count areas that were read; raise `kIOReturnBusy` if there are too many."""
        self._seen += areas
        if self._seen > self._most and not self._counted:
            self._counted = True
            self._most += 2 * self._count()
        if self._seen > self._most:
            message = (
                f"process {self._pid} keeps moving its memory: {self._seen} areas were found, but it had only "
                f"{(self._most - _FEW) // 2} shortly before. Stop it while it is read (kill -STOP)"
            )
            raise BusyError(message, errno.EBUSY)

    def _count(self) -> int:
        count = 0
        with open(memory_file(self._pid, "maps"), "rb", buffering=0) as file:
            while count < _MANY and (text := file.read(1 << 16)):
                count += text.count(b"\n")
        return count


def maps(pid: int | str = "self") -> Iterator[VMA]:
    """Iterate over /proc/PID/maps, ascending by address. Raises as `areas`."""
    for text in maps_text(pid):
        yield from _parse(text)


def maps_text(pid: int | str = "self") -> Iterator[bytes]:
    """Iterate over the text of /proc/PID/maps, in chunks of whole lines. Raises as `areas`."""
    with open(memory_file(pid, "maps"), "rb", buffering=0) as file:
        yield from _whole_lines(file.fileno(), _Limit(pid))


def _whole_lines(fd: int, limit: _Limit, read: Read = os.read) -> Iterator[bytes]:
    rest = b""
    while text := read(fd, 1 << 16):
        limit.add(text.count(b"\n"))
        whole, newline, rest = (rest + text).rpartition(b"\n")
        yield whole + newline


def areas(pid: int | str, start: int, end: int, read: Read | None = None) -> Iterator[VMA]:
    """Iterate over the areas of a process that overlap the addresses `start`…`end`, ascending.

    Parameters
    ----------
    pid : int or str
        The process; "self" for this one.
    start, end : int
        In bytes. Areas that overlap the range partly are returned whole.
    read : callable, optional
        Reads the text of maps, with a time limit; used instead of the queries (see the notes).

    Raises
    ------
    OSError
        `ENOENT`, `ESRCH`: the process, or its memory, no longer exists (also for a kernel thread); `EACCES`: access
        is denied; `EMFILE`, `ENFILE`.
    IOReturnError
        `kIOReturnBusy`: more than twice as many areas were found as the process has, because it keeps moving them.

    Notes
    -----
    Uses one ioctl(PROCMAP_QUERY) per area (fs/proc/task_mmu.c, Linux 6.11), whatever else the process maps; older
    kernels read /proc/PID/maps up to `end`. Areas that change concurrently are seen before or after the change.
    """
    path = f"{directory(pid)}/maps"
    limit = _Limit(pid)
    try:
        yield from _areas(path, start, end, limit, read)
    except ProcessLookupError:
        # The main thread may have exited before others. Checking that first would take longer than everything else.
        other = memory_file(pid, "maps")
        if other == path:
            raise
        yield from _areas(other, start, end, limit, read)


def _areas(path: str, start: int, end: int, limit: _Limit, read: Read | None) -> Iterator[VMA]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while start < end <= USER_END and read is None:
            found = _queried(fd, start, end)
            if found is None:
                break
            limit.add(len(found))
            yield from map(VMA._make, found)
            if len(found) < _BATCH:
                return
            start = found[-1][1]
        if start < end:
            yield from _searched(fd, start, end, limit, read or os.read)
    finally:
        os.close(fd)


def _queried(fd: int, start: int, end: int) -> list[tuple[int, int, str, int, int, str, str]] | None:
    """Return up to `_BATCH` areas; None if the kernel does not support the query. Raises ProcessLookupError."""
    try:
        return native.query(fd, start, end, _BATCH)
    except ProcessLookupError:
        raise
    except OSError:  # ENOTTY before Linux 6.11, EPERM behind a seccomp filter, ENAMETOOLONG
        return None


def _searched(fd: int, start: int, end: int, limit: _Limit, read: Read) -> Iterator[VMA]:
    """Read maps from its beginning to the first area at `end` or above."""
    text = b""
    for text in _whole_lines(fd, limit, read):
        yield from _parse(text, start, end)
        last = text[text.rfind(b"\n", 0, -1) + 1 :]
        if int(last.partition(b"-")[0] or b"0", 16) >= end:
            return
    if not text:  # every process has an area
        raise ProcessLookupError(errno.ESRCH, "the memory no longer exists")


def _lines(path: str) -> TextIO:
    encoding = sys.getfilesystemencoding()
    return open(path, encoding=encoding, errors="surrogateescape", newline="\n")


class Details(NamedTuple):
    """The data of an area in /proc/PID/smaps."""

    area: VMA
    """The area that they describe."""
    counters: dict[str, int]
    """Counters by name, in bytes; numbers without a unit (THPeligible, ProtectionKey) as they are."""
    flags: frozenset[str]
    """The kernel's flags of the area, two letters each (VmFlags)."""


def details(pid: int | str = "self", read: Read | None = None) -> Iterator[Details]:
    """Iterate over /proc/PID/smaps, ascending by address. The kernel walks all pages of each area.

    `read` is used instead of os.read. Raises as `areas`, and as `read`.
    """
    read = read or os.read
    rest = b""
    limit = _Limit(pid)
    with open(memory_file(pid, "smaps"), "rb", buffering=0) as file:
        while text := read(file.fileno(), 1 << 16):
            # The flags are the last line of an area; names contain no newline.
            before, flags, behind = (rest + text).rpartition(b"\nVmFlags:")
            line, newline, behind = behind.partition(b"\n")
            if not (flags and newline):
                rest += text
                continue
            rest = behind
            parsed = native.parse_details(before + flags + line + newline)
            limit.add(len(parsed))
            for found, counters, words in parsed:
                area = VMA._make(found)
                yield Details(_unescaped(area) if "\\" in area.name else area, counters, words)


def smaps(pid: int | str = "self") -> Iterator[tuple[VMA, dict[str, int]]]:
    """Iterate over /proc/PID/smaps: each area with its counters, in bytes."""
    return ((found.area, found.counters) for found in details(pid))


def vm_flags(pid: int | str = "self", read: Read | None = None) -> Iterator[tuple[VMA, frozenset[str]]]:
    """Iterate over /proc/PID/smaps: each area with the kernel's flags of it, two letters each (VmFlags)."""
    return ((found.area, found.flags) for found in details(pid, read))


def find_vma(pid: int | str, address: int) -> VMA | None:
    """Return the area that contains `address`, or None. Raises as `areas`."""
    return next(areas(pid, address, address + 1), None)


def is_leased(area: VMA) -> bool:
    """Return whether a process holds a write lease, or a delegation, on the file that an area maps.

    Opening the file in any mode would break the lease: the kernel requests its holder to release it (F_SETLEASE in
    fcntl(2)). /proc/locks shows holders in the pid namespace of /proc. If it has more than `_LOCKS` bytes, every file
    counts as leased. Raises OSError.
    """
    text = locks()
    if len(text) > _LOCKS:
        return True
    file = f" {area.device}:{area.inode} "
    lines = [line.split() for line in text.splitlines() if file in line]
    return any({"LEASE", "DELEG"} & set(words) and "WRITE" in words for words in lines)


def locks() -> str:
    """Return /proc/locks (proc_locks(5)), or a little more than its first `_LOCKS` bytes. Raises OSError."""
    text = bytearray()
    with open("/proc/locks", "rb", buffering=0) as file:
        while len(text) <= _LOCKS and (more := file.read(1 << 16)):
            text += more
    return text.decode(errors="replace")


_LOCKS = 512 << 10
"""Bytes of /proc/locks that are read, about 9,000 locks.

Users may hold any number of locks, and for each page that is read the kernel starts at the first lock: 20,000 locks
take 0.07 s, 100,000 take 0.8 s (measured), a million more than a minute.
"""


class Mount(NamedTuple):
    """A mount, from a line of /proc/PID/mountinfo."""

    device: tuple[int, int]
    """The major and minor number of its file system."""
    kind: str
    """The type of its file system."""


def mounts(pid: int | str = "self") -> Iterator[Mount]:
    """Iterate over the mounts that a process sees (proc_pid_mountinfo(5)). Raises OSError.

    Users choose the names of mount points. Of the characters that Python treats as the end of a line or a field, the
    kernel escapes only newline, space and tab.
    """
    with _lines(memory_file(pid, "mountinfo")) as lines:
        for line in lines:
            before, _, system = line.partition(" - ")
            major, minor = before.split(" ", 3)[2].split(":")
            yield Mount((int(major), int(minor)), system.partition(" ")[0])


def uncovered(areas: Iterable[VMA], address: int, end: int, permission: str) -> int:
    """Return the first address of `address`…`end` that no area with `permission` covers; `end` if there is none."""
    for area in areas:
        if area.end <= address:
            continue
        if area.start > address or permission not in area.perms or address >= end:
            break
        address = area.end
    return min(address, end)


def status(pid: int | str = "self", thread: int | None = None) -> dict[str, str]:
    """Return the status fields of a process, or of one of its threads (by its id in /proc), as text."""
    of_thread = "" if thread is None else f"/task/{thread}"
    return _status(f"{directory(pid)}{of_thread}")


def _status(folder: str) -> dict[str, str]:
    with _lines(f"{folder}/status") as lines:
        return {key: value.strip("\n\t ") for key, _, value in (line.partition(":") for line in lines)}


def waits(pid: int) -> bool:
    """Return whether the main thread of a process is in an uninterruptible sleep; False if /proc does not show it."""
    try:
        with open(f"{directory(pid)}/status", "rb", buffering=0) as file:
            return b"\nState:\tD" in file.read()
    except OSError:
        return False


def status_bytes(field: str, pid: int | str = "self") -> int:
    """Return a memory size from /proc/PID/status, in bytes."""
    with open(memory_file(pid, "status"), "rb", buffering=0) as file:
        found = file.read().partition(b"\n%b:" % field.encode())[2]
    if not found:
        raise KeyError(field)
    return int(found.split(maxsplit=1)[0]) << 10


def stat(pid: int | str = "self") -> list[str]:
    """Return the fields of /proc/PID/stat after the name: the first is field 3 of proc_pid_stat(5)."""
    return _stat(directory(pid))


def _stat(folder: str) -> list[str]:
    # The program's name is in parentheses, and may contain any characters.
    with _lines(f"{folder}/stat") as lines:
        return lines.read().rpartition(")")[2].split()


def flags(pid: int | str = "self") -> int:
    """Return the kernel's flags of a task (PF_…)."""
    return _flags(directory(pid))


def _flags(folder: str) -> int:
    return int(_stat(folder)[6])


def memory_file(pid: int | str, name: str) -> str:
    """Return the path of a file of /proc about the memory of a process, such as "pagemap". Raises as `directory`."""
    if pid in ("self", os.getpid()):
        return f"/proc/thread-self/{name}"  # has memory even if the main thread has exited
    folder = directory(pid)
    thread = _thread_with_memory(folder)
    return f"{folder}/task/{thread}/{name}" if thread else f"{folder}/{name}"


def memory_id(pid: int) -> int:
    """Return the id with which system calls find the memory of a process.

    This is its pid, or the id of one of its threads if the main thread has exited. Raises as `directory`.
    """
    if pid == os.getpid():
        return threading.get_native_id()  # the check below takes longer than opening a file
    folder = directory(pid)
    thread = _thread_with_memory(folder)
    if thread and pidns.is_foreign():
        thread = pidns.number_here(f"{folder}/task/{thread}")
    return thread or pid


def has_thread(pid: int, tid: int) -> bool:
    """Return whether a process currently has a thread, by their ids in this pid namespace."""
    try:
        os.stat(f"{directory(pid)}/task/{directory(tid).rpartition('/')[2]}")
    except OSError:
        return False
    return True


def _thread_with_memory(folder: str) -> int:
    """Return the id in /proc of a thread that has memory if the main thread has exited; otherwise 0."""
    if not _flags(folder) & PF_EXITING:
        return 0
    main = int(folder.rpartition("/")[2])
    threads = map(int, os.listdir(f"{folder}/task"))
    return next((tid for tid in threads if tid != main and _has_memory(f"{folder}/task/{tid}")), 0)


def _has_memory(folder: str) -> bool:
    try:
        return "VmSize" in _status(folder)
    except OSError:  # it is gone
        return False


def page_faults(pid: int | str = "self") -> int:
    """Return the number of page faults of all threads of a process (minflt and majflt)."""
    fields = stat(pid)
    return int(fields[7]) + int(fields[9])


def start_time(pid: int | str = "self") -> int:
    """Return the start time of a process in clock ticks since boot; pid and start time identify a process."""
    return int(stat(pid)[19])


def meminfo() -> dict[str, int]:
    """Return the sizes of /proc/meminfo, in bytes."""
    with open("/proc/meminfo") as lines:
        return {field[1]: int(field[2]) << 10 for field in re.finditer(_FIELD, lines.read())}
