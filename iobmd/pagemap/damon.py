"""The used regions of a process, as estimated by the kernel's DAMON (Documentation/admin-guide/mm/damon/usage.rst).

DAMON has one configuration in sysfs, which its user replaces as a whole: it is used only if it is empty, and emptied
afterwards. A helper process does this too, as soon as this process has exited for whatever reason.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd.errors import BusyError, IOReturnError, NotPrivilegedError, UnsupportedError
from iobmd.pagemap.file import PagemapFile
from iobmd.pagemap.sampling import Method, Unseen, every_area, resident_part
from iobmd.pagemap.tracker import resident_ranges
from iobmd.task import diagnosis

if TYPE_CHECKING:
    from subprocess import Popen

    from iobmd.pagemap.range import Where
    from iobmd.pagemap.sampling import Chooses, Part

KDAMONDS = Path("/sys/kernel/mm/damon/admin/kdamonds")
_SAMPLES = 20
"""Samples per interval of DAMON, which splits and merges regions by how many of them found an access."""
_READS = 2
"""DAMON's intervals per interval here: results are read at the end of one, for which the kernel waits."""
_FEWEST, _MOST = 100, 1000
"""Numbers of regions; one page of each is checked per sample."""
_LAST = str((1 << 64) - 1)

_HELPER = """
import pathlib, sys
is_ours = sys.stdin.read()
folder = pathlib.Path(sys.argv[1])
for name, text in (("0/state", "off"), ("nr_kdamonds", "0")) if is_ours else ():
    try:
        (folder / name).write_text(text)
    except OSError:
        pass
"""
"""Waits for the end of its standard input, and then removes the configuration, if it has read anything.

Before that, the configuration may be another program's.
"""


