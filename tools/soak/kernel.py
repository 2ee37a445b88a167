"""What the kernel reports about processes and their pages, read without the use of `iobmd`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import struct
from pathlib import Path
from typing import NamedTuple

PAGE = os.sysconf("SC_PAGESIZE")
FRAME = (1 << 55) - 1
"""The bits of a pagemap entry that hold the page frame number (proc_pid_pagemap(5))."""
MADV_FREE, MADV_NOHUGEPAGE, MADV_HUGEPAGE, MADV_PAGEOUT, MADV_POPULATE_WRITE, MADV_COLLAPSE = 8, 15, 14, 21, 23, 25
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_PTRACER = 1, 4, 0x59616D61
_CAP_IPC_LOCK = 1 << 14

_libc = ctypes.CDLL(None, use_errno=True)


class _Vector(ctypes.Structure):
    """A struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


class Pagemap:
    """A process's /proc/PID/pagemap, opened once.

    The kernel decides at open(2) whether it shows frames: a file opened before a process drops its capabilities
    continues to show them.
    """

    def __init__(self, pid: int | str = "self") -> None:
        self.fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def entries(self, address: int, size: int) -> tuple[int, ...]:
        """Return the raw entry of each page of a range."""
        first, last = address // PAGE, (address + size - 1) // PAGE
        raw = os.pread(self.fd, (last - first + 1) * 8, first * 8)
        return struct.unpack(f"={len(raw) // 8}Q", raw)

    def frames(self, address: int, size: int) -> tuple[int, ...]:
        """Return the page frame number of each page, 0 for pages that are not present or whose frame is hidden."""
        return tuple(entry & FRAME if entry >> 63 else 0 for entry in self.entries(address, size))

    def absent(self, address: int, size: int) -> int:
        """Return how many pages of a range do not exist.

        A page that is neither present nor absent is in swap, or being migrated: compaction replaces up to 32 entries
        at once by migration entries, which appear as swapped, and restores them shortly afterwards.
        """
        return sum(not entry >> 62 for entry in self.entries(address, size))

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


def shows_frames() -> bool:
    """Return whether this process sees page frame numbers."""
    pagemap = Pagemap()
    try:
        probe = ctypes.create_string_buffer(b"x" * PAGE)
        return bool(pagemap.frames(ctypes.addressof(probe), 1)[0])
    finally:
        pagemap.close()


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Return bytes of a process (process_vm_readv(2)); fewer than `size` at an address that cannot be read."""
    data = ctypes.create_string_buffer(size)
    here, there = _Vector(ctypes.addressof(data), size), _Vector(address, size)
    done = _libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return data.raw[: max(done, 0)]


def map_private(size: int, *, readable: bool = True) -> int:
    """Map private anonymous memory and return its address."""
    _libc.mmap.restype = ctypes.c_void_p
    protection, flags = (3 if readable else 0), 0x22  # PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
    address = _libc.mmap(None, ctypes.c_size_t(size), protection, flags, -1, ctypes.c_long(0))
    if address in (None, ctypes.c_void_p(-1).value):
        if ctypes.get_errno() == errno.ENOMEM:  # a worker may have a limit (RLIMIT_AS)
            raise MemoryError(f"mmap of {size} bytes")
        _check(-1, "mmap")
    return int(address)


def unmap(address: int, size: int) -> None:
    """Unmap a range."""
    _check(_libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)), "munmap")


def lock(address: int, size: int) -> None:
    """Lock a range (mlock(2))."""
    _check(_libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)), "mlock")


def advise(address: int, size: int, advice: int) -> None:
    """Advise the kernel about a range (madvise(2))."""
    _check(_libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice), "madvise")


def resident(address: int, size: int) -> int:
    """Return how many pages of a range are resident (mincore(2))."""
    pages = -(-size // PAGE)
    vector = ctypes.create_string_buffer(pages)
    _check(_libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector), "mincore")
    return sum(byte & 1 for byte in vector.raw)


def userfaultfd() -> int:
    """Return a new descriptor of userfaultfd(2)."""
    number = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
    return _check(_libc.syscall(number, os.O_CLOEXEC), "userfaultfd")


def die_with_parent(parent: int) -> None:
    """Kill this process when the thread that started it exits (PR_SET_PDEATHSIG), or now if it has exited."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os._exit(1)


