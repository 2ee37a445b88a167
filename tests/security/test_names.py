"""Names that other users choose reach a terminal without what would steer it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.child import sleeping

from iobmd import host
from iobmd.cli import main
from iobmd.host import cgroup

ESCAPE = "\x1b[2J"
LINE_ENDS = "\v\x1c\x85\u2028\r"
"""Of which str.splitlines() makes lines, while the kernel prints them as they are."""


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup whose name would clear the screen, and end lines."""
    v1 = Path("/sys/fs/cgroup/memory/cgroup.procs").exists()
    folder = Path("/sys/fs/cgroup/memory" if v1 else "/sys/fs/cgroup") / f"iobmd{ESCAPE}{LINE_ENDS}{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


@pytest.mark.needs("root", "memory_cgroup")
@pytest.mark.parametrize("form", [["--flags"], ["--flags", "--csv"]], ids=" ".join)
def test_cgroups(group: Path, form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\nx = b'x' * (1 << 20)\nprint(flush=True)\ninput()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as target:
        assert target.stdout is not None
        target.stdout.readline()
        assert main(["pagemap", str(target.pid), "--runs", *form]) == 0
        target.kill()
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown, "the control: the cgroup is named"
    assert "\x1b" not in shown


@pytest.mark.needs("root", "memory_cgroup")
def test_groups_whose_names_have_ends_of_lines(group: Path) -> None:
    """/proc/PID/cgroup shows them: they made every check of a limit fail, and so every allocation in the group."""
    with sleeping() as program:
        (group / "cgroup.procs").write_text(str(program.pid))
        assert str(group) in [found.directory for found in cgroup.around("memory", program.pid)]
        (group.parent / "cgroup.procs").write_text(str(program.pid))


def test_doctor_gives_no_user_the_interpreter() -> None:
    """`setcap` on the system's own interpreter makes every user root."""
    commands = [line for line in host.capability_remedy().splitlines() if "setcap" in line]
    real = os.path.realpath(sys.executable)
    for command in commands:
        assert f"+ep {real}" not in command
        assert "-m 0750" in command
