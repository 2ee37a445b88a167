"""A million locks, which any user can acquire, do not stall the search for leases."""

import fcntl
import os
from pathlib import Path

import pytest

from iobmd import procfs
from iobmd.units import PAGE_SIZE


def bytes_read() -> int:
    return int(Path("/proc/thread-self/io").read_text().partition("rchar:")[2].split()[0])


def test_no_more_locks_are_read_than_a_few_thousand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more locks, a file counts as leased and is not opened: listing all locks takes quadratic time."""
    area = next(area for area in procfs.maps() if area.inode and area.name.startswith("/"))
    assert not procfs.is_leased(area)
    most = PAGE_SIZE
    with (tmp_path / "locked").open("wb") as file:
        for place in range(0, 2 * 4 * most // 40, 2):  # a line has at least 40 bytes, and half of the lines are read
            fcntl.lockf(file, fcntl.LOCK_EX, 1, place)
        assert not procfs.is_leased(area)
        before = bytes_read()
        assert len(Path("/proc/locks").read_bytes()) > 2 * most, "the control"
        all_of_them = bytes_read() - before
        monkeypatch.setattr(procfs, "_LOCKS", most)
        before = bytes_read()
        assert procfs.is_leased(area)
        assert bytes_read() - before < min(all_of_them, most + 2 * os.sysconf("SC_PAGESIZE"))