def allow_any_tracer() -> None:
    """Permit every process of this user to trace this one under Yama (ptrace_scope 1); no effect without Yama."""
    _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1 & (1 << 64) - 1), 0, 0, 0)


def has_capabilities(*numbers: int) -> bool:
    """Return whether this process has all these capabilities (capabilities(7), linux/capability.h)."""
    effective = int(status()["CapEff"], 16)
    return all(effective >> number & 1 for number in numbers)


def become(user: int) -> None:
    """Change to another user and drop every capability, as a login would; the process remains dumpable."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")


def drop_locking() -> None:
    """Drop CAP_IPC_LOCK, so that RLIMIT_MEMLOCK applies (capset(2))."""
    header = ctypes.create_string_buffer(struct.pack("=II", 0x20080522, 0))
    sets = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, sets), "capget")
    effective, permitted, *rest = struct.unpack("=6I", sets.raw)
    kept = struct.pack("=6I", effective & ~_CAP_IPC_LOCK, permitted & ~_CAP_IPC_LOCK, *rest)
    _check(_libc.capset(header, kept), "capset")


def status(pid: int | str = "self") -> dict[str, str]:
    """Return the fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def kibibytes(fields: dict[str, str], name: str) -> int:
    """Return a field of `status` that is in kB, 0 if the kernel does not have it."""
    return int(fields.get(name, "0").split()[0])


def descriptors(pid: int | str = "self") -> tuple[str, ...]:
    """Return the sorted "NUMBER TARGET" of each open file descriptor, without that of this call itself."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if not re.fullmatch(r"/proc/\d+/fd", target):
                found.append(f"{entry.name} {target}")
    return tuple(sorted(found))


class Mapping(NamedTuple):
    """A line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    name: str

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.end - self.start


def mappings(pid: int | str = "self") -> list[Mapping]:
    """Return the mappings of a process."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, permissions, *_, name = [*line.split(maxsplit=5), ""][:6]
        start, _, end = addresses.partition("-")
        found.append(Mapping(int(start, 16), int(end, 16), permissions, name))
    return found


def smaps(address: int, pid: int | str = "self") -> dict[str, int]:
    """Return the counters in kB of the mapping that holds `address`; empty if there is none."""
    inside = False
    counters: dict[str, int] = {}
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                if inside:
                    break
                inside = int(head[1], 16) <= address < int(head[2], 16)
            elif inside and (field := re.match(r"(\w+):\s+(\d+) kB", line)):
                counters[field[1]] = int(field[2])
    return counters


def threads(pid: int | str = "self") -> list[int]:
    """Return the ids of a process's threads."""
    return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]


def children(pid: int | str = "self") -> list[int]:
    """Return the pids of a process's children, including zombies."""
    found: list[int] = []
    for thread in threads(pid):
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def state(pid: int, thread: int | None = None) -> str:
    """Return the state letter of a process or thread (proc_pid_stat(5)), "" if it has exited and been reaped."""
    try:
        text = Path(f"/proc/{pid}/task/{thread or pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


def reclaimed() -> int:
    """Return how many pages the kernel has scanned for reclaim on this host, excluding reclaim of cgroups."""
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return sum(int(counters.get(f"pgscan_{by}", 0)) for by in ("kswapd", "direct", "khugepaged", "proactive"))


def waited() -> int:
    """Return for how many microseconds tasks of this host have waited for memory, 0 without PSI."""
    try:
        return int(Path("/proc/pressure/memory").read_text().partition("total=")[2].split()[0])
    except OSError:
        return 0
