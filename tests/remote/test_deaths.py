"""Processes that are killed at any moment: the task that memory is mapped into, and the one that maps it."""

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.child import forked, sleeping
from support.kernel import Footprint

import iobmd
from iobmd import IOMapOptions, IOReturn, IOReturnError

ANYWHERE = IOMapOptions.kIOMapAnywhere
ECHO = "import sys\nfor line in sys.stdin: sys.stdout.write(line); sys.stdout.flush()\n"


@pytest.mark.parametrize("freeze", [False, True], ids=["map", "freeze"])
@pytest.mark.usefixtures("nothing_left")
def test_the_task_is_killed(freeze: bool) -> None:
    """200 times: what is under way raises, and soon; nothing of it is left with us."""
    raised = 0
    with iobmd.allocate(64 << 10, shared=True, wired=False) as buffer:
        before = Footprint.now()
        for number in range(60 if freeze else 200):
            with sleeping() as target:
                stack = next(
                    line for line in Path(f"/proc/{target.pid}/maps").read_text().splitlines() if "[stack]" in line
                )
                address = int(stack.split("-")[0], 16)
                killer = threading.Timer(random.uniform(0, 0.006), os.kill, (target.pid, signal.SIGKILL))
                killer.start()
                begin = time.monotonic()
                try:
                    while time.monotonic() - begin < 5:
                        if freeze:
                            iobmd.copy(target.pid, address, 4096, freeze=True, wired=False).free()
                        elif number % 2:
                            iobmd.allocate(8192, task=target.pid).free()
                        else:
                            buffer.createMappingInTask(target.pid, 0, ANYWHERE).unmap()
                except IOReturnError as error:
                    assert error.code == IOReturn.kIOReturnNotFound, error
                    raised += 1
                killer.join()
                assert target.wait(10) == -signal.SIGKILL
        gc.collect()
        after = Footprint.now()
    assert raised == number + 1
    assert after.descriptors == before.descriptors
    assert "iobmd (deleted)" not in Path("/proc/self/maps").read_text()


def test_we_are_killed() -> None:
    """200 times, while it stops the task over and over: what has been begun is finished by who is left."""
    survived = 0
    target = echo()
    for _ in range(200):

        def use(pid: int = target.pid) -> None:
            iobmd.allocate(8192, task=pid).free()

        with contextlib.suppress(AssertionError), forked(use):
            time.sleep(random.uniform(0.02, 0.04))
        if answers(target):
            survived += 1
        else:
            target.kill()
            target.communicate()
            target = echo()
    assert target.poll() is None
    target.kill()
    target.communicate()
    print(f"\n{survived} of 200 tasks survived that we were killed", file=sys.stderr)
    assert survived >= 198


def echo() -> subprocess.Popen[bytes]:
    target = subprocess.Popen([sys.executable, "-c", ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert answers(target)
    return target


def answers(target: subprocess.Popen[bytes]) -> bool:
    """Say whether a program still does its work."""
    assert target.stdin
    assert target.stdout
    with contextlib.suppress(OSError):
        target.stdin.write(b"hello\n")
        target.stdin.flush()
        import select

        if select.select([target.stdout], [], [], 5)[0]:
            return os.read(target.stdout.fileno(), 100) == b"hello\n"
    return False
