"""Limits on mapping and locking memory: errors name the limit, its value, its usage and the remedy."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import kernel
from support.child import NOBODY, in_child
from support.errors import refusal

import iobmd
from iobmd import IOReturn
from iobmd._native import mman
from iobmd.host import limits
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    pass

MIB = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p


KINDS: dict[str, dict[str, object]] = {
    "wired": {"size": 4 * MIB},
    "pageable": {"size": 4 * MIB, "wired": False},
    "contiguous": {"size": 4 * MIB, "contiguous": True},
    "shared": {"size": 4 * MIB, "shared": True},
    "shared and contiguous": {"size": 4 * MIB, "shared": True, "contiguous": True},
    "masked": {"size": 4 * MIB, "physical_mask": (1 << 48) - 1},
    "in a task": {"size": 4 * MIB, "task": 0},
}


def allocate(kind: str) -> object:
    keywords = {**KINDS[kind], **({"task": os.getppid()} if "task" in kind else {})}
    return iobmd.allocate(**keywords)  # type: ignore[arg-type]


@pytest.mark.needs("memlock")
@pytest.mark.parametrize("kind", ["new", "copied", "shared"])
def test_memory_that_is_wired_if_possible(kind: str) -> None:
    def allocated() -> tuple[str, int, bytes]:
        if kind == "copied":
            source = iobmd.allocate(MIB, wired=False)
            buffer = iobmd.copy(iobmd.current_task(), source.getBytesNoCopy(), MIB, wired="try")
        else:
            buffer = iobmd.allocate(MIB, wired="try", shared=kind == "shared")
        buffer.writeBytes(0, b"works")
        return buffer.wiring.value, kernel.smaps(buffer.getBytesNoCopy())["Locked"], buffer.readBytes(0, 5)

    assert in_child(allocated, uid=NOBODY, memlock=MIB // 2) == ("pageable", 0, b"works")
    wiring, locked, contents = in_child(allocated, uid=NOBODY, memlock=4 * MIB)
    assert (wiring in ("pinned", "resident"), locked, contents) == (True, MIB, b"works")


@pytest.mark.parametrize("kind", [{"contiguous": True}, {"physical_mask": 0xFFFFFFFF}, {"alignment": 1 << 13}])
def test_memory_that_cannot_be_wired_optionally(kind: dict[str, object]) -> None:
    arguments: dict[str, object] = {"size": MIB, "wired": "try", **kind}
    code, message = refusal(lambda: iobmd.allocate(**arguments))  # type: ignore[arg-type]
    assert code == IOReturn.kIOReturnBadArgument
    assert "'try'" in message


@pytest.mark.needs("frames", "memlock")
@pytest.mark.parametrize("kind", KINDS)
def test_no_mapping_is_left(kind: str) -> None:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if most > 1 << 20:
        pytest.skip("vm.max_map_count is too large to be reached")

    def allocate_at_the_limit() -> tuple[IOReturn, str]:
        iobmd.allocate(PAGE_SIZE).free()
        iobmd.trim()
        while True:  # adjacent areas that differ are not merged
            for protection in (1, 3):
                found = libc.mmap(None, mmap.PAGESIZE, protection, 0x22, -1, 0)
                if found == ctypes.c_void_p(-1).value:
                    return refusal(lambda: allocate(kind))

    code, message = in_child(allocate_at_the_limit)
    assert code is IOReturn.kIOReturnNoMemory
    assert f"vm.max_map_count is {most}" in message
    assert "sysctl vm.max_map_count=" in message


@pytest.mark.needs("frames", "memlock")
def test_contiguous_memory_that_cannot_become_inheritable(monkeypatch: pytest.MonkeyPatch) -> None:
    """At vm.max_map_count a merged area cannot be split again: nothing remains mapped or locked."""
    real = mman.advise

    def advise(address: int, size: int, advice: int) -> None:
        if advice == mman.MADV_DOFORK:
            raise OSError(errno.ENOMEM, "madvise: Cannot allocate memory")
        real(address, size, advice)

    iobmd.allocate(1 << 16, contiguous=True).free()
    before = kernel.status("VmLck"), kernel.status("VmPin")
    monkeypatch.setattr(mman, "advise", advise)
    code, message = refusal(lambda: iobmd.allocate(1 << 16, contiguous=True))
    assert code is IOReturn.kIOReturnNoMemory
    assert "MADV_DOFORK" in message
    assert (kernel.status("VmLck"), kernel.status("VmPin")) == before


@pytest.mark.needs("frames", "memlock")
@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
@pytest.mark.parametrize("kind", ["wired", "pageable", "contiguous", "masked"])
def test_limits_of_address_space(kind: str, name: str) -> None:
    def allocate_at_the_limit() -> tuple[IOReturn, str]:
        iobmd.allocate(PAGE_SIZE).free()
        used = kernel.status({"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[name])
        resource.setrlimit(getattr(resource, name), (used + 3 * MIB, used + 3 * MIB))
        return refusal(lambda: allocate(kind))

    code, message = in_child(allocate_at_the_limit)
    assert code is IOReturn.kIOReturnNoMemory
    assert f"{name} is " in message
    assert "prlimit --" in message


def test_the_commit_limit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses invented figures, because the setting applies to the whole host."""
    monkeypatch.setattr(limits, "read_int", {"/proc/sys/vm/overcommit_memory": 2}.get)
    figures = {"CommitLimit": 100 * MIB, "Committed_AS": 90 * MIB}
    monkeypatch.setattr(limits.procfs, "meminfo", lambda: figures)
    assert limits.met_by_mapping(5 * MIB) is None
    met = limits.met_by_mapping(20 * MIB)
    assert met
    assert "vm.overcommit_memory" in str(met)
    assert str(100 * MIB) in str(met)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS], ids=["EPERM", "ENOSYS"])
def test_mlock_that_a_filter_denies(number: int) -> None:
    """With systemd's SystemCallFilter=~@memlock, the error names the filter instead of the limit."""

    def allocate_filtered() -> tuple[IOReturn, str]:
        return refusal(lambda: iobmd.allocate(PAGE_SIZE))

    code, message = in_child(allocate_filtered, uid=NOBODY - 6, memlock=8 * MIB, deny={"mlock": number})
    assert code is IOReturn.kIOReturnCannotWire
    assert "seccomp" in message
    assert "@memlock" in message
    assert "RLIMIT_MEMLOCK" not in message
