"""Touching memory that may be unmapped, in a child that may be killed by that."""

import ctypes
import os
import signal


def faults(address: int, *, write: bool = False) -> bool:
    """Return whether touching an address kills a process by SIGSEGV."""
    if not (pid := os.fork()):
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        byte = ctypes.c_char.from_address(address)
        if write:
            byte.value = b"x"
        os._exit(len(byte.value) - 1)
    return os.waitpid(pid, 0)[1] & 0x7F == signal.SIGSEGV