class Damon:
    """A sampler (`sampling.Sampler`) of regions that the kernel splits where accesses differ; requires root.

    Parameters
    ----------
    where : Where
        The task, and the range of it.
    interval : float
        Seconds from one sample to the next.
    chooses : callable
        Which areas are reported.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: the kernel lacks DAMON, or its operations on virtual addresses.
        `kIOReturnNotPrivileged`. `kIOReturnBusy`: another program uses it.
    """

    method = Method.DAMON
    resolution: int | None = None

    def __init__(self, where: Where, interval: float, chooses: Chooses = every_area) -> None:
        self._where, self._chooses = where, chooses
        self._helper: Popen[bytes] | None = None
        self._lock = -1
        self._pagemap = PagemapFile(where.task)
        try:
            self._configure(round(interval * 1e6 / _READS))
        except BaseException as error:
            self.close()
            if isinstance(error, IOReturnError) or not isinstance(error, OSError):
                raise
            raise _refused(error) from None

    def _configure(self, interval_us: int) -> None:
        # The lock is only among processes of iobmd.
        self._lock = os.open(KDAMONDS / "nr_kdamonds", os.O_RDWR | os.O_CLOEXEC)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.pread(self._lock, 16, 0).strip() == b"0":
                return self._occupy(interval_us)
        raise _in_use()

    def _occupy(self, interval_us: int) -> None:
        import subprocess  # noqa: PLC0415 (not needed to allocate memory)
        import sys  # noqa: PLC0415

        # In a separate session: no signal to the group of this process reaches it.
        command = [sys.executable, "-I", "-S", "-c", _HELPER, str(KDAMONDS)]
        self._helper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        _write("nr_kdamonds", "1")  # EBUSY if another program has begun in the meantime
        assert self._helper.stdin
        self._helper.stdin.write(b"1")
        self._helper.stdin.flush()
        _write("0/contexts/nr_contexts", "1")
        context = "0/contexts/0"
        if "vaddr" not in (KDAMONDS / context / "avail_operations").read_text().split():
            message = (
                "this kernel's DAMON does not monitor virtual addresses (CONFIG_DAMON_VADDR): use another method"
            )
            raise UnsupportedError(message)
        for name, text in (
            ("operations", "vaddr"),
            ("monitoring_attrs/intervals/sample_us", str(interval_us // _SAMPLES)),
            ("monitoring_attrs/intervals/aggr_us", str(interval_us)),
            ("monitoring_attrs/intervals/update_us", str(interval_us)),
            ("monitoring_attrs/nr_regions/min", str(_FEWEST)),
            ("monitoring_attrs/nr_regions/max", str(_MOST)),
            ("targets/nr_targets", "1"),
            ("targets/0/pid_target", str(self._where.task.pid)),
            ("schemes/nr_schemes", "1"),
            ("schemes/0/action", "stat"),
            *((f"schemes/0/access_pattern/{what}/max", _LAST) for what in ("sz", "nr_accesses", "age")),
        ):
            _write(f"{context}/{name}", text)
        _write("0/state", "on")

    def begin(self) -> None:
        """Begin the first interval; it has begun with the constructor."""

    def sample(self) -> list[tuple[int, int, int]]:
        """Return the resident pages of accessed regions. Raises `kIOReturnNotFound`."""
        task = self._where.task
        try:
            _write("0/state", "update_schemes_tried_regions")  # waits for the end of DAMON's interval
        except OSError as error:
            if task.alive:
                raise _refused(error) from None
        if not task.alive:
            raise diagnosis.without_memory(task.pid)
        used: list[tuple[int, int, int]] = []
        for start, end in self._accessed():
            for vma in filter(self._chooses, self._where.areas()):
                low, high = max(start, vma.start, self._where.start), min(end, vma.end, self._where.end)
                if low < high:
                    ranges = resident_ranges(self._pagemap.fd, low, high)
                    used += [(first, last, last - first) for first, last in ranges]
        return used

    def _accessed(self) -> list[tuple[int, int]]:
        """Return the accessed regions, ascending and joined."""
        found = []
        for region in (KDAMONDS / "0/contexts/0/schemes/0/tried_regions").iterdir():
            if region.name.isdecimal() and int((region / "nr_accesses").read_text()):
                found.append((int((region / "start").read_text()), int((region / "end").read_text())))
        joined: list[tuple[int, int]] = []
        for start, end in sorted(found):
            if joined and start <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((start, end))
        return joined

    def parts(self) -> tuple[list[Part], list[Unseen]]:
        """Return the resident memory. Raises `kIOReturnNotFound`."""
        parts = []
        for vma in filter(self._chooses, self._where.areas()):
            low, high = max(vma.start, self._where.start), min(vma.end, self._where.end)
            parts.append(resident_part(vma, resident_ranges(self._pagemap.fd, low, high)))
        return [part for part in parts if part.resident.used], []

    def close(self) -> None:
        """Remove the configuration."""
        self._pagemap.__exit__()
        helper, self._helper = self._helper, None
        if helper and helper.stdin:
            helper.stdin.close()
            helper.wait()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _write(name: str, text: str) -> None:
    (KDAMONDS / name).write_text(text)


def _in_use() -> BusyError:
    message = (
        "DAMON is in use: /sys/kernel/mm/damon/admin has the configuration of another program. End that session, or "
        "use another method"
    )
    for name in _MODULES:
        enabled = Path(f"/sys/module/{name}/parameters/enabled")
        with contextlib.suppress(OSError):
            if enabled.read_text().strip() == "Y":
                message = (
                    f"DAMON is in use by the kernel ({name}), which permits no other session: disable it while it "
                    f"is not needed (echo N > {enabled}), or use another method"
                )
    return BusyError(message, errno.EBUSY)


_MODULES = ("damon_stat", "damon_reclaim", "damon_lru_sort")
"""Users of DAMON in the kernel. Debian 13's Linux 7.3 enables damon_stat by default."""


def _refused(error: OSError) -> IOReturnError:
    if isinstance(error, PermissionError):
        return NotPrivilegedError("DAMON (/sys/kernel/mm/damon) requires root", error.errno or 0)
    if isinstance(error, FileNotFoundError):
        message = "this kernel lacks DAMON's files (CONFIG_DAMON_SYSFS, Linux 5.18): use another method"
        return UnsupportedError(message, error.errno or 0)
    if error.errno == errno.EBUSY:
        return _in_use()
    return UnsupportedError(f"DAMON cannot monitor the process: {error.strerror}", error.errno or 0)
