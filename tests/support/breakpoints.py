"""The cache line instructions of iobmd's native code that a part of a test executes (x86-64).

A forked child has a breakpoint on each of them. Single-stepping all that Python executes would take seconds.
"""

import ctypes
import functools
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from support.targets import need_program

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.restype = ctypes.c_long
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_TRACEME, _PEEKTEXT, _PEEKUSER, _POKETEXT, _POKEUSER, _CONT, _SINGLESTEP = 0, 1, 3, 4, 6, 7, 9
_SETOPTIONS, _GETEVENTMSG, _O_TRACEVFORK, _EVENT_VFORK = 0x4200, 0x4201, 4, 2
_WALL = 0x40000000  # waitpid(2): children of any kind
_RIP = 16 * 8  # in struct user
_BREAK = 0xCC  # int3
_LISTED = re.compile(r"^ *([0-9a-f]+):\s+(clflush|clflushopt|clwb|mfence|sfence|movntdq)\b", re.MULTILINE)
_MAPPED = re.compile(r"^([0-9a-f]+)-\S+ \S+ 0+ \S+ \S+ +(/\S*/iobmd/_native/\S+\.so)$", re.MULTILINE)


@functools.cache
def _listed(library: str) -> dict[int, str]:
    """Return the instructions of a library by their addresses in it."""
    command = [need_program("objdump"), "-d", "--no-show-raw-insn", library]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {int(address, 16): name for address, name in _LISTED.findall(text)}


def _instructions() -> dict[int, str]:
    """Return the instructions of iobmd's native code by their addresses in this process."""
    mapped = _MAPPED.findall(Path("/proc/self/maps").read_text())
    return {int(base, 16) + at: name for base, library in mapped for at, name in _listed(library).items()}


def _ptrace(request: int, pid: int, address: int | None = None, data: int | None = None) -> int:
    ctypes.set_errno(0)
    result: int = _LIBC.ptrace(request, pid, address, data)
    assert result != -1 or not ctypes.get_errno(), os.strerror(ctypes.get_errno())
    return result & (1 << 64) - 1


class _Child:
    """A traced child, its breakpoints, and how often each kind was reached."""

    def __init__(self, instructions: dict[int, str]) -> None:
        self._instructions = instructions
        self._words: dict[int, int] = {}
        self.seen: Counter[str] = Counter()

    def set_all(self, pid: int) -> None:
        for address in self._instructions:
            self._words[address] = _ptrace(_PEEKTEXT, pid, address)
        for address in self._instructions:
            self._set(pid, address)

    def _set(self, pid: int, address: int) -> None:
        # Read again, because another breakpoint may be in the same word.
        _ptrace(_POKETEXT, pid, address, _ptrace(_PEEKTEXT, pid, address) & ~0xFF | _BREAK)

    def run(self, pid: int) -> int:
        """Run a process, and children for which it waits, until it exits or gets a signal; return that status."""
        while True:
            _ptrace(_CONT, pid)
            _, status = os.waitpid(pid, _WALL)
            if status >> 8 == signal.SIGTRAP | _EVENT_VFORK << 8:
                child = ctypes.c_ulong()
                _ptrace(_GETEVENTMSG, pid, None, ctypes.addressof(child))
                _, stopped = os.waitpid(child.value, _WALL)
                while os.WIFSTOPPED(stopped):
                    stopped = self.run(child.value)
            elif not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
                return status
            else:
                self._pass(pid, _ptrace(_PEEKUSER, pid, _RIP) - 1)

    def _pass(self, pid: int, address: int) -> None:
        """Execute the instruction of a breakpoint that was reached."""
        self.seen[self._instructions[address]] += 1
        word = _ptrace(_PEEKTEXT, pid, address)
        _ptrace(_POKETEXT, pid, address, word & ~0xFF | self._words[address] & 0xFF)
        _ptrace(_POKEUSER, pid, _RIP, address)
        _ptrace(_SINGLESTEP, pid)
        os.waitpid(pid, _WALL)
        self._set(pid, address)


def cache_instructions(action: Callable[[], object]) -> Counter[str]:
    """Count the instructions that `action` executes, by name, including those of a child that shares its memory."""
    child = _Child(_instructions())
    assert child._instructions, "no library of iobmd contains any"
    pid = os.fork()
    if not pid:
        try:
            _LIBC.ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            action()
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(0)
    try:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        _ptrace(_SETOPTIONS, pid, None, _O_TRACEVFORK)
        child.set_all(pid)
        status = child.run(pid)
        assert os.WIFSTOPPED(status), f"the child ended with {status:#x}"
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        return child.seen
    finally:
        os.kill(pid, signal.SIGKILL)
        if os.WIFSTOPPED(status):
            os.waitpid(pid, 0)
