"""Helpers of the tests of `iobmd.host`: denials for this process, settings of the host, and remedies."""

import ctypes
import os
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path

from support.child import NOBODY

libc = ctypes.CDLL(None, use_errno=True)


def check(result):
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def become_nobody(*, dumpable=True):
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # A change of user makes a process undumpable, so that its files in /proc belong to root.
    check(libc.prctl(4, int(dumpable), 0, 0, 0))


def effective_capabilities():
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.capget(header, data))
    return data[0] | data[3] << 32


def private_mounts(*hidden):
    """Mount an empty file system over the directories `hidden`, for this process only."""
    check(libc.unshare(0x00020000))
    check(libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))
    for directory in hidden:
        check(libc.mount(b"none", directory.encode(), b"tmpfs", 0, b"mode=0755"))


@contextmanager
def setting(path, value):
    text = path.read_text()
    before = text.partition("[")[2].partition("]")[0] or text.strip()
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


def run_remedy(fact):
    """Execute the first line of a remedy, as if it were pasted into a root shell."""
    subprocess.run(["sh", "-ec", fact.remedy.splitlines()[0]], check=True, capture_output=True)


def by_name(found):
    return {fact.name: fact for fact in found}


def status_field(name):
    return re.search(rf"^{name}:\s+(.*)$", Path("/proc/self/status").read_text(), re.MULTILINE)[1]
