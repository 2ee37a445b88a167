"""`iobmd share` and `iobmd copy --freeze`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.child import sleeping

import iobmd
from iobmd.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def target() -> Iterator[subprocess.Popen[bytes]]:
    with sleeping() as program:
        yield program


def mapped(pid: int) -> bool:
    return "memfd:iobmd" in Path(f"/proc/{pid}/maps").read_text()


def test_for_a_time(target: subprocess.Popen[bytes], capsys: Captured) -> None:
    assert main(["share", str(target.pid), "64k", "--hold", "0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["pid"], found["size"]) == (1, target.pid, 65536)
    assert found["wiring"] == "pinned"
    assert found["stopped_us"] > 0
    if found["segments"]:
        assert sum(segment["length"] for segment in found["segments"]) == 65536
    else:
        assert "CAP_SYS_ADMIN" in found["hidden"]
    assert not mapped(target.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_until_interrupted(target: subprocess.Popen[bytes], number: int) -> None:
    command = [sys.executable, "-m", "iobmd", "share", str(target.pid), "8k", "--pageable"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shares:
        assert shares.stdout
        line = shares.stdout.readline()
        assert f"of process {target.pid}" in line
        assert "pageable" in line
        there, here = (int(word, 16) for word in line.replace(",", "").split() if word.startswith("0x"))
        iobmd.Task(target.pid).write(there, b"hello")
        assert iobmd.Task(shares.pid).read(here, 5) == b"hello"
        time.sleep(0.2)
        assert shares.poll() is None
        shares.send_signal(number)
        assert shares.wait(10) == 0
    assert not mapped(target.pid)
    assert target.poll() is None


def test_until_the_process_exits(target: subprocess.Popen[bytes], capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "iobmd", "share", str(target.pid), "8k", "--pageable"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shares:
        assert shares.stdout
        shares.stdout.readline()
        target.kill()
        target.wait()
        assert shares.wait(10) == 0
    assert f"process {target.pid} has exited" in capfd.readouterr().err


def test_read_only_at_an_address(target: subprocess.Popen[bytes], capsys: Captured) -> None:
    address = 0x7000_0000_0000
    arguments = ["share", str(target.pid), "4k", "--pageable", "--read-only", "--hold", "0"]
    assert main([*arguments, "--at", hex(address)]) == 0
    assert f"at {address:#x}" in capsys.readouterr().out
    code = Path(f"/proc/{target.pid}/maps").read_text().split("-")[0]
    assert main([*arguments, "--at", f"0x{code}"]) == 1
    assert "is not free" in capsys.readouterr().err


@pytest.mark.needs("frames")
def test_contiguous(target: subprocess.Popen[bytes], capsys: Captured) -> None:
    assert main(["share", str(target.pid), "4M", "--contiguous", "--hold", "0"]) == 0
    assert "+ 4 MiB, all of it" in capsys.readouterr().out


def test_refused(capsys: Captured) -> None:
    assert main(["share", str(os.getpid()), "4k", "--hold", "0", "--pageable"]) == 0, "memory of this process again"
    for wrong in ([], ["1"], ["x", "4k"], ["1", "0"], ["1", "4k", "--at", "1"]):
        assert main(["share", *wrong]) == 2
    capsys.readouterr()
    assert main(["share", "999999999", "4k"]) == 1
    assert "no process has the pid" in capsys.readouterr().err


def test_copy_of_one_moment(target: subprocess.Popen[bytes], capsys: Captured) -> None:
    assert main(["copy", str(target.pid), "[stack]", "--freeze", "--pageable"]) == 0
    assert "the process was stopped for" in capsys.readouterr().out
    assert main(["copy", str(target.pid), "[stack]", "--freeze", "--pageable", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source_stopped_ms"] > 0
