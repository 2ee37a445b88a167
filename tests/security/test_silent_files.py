"""A file of a target, on a file system whose server (FUSE) is the target's own and does not answer."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.fuse import FILE_SYSTEM

from iobmd import IOReturn, procfs
from iobmd.task import obstacles

MIB = 1 << 20
PATIENCE = 20  # seconds

VICTIM = (
    FILE_SYSTEM
    + """
import sys
device = mount(sys.argv[1])
server = os.fork()
if not server:
    LIBC.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG
    serve(device)
os.close(device)
fd = os.open(sys.argv[1] + "/file", os.O_RDONLY)
LIBC.mmap.restype = ctypes.c_void_p
at = LIBC.mmap(None, ctypes.c_size_t(2 * SIZE), 1, 1, fd, 0)
ctypes.string_at(at, 1)
os.close(fd)
print(server, at, flush=True)
sys.stdin.readline()
"""
)


class Silent(NamedTuple):
    """A target that maps a file of 1 MiB, twice as far as it goes, at `at`."""

    pid: int
    at: int


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Silent]:
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        server, at = map(int, process.stdout.readline().split())
        os.kill(server, signal.SIGSTOP)
        try:
            yield Silent(process.pid, at)
        finally:
            os.kill(server, signal.SIGKILL)


def within_patience(action: Callable[[], object]) -> object:
    """Return the result of a function, which is called by a thread that may be left waiting."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert results, "it waits"
    return results[0]


@pytest.mark.needs("root")
def test_an_explanation_asks_no_server(target: Silent) -> None:
    """The length of the file is what the kernel knows of it: stat(2) would ask the server, and wait."""
    found = within_patience(lambda: obstacles.find(target.pid, target.at, target.at + 2 * MIB))
    assert isinstance(found, obstacles.Obstacle)
    assert (found.address, found.code) == (target.at + MIB, IOReturn.kIOReturnVMError)
    assert f"past the end of its file, of {MIB} bytes" in found.why


@pytest.mark.needs("root")
def test_a_path_that_leads_to_the_server_is_given_up(target: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right to use map_files the path is looked up, which its directory's server has to answer."""
    area = next(procfs.areas(target.pid, target.at, target.at + 1))
    other = area._replace(start=area.start + 4096)  # map_files has no such entry
    begin = time.monotonic()
    monkeypatch.setattr(procfs, "areas", lambda *_args: iter([other]))
    assert within_patience(lambda: obstacles.find(target.pid, other.start, other.start + 4096)) is None
    assert time.monotonic() - begin < PATIENCE
