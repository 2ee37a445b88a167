"""A thread that computes keeps its vector registers over the system calls that it is made to make."""

from pathlib import Path

import pytest
from support.core_file import Core
from support.targets import Target, build, exercise, until

import iobmd

pytestmark = [pytest.mark.needs("compiler"), pytest.mark.usefixtures("may_trace")]

NT_PRFPREG, NT_X86_XSTATE, NT_ARM_SVE, NT_ARM_SSVE = 2, 0x202, 0x405, 0x40B


@pytest.mark.parametrize("wanted", ["widest", "base", "streaming"])
def test_registers_are_kept(wanted: str, tmp_path: Path) -> None:
    """In streaming mode (SME), a call would end the mode."""
    go = tmp_path / "go"
    go.write_bytes(b"\0")
    with Target([build("vectors"), go, wanted], ready="") as target:
        if target.line() == "none":
            assert wanted == "streaming"
            return
        assert until(lambda: is_running(target.pid))
        exercise(target.pid, 4)
        with iobmd.snapshot(target.pid) as snapshot:
            snapshot.core(tmp_path / "core")
        with go.open("r+b") as file:  # not truncated, which would raise SIGBUS in the program
            file.write(b"\1")
        code, said = target.end()
    assert (code, said[:4]) == (0, "kept")
    check_core(Core((tmp_path / "core").read_bytes()), *said.split()[1:])


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/syscall").read_text() == "running\n"


def check_core(core: Core, kind: str, width: str) -> None:
    """Each byte of a register is its number plus one, so that no two registers are alike."""
    notes, third = dict(core.notes), b"\3"
    if kind in ("SVE", "SME"):
        assert third * int(width) in notes[NT_ARM_SVE if kind == "SVE" else NT_ARM_SSVE]
    else:
        assert third * 16 in notes[NT_PRFPREG]
    if kind == "AVX":  # each half of a register is in another place
        assert notes[NT_X86_XSTATE].count(third * 16) == 2
