"""`allocate(node=)` on a host with any number of nodes; guests with two nodes are tested in tests/vm/test_numa.py."""

import pytest
from support.child import NOBODY, in_child
from support.errors import code_of

import iobmd
from iobmd import IOReturn
from iobmd._native import mman as native
from iobmd.memory import numa
from iobmd.units import PAGE_SIZE

MIB = 1 << 20


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("keywords", [{}, {"shared": True}, {"wired": False}], ids=str)
def test_the_first_node(keywords: dict[str, bool]) -> None:
    node = numa.with_memory()[0]
    with iobmd.allocate(MIB, node=node, **keywords) as buffer:
        buffer.writeBytes(0, b"x" * MIB)
        assert native.count_off_node(buffer.getBytesNoCopy(), MIB // PAGE_SIZE, PAGE_SIZE, node) == 0
        assert (
            native.count_off_node(buffer.getBytesNoCopy(), MIB // PAGE_SIZE, PAGE_SIZE, node + 1) == MIB // PAGE_SIZE
        )


def test_without_privilege() -> None:
    def bytes_of_the_node() -> int:
        with iobmd.allocate(64 << 10, node=numa.with_memory()[0]) as buffer:
            return len(buffer)

    assert in_child(bytes_of_the_node, uid=NOBODY) == 64 << 10


@pytest.mark.parametrize("node", [-1, 777, 1 << 20])
def test_no_such_node(node: int) -> None:
    assert code_of(lambda: iobmd.allocate(1, node=node)) == IOReturn.kIOReturnBadArgument


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("shared", [False, True])
def test_memory_of_other_nodes_is_given_back(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    monkeypatch.setattr(native, "count_off_node", lambda *_: 3)
    assert code_of(lambda: iobmd.allocate(2 * MIB, node=0, shared=shared)) == IOReturn.kIOReturnNoResources
    iobmd.allocate(2 * MIB).free()  # no node is requested any longer
