"""Which instructions on cache lines a piece of a test executes: a forked child is stepped through it (x86-64)."""

import ctypes
import gc
import os
import signal
from collections import Counter
from collections.abc import Callable

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.restype = ctypes.c_long
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_TRACEME, _PEEKTEXT, _PEEKUSER, _SINGLESTEP, _SETOPTIONS, _GETEVENTMSG = 0, 1, 3, 9, 0x4200, 0x4201
_O_TRACEVFORK, _EVENT_VFORK = 4, 2
_WALL = 0x40000000  # waitpid(2): children of any kind
_RIP = 16 * 8  # in struct user


def _kind(code: bytes) -> str | None:
    """The name of the instruction that begins with these bytes (Intel SDM volume 2), None for all others."""
    rest, wide = (code[1:], True) if code[0] == 0x66 else (code, False)
    if 0x40 <= rest[0] <= 0x4F:  # REX
        rest = rest[1:]
    if rest[:2] == b"\x0f\xe7" and wide:
        return "movntdq"
    if rest[:2] != b"\x0f\xae":
        return None
    operation, register = rest[2] >> 3 & 7, rest[2] >> 6 == 3
    if register:
        return {6: "mfence", 7: "sfence"}.get(operation) if not wide else None
    return {(7, False): "clflush", (7, True): "clflushopt", (6, True): "clwb"}.get((operation, wide))


def _kind_at(pid: int, address: int) -> str | None:
    word = _LIBC.ptrace(_PEEKTEXT, pid, address, None) & (1 << 64) - 1
    return _kind(word.to_bytes(8, "little"))


def _step(pid: int, seen: Counter[str], kinds: dict[int, str | None]) -> int:
    """Execute an instruction, or all of a child that waits for nothing else; returns the wait status."""
    address = _LIBC.ptrace(_PEEKUSER, pid, _RIP, None)
    if address not in kinds:
        kinds[address] = _kind_at(pid, address)
    if kind := kinds[address]:
        seen[kind] += 1
    assert _LIBC.ptrace(_SINGLESTEP, pid, None, None) == 0
    _, status = os.waitpid(pid, _WALL)
    if status >> 8 == signal.SIGTRAP | _EVENT_VFORK << 8:
        child = ctypes.c_ulong()
        assert _LIBC.ptrace(_GETEVENTMSG, pid, None, ctypes.addressof(child)) == 0
        _, stopped = os.waitpid(child.value, _WALL)
        while os.WIFSTOPPED(stopped):
            stopped = _step(child.value, seen, kinds)
    return status


def cache_instructions(action: Callable[[], object]) -> Counter[str]:
    """Count those that `action` executes, by name, also in a process that shares its memory and that it waits for."""
    pid = os.fork()
    if not pid:
        try:
            gc.disable()  # each step costs some microseconds, and a collection is millions
            _LIBC.ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            action()
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(0)
    seen: Counter[str] = Counter()
    kinds: dict[int, str | None] = {}  # the code at an address stays
    try:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        assert _LIBC.ptrace(_SETOPTIONS, pid, None, _O_TRACEVFORK) == 0
        while True:
            status = _step(pid, seen, kinds)
            assert os.WIFSTOPPED(status), f"the child ended with {status:#x}"
            if os.WSTOPSIG(status) != signal.SIGTRAP:
                assert os.WSTOPSIG(status) == signal.SIGSTOP
                return seen
    finally:
        os.kill(pid, signal.SIGKILL)
        if os.WIFSTOPPED(status):
            os.waitpid(pid, 0)
