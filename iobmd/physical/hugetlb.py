"""Blocks from the hugetlb pools (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd import host, procfs
from iobmd.errors import BusyError
from iobmd.memory.shmem import NAME
from iobmd.physical.shmem_pages import FileBlocks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from subprocess import Popen

    from iobmd.host import HugePool
    from iobmd.physical.thp import Each, Places

_MFD_HUGE_SHIFT = 26
_PATIENCE = 10.0  # seconds to wait for a process that holds the lock while the kernel collects and clears pages
_PAUSE = 0.02


class PoolBlocks(FileBlocks):
    """Huge pages of one pool, in a memfd.

    With `reserve` the pool is enlarged by the missing pages, and reset as soon as they are in use, also if this
    process is killed. They are then surplus pages, which the kernel frees when they are unmapped.
    """

    immovable = True  # except by memory hot-remove

    def __init__(self, pool: HugePool, *, reserve: bool, name: str = NAME) -> None:
        super().__init__(pool.size, name)
        self._pool = pool
        self._reserve = reserve

    def create(self) -> int:
        """Return a new empty file."""
        kind = os.MFD_HUGETLB | self.block.bit_length() - 1 << _MFD_HUGE_SHIFT
        return os.memfd_create(f"{self.name}-{self.block >> 20}M", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | kind)

    def more(self, count: int, alignment: int, each: Each | None = None) -> Places:
        """Allocate up to `count` pages of the pool; empty if it has none."""
        with self._raised(count) as available:
            return super().more(min(count, available), alignment, each)

    @contextlib.contextmanager
    def _raised(self, count: int) -> Iterator[int]:
        """Make `count` pages available if permitted; yield how many are."""
        if not self._reserve:
            yield self._available()
            return
        directory = Path(self._pool.directory)
        setting = directory / "nr_hugepages"
        with setting.open() as one_at_a_time:  # across threads and processes: none may undo another's setting
            _lock(one_at_a_time.fileno(), setting)
            before = _persistent(directory)
            missing = max(0, count - self._available())
            helper = _restorer(one_at_a_time.fileno(), setting, before) if missing else None
            if not helper or not helper.stdin:  # not root: only the existing pages
                yield self._available()
                return
            with helper:
                try:
                    with contextlib.suppress(OSError):
                        setting.write_text(str(before + missing))
                    yield self._available()
                finally:
                    with contextlib.suppress(OSError):  # by this process too: the helper may have been killed
                        setting.write_text(str(before))
                    helper.stdin.close()

    def _available(self) -> int:
        return next((pool.available for pool in host.hugetlb_pools() if pool.size == self.block), 0)


_RESTORER = """
import select, sys, os
parent = os.getppid()
print(flush=True)
while not select.select([0], [], [], 0.2)[0] and os.getppid() == parent:
    pass
open(sys.argv[1], "w").write(sys.argv[2])
"""
"""Restores a setting when its standard input ends, or its parent has exited."""


def _restorer(lock: int, setting: Path, before: int) -> Popen[bytes] | None:
    """Start a process that restores a setting when its input ends, or when this process has exited for any reason.

    It is in a separate session, so that no signal to the group of this process reaches it, and holds the lock until
    the setting is restored. None if this process may not change the setting, or can start no process.
    """
    import subprocess  # noqa: PLC0415 (not needed to allocate other memory)

    if not os.access(setting, os.W_OK):
        return None
    command = [sys.executable, "-I", "-S", "-c", _RESTORER, str(setting), str(before)]
    pipe = subprocess.PIPE
    try:
        helper = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True, pass_fds=[lock])
    except OSError:
        return None
    if helper.stdout and helper.stdout.read(1):  # it has started
        return helper
    helper.communicate()
    return None


def _lock(opened: int, setting: Path) -> None:
    """Lock a setting, with a limited wait because every user may lock it. Raises `kIOReturnBusy`."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _locked(opened, setting) from None
            time.sleep(_PAUSE)
        else:
            return


def _locked(opened: int, setting: Path) -> BusyError:
    status = os.fstat(opened)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    holders = []
    with contextlib.suppress(OSError):
        for line in procfs.locks().splitlines():
            fields = line.split()
            if fields[1:2] == ["FLOCK"] and fields[5:6] == [place]:
                holders.append(f"process {fields[4]}")
    who = " and ".join(holders) or "another process"
    message = (
        f"{who} has locked {setting} for {_PATIENCE:.0f} s: the pool cannot be enlarged; end that process, or "
        "omit reserve=True"
    )
    return BusyError(message)


def _persistent(directory: Path) -> int:
    """Return the configured size of a pool, without surplus pages.

    Another process may free a surplus page after the first counter is read: then that page would count as configured,
    and the pool would keep it when it is reset.
    """
    while True:
        total, surplus, again = (
            int((directory / name).read_text()) for name in ("nr_hugepages", "surplus_hugepages", "nr_hugepages")
        )
        if again == total:
            return total - surplus
