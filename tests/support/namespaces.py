"""Running a part of a test in separate namespaces, with another /proc or none."""

import ctypes
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Self

from support.child import PR_SET_PDEATHSIG, in_child

CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
SYS_EXIT = {"x86_64": 60, "aarch64": 93}[os.uname().machine]  # of a thread
MS_REC, MS_PRIVATE, MNT_DETACH = 1 << 14, 1 << 18, 2
WITH_OWN_SHM = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs shm /dev/shm && exec "$@"', "sh"]
"""Begins a command, as root, whose files in /dev/shm end with it: MPICH leaves those of ranks that were killed."""
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount_proc(options: str = "") -> None:
    """Mount the /proc of this process's pid namespace over the existing one."""
    check(libc.mount(b"proc", b"/proc", b"proc", 0, options.encode()))


def unmount_proc() -> None:
    """Unmount each /proc that is mounted over another."""
    while Path("/proc/self").exists():
        check(libc.umount2(b"/proc", MNT_DETACH))


def in_namespaces(
    function: Callable[[], Any],
    *,
    proc: Callable[[], object] = lambda: None,
    first: int | None = None,
    **restrict: Any,
) -> Any:
    """Return the result of `function` in a separate mount and pid namespace.

    `proc` is called there as root and may mount file systems; `first` is the pid of the process that calls
    `function`, by default 1. `restrict` contains keyword arguments of `in_child`.
    """

    def outer() -> Any:
        check(libc.unshare(CLONE_NEWNS | CLONE_NEWPID))
        check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
        return in_child(init)

    def init() -> Any:
        # The pid is set through the existing /proc, which may belong to any namespace.
        if first is None:
            proc()
            return in_child(function, **restrict) if restrict else function()
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(first - 1))
        return in_child(lambda: (proc(), function())[1], **restrict)

    return in_child(outer)


class SleepingChild:
    """A sleeping forked child with `data` in a separate page, optionally without its main thread.

    Attributes
    ----------
    pid, address, entry
        The child, the address of `data` in it, and the pagemap entry of that page as read by the child itself.
    large
        The address of 8 MiB of "y".
    """

    def __init__(self, data: bytes, *, without_main_thread: bool = False) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._page[0] = 1
        self._large = mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._large[:] = b"y" * len(self._large)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self.large = ctypes.addressof(ctypes.c_char.from_buffer(self._large))
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._run(data, writing, without_main_thread)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            (self.entry,) = struct.unpack("=Q", pipe.read())

    def _run(self, data: bytes, writing: int, without_main_thread: bool) -> NoReturn:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        self._page[: len(data)] = data
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            entry = os.pread(pagemap.fileno(), 8, self.address // mmap.PAGESIZE * 8)

        def rest() -> None:
            if without_main_thread:
                while Path("/proc/self/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    time.sleep(0.001)
            os.write(writing, entry)
            os.close(writing)
            time.sleep(600)
            os._exit(1)

        if without_main_thread:
            threading.Thread(target=rest).start()
            libc.syscall(SYS_EXIT, 0)
        rest()
        os._exit(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
