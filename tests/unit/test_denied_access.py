"""The reason for refused access to another task: the kernel's actual cause, and no other."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from pathlib import Path

import pytest
from support.child import NOBODY, drop_capabilities, in_child, sleeping

from iobmd import IOReturn, IOReturnError, Task, host
from iobmd.task import diagnosis

CAP_NET_RAW, CAP_SYS_PTRACE = 13, 19
CLONE_NEWUSER = 0x10000000

pytestmark = pytest.mark.needs("root")


def refused_read(pid: int) -> tuple[str, str]:
    """Return the error of reading the first bytes of a task's program, which are mapped."""
    try:
        Task(pid).read(program_address[pid], 4)
    except IOReturnError as error:
        return error.code.name, str(error)
    return "", "it was read"


program_address: dict[int, int] = {}


@pytest.fixture
def sleeper(request: pytest.FixtureRequest) -> subprocess.Popen[bytes]:
    """A sleeping program of the user `request.param`."""
    manager = sleeping(uid=request.param)
    program = manager.__enter__()
    request.addfinalizer(lambda: manager.__exit__(None, None, None))
    program_address[program.pid] = int(Path(f"/proc/{program.pid}/maps").read_text().partition("-")[0], 16)
    return program


@pytest.mark.parametrize("sleeper", [0], indirect=True)
def test_capabilities_that_this_process_lacks(sleeper: subprocess.Popen[bytes]) -> None:
    """A task of the same user with more capabilities: the missing ones are named."""

    def restricted() -> tuple[str, str]:
        drop_capabilities(1 << CAP_NET_RAW | 1 << CAP_SYS_PTRACE)
        return refused_read(sleeper.pid)

    code, message = in_child(restricted)
    assert code == "kIOReturnNotPermitted"
    assert "capabilities that this process lacks (CAP_NET_RAW, CAP_SYS_PTRACE)" in message
    assert "seccomp" not in message


@pytest.mark.parametrize("sleeper", [0], indirect=True)
def test_with_the_capability_to_trace_others_may_be_missing(sleeper: subprocess.Popen[bytes]) -> None:
    def restricted() -> tuple[str, str]:
        drop_capabilities(1 << CAP_NET_RAW)
        return refused_read(sleeper.pid)

    assert in_child(restricted) == ("", "it was read")


@pytest.mark.parametrize("sleeper", [NOBODY], indirect=True)
def test_another_user_namespace(sleeper: subprocess.Popen[bytes]) -> None:
    """CAP_SYS_PTRACE in a nested user namespace does not count in the outer one."""

    def below() -> tuple[str, str] | None:
        if ctypes.CDLL(None).unshare(CLONE_NEWUSER) == -1:
            return None
        assert host.has_capability("CAP_SYS_PTRACE")
        return refused_read(sleeper.pid)

    answer = in_child(below, uid=NOBODY)
    if answer is None:
        pytest.skip("this host permits user namespaces only for root")
    code, message = answer
    assert code == "kIOReturnNotPermitted"
    assert "another user namespace" in message
    assert "seccomp" not in message


@pytest.mark.parametrize("sleeper", [0], indirect=True)
def test_seccomp_is_named_only_where_there_is_a_filter(sleeper: subprocess.Popen[bytes]) -> None:
    def message() -> str:
        return str(diagnosis.refused(sleeper.pid, errno.EPERM, "memory"))

    assert "seccomp" not in in_child(message)
    assert "security module" in in_child(message)
    assert "the seccomp filter of this process" in in_child(message, deny={"userfaultfd": errno.EPERM})


def test_names_of_capabilities() -> None:
    assert host.capability_names(1) == "CAP_CHOWN"
    assert host.capability_names(1 << 14 | 1 << 40) == "CAP_IPC_LOCK, CAP_CHECKPOINT_RESTORE"
    assert host.capability_names(1 << 63) == "capability 63"
    for capability in host.Capability:
        assert host.capability_names(1 << capability) == capability.name


def test_a_process_of_another_user() -> None:
    def look() -> IOReturn:
        with pytest.raises(IOReturnError, match=f"belongs to uid 0, this process to uid {NOBODY}") as caught:
            Task(os.getppid()).read(0x1000, 1)
        return caught.value.code

    assert in_child(look, uid=NOBODY) == IOReturn.kIOReturnNotPermitted
