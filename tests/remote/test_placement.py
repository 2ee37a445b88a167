"""Memory that is allocated in another task: at a chosen address, with another protection, and left there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import iobmd
from iobmd.units import PAGE_SIZE

SIZE = 64 << 10
# Returns 42: mov eax, 42; ret, or mov w0, #42; ret
CODE = {"x86_64": "b82a000000c3", "aarch64": "40058052c0035fd6"}
PROGRAM = """
import ctypes, sys
print("ready", flush=True)
for line in sys.stdin:
    verb, address = line.split()
    if verb == "call":
        print(ctypes.CFUNCTYPE(ctypes.c_int)(int(address))(), flush=True)
    else:
        print(ctypes.string_at(int(address), 5).decode(), flush=True)
"""


class Target:
    """A process that calls code, and reads memory, at addresses from its input."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        assert self.process.stdin
        assert self.process.stdout
        self._input, self._output = self.process.stdin, self.process.stdout
        assert self._output.readline() == "ready\n"

    def ask(self, verb: str, address: int) -> str:
        self._input.write(f"{verb} {address}\n")
        self._input.flush()
        return self._output.readline().strip()

    def permissions(self, address: int) -> str:
        """Return the permissions of /proc/PID/maps at an address; "" if nothing is mapped."""
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            if start <= address < end:
                return line.split()[1]
        return ""


@pytest.fixture
def target() -> Iterator[Target]:
    started = Target()
    yield started
    started.process.kill()
    started.process.communicate()


@pytest.mark.parametrize("protection", ["r", "rw", "rx", "rwx"])
@pytest.mark.parametrize("wired", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_protection(target: Target, protection: str, wired: bool, shared: bool) -> None:
    """The protection applies to the task's mapping; this process can write to the memory in any case."""
    with iobmd.allocate(SIZE, task=target.pid, protection=protection, wired=wired, shared=shared) as buffer:
        expected = "".join(letter if letter in protection else "-" for letter in "rwx") + ("s" if shared else "p")
        assert target.permissions(buffer.getBytesNoCopy()) == expected
        buffer.writeBytes(0, b"there")
        assert target.ask("read", buffer.getBytesNoCopy()) == "there"
        if "x" in protection:
            buffer.writeBytes(PAGE_SIZE, bytes.fromhex(CODE[os.uname().machine]))
            assert target.ask("call", buffer.getBytesNoCopy(PAGE_SIZE)) == "42"
        assert target.permissions(buffer.getBytesNoCopy()) == expected
        if buffer.wiring is iobmd.Wiring.PINNED and iobmd.host.pfns_visible():
            buffer.verify()


@pytest.mark.parametrize("protection", ["r", "rx"])
def test_writable_map_of_read_only_memory(target: Target, protection: str) -> None:
    """Its own addresses serve only read-only maps, also of a part; a writable map has other addresses."""
    with iobmd.allocate(SIZE, task=target.pid, protection=protection, wired=False, shared=True) as buffer:
        own = buffer.getBytesNoCopy()
        anywhere, read_only = iobmd.IOMapOptions.kIOMapAnywhere, iobmd.IOMapOptions.kIOMapReadOnly
        buffer.writeBytes(0, b"there")
        with (
            iobmd.IOSubMemoryDescriptor.withSubRange(buffer, 0, SIZE // 2, buffer.getDirection()) as part,
            part.createMappingInTask(target.pid, 0, anywhere) as of_part,
            buffer.createMappingInTask(target.pid, 0, anywhere) as writable,
            buffer.createMappingInTask(target.pid, 0, anywhere | read_only) as reading,
        ):
            assert reading.getAddress() == own
            for mapped in (of_part, writable):
                assert target.permissions(mapped.getAddress()) == "rw-s"
                assert target.ask("read", mapped.getAddress()) == "there"
        assert target.permissions(own) == "".join(letter if letter in protection else "-" for letter in "rwx") + "s"


def test_at_an_address(target: Target) -> None:
    with iobmd.allocate(SIZE, task=target.pid) as buffer:
        free = buffer.getBytesNoCopy()
        with pytest.raises(iobmd.NoResourcesError):
            iobmd.allocate(SIZE, task=target.pid, address=free)
    with iobmd.allocate(SIZE, task=target.pid, address=free) as buffer:
        assert buffer.getBytesNoCopy() == free
        buffer.writeBytes(0, b"fixed")
        assert target.ask("read", free) == "fixed"
    assert target.permissions(free) == ""
    with pytest.raises(iobmd.BadArgumentError, match="this process has reserved"):
        iobmd.allocate(SIZE, task=target.pid, address=free, overwrite=True)


@pytest.mark.parametrize("wired", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_memory_that_is_left_behind(target: Target, wired: bool, shared: bool) -> None:
    """The memory remains when the descriptor is released, and this process no longer refers to it."""
    with iobmd.allocate(SIZE, task=target.pid, protection="rx", wired=wired, shared=shared) as buffer:
        address = buffer.getBytesNoCopy()
        buffer.writeBytes(0, b"stays")
        buffer.leave()
        assert buffer.readBytes(0, 5) == b"stays"  # and is usable until then
    assert target.permissions(address) == ("r-xs" if shared else "r-xp")
    assert target.ask("read", address) == "stays"
    dropped = iobmd.allocate(SIZE, task=target.pid, wired=False)
    address = dropped.getBytesNoCopy()
    dropped.free()
    assert target.permissions(address) == ""


def test_only_another_task_keeps_memory() -> None:
    with iobmd.allocate(PAGE_SIZE) as here, pytest.raises(iobmd.UnsupportedError, match="not in another task"):
        here.leave()
