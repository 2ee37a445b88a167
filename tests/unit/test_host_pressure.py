"""The pressure files that accept a trigger."""

import os
from pathlib import Path

import pytest
from support.child import in_child
from support.probing import check, libc, private_mounts

from iobmd import host
from iobmd.host import Status, pressure


def takes_trigger(path):
    try:
        with path.open("r+b", buffering=0) as file:
            file.write(b"some 150000 2000000\0")
    except OSError:
        return False
    return True


def test_pressure_of_the_host():
    path = Path("/proc/pressure/memory")
    file = host.system_pressure()
    assert (file is not None) == path.exists()
    if file:
        assert file == (str(path), takes_trigger(path))


def test_pressure_of_our_own_cgroup():
    file = host.cgroup_pressure()
    if file is None:
        assert "/sys/fs/cgroup" not in Path("/proc/self/mounts").read_text()
        pytest.skip("no cgroup is mounted here")
    path = Path(file.path)
    assert str(os.getpid()) in (path.parent / "cgroup.procs").read_text().split()
    if path.name == "memory.pressure":
        assert file.notifies == takes_trigger(path)


@pytest.mark.needs("root")
def test_pressure_that_can_only_be_read():
    if host.system_pressure() is None:
        pytest.skip("this kernel has no pressure information (PSI)")

    def read_only():
        private_mounts()
        check(libc.mount(b"/proc/pressure", b"/proc/pressure", None, 0x1000, None))
        check(libc.mount(None, b"/proc/pressure", None, 0x1000 | 0x20 | 1, None))
        return pressure.pressure()

    fact = in_child(read_only)
    assert (fact.status, fact.value["notifies"]) == (Status.LIMITED, False)
