"""`iobmd.rdma` on a host: without pyverbs. Memory regions are tested in guests (tests/vm/test_rdma.py)."""

import sys

import pytest
from support.errors import refusal

import iobmd
from iobmd import IOReturn, rdma
from iobmd.units import PAGE_SIZE


def test_it_names_the_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyverbs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "iobmd.rdma.memory_region", raising=False)
    monkeypatch.setitem(sys.modules, "pyverbs", None)  # importing it fails, whether it is installed or not
    with iobmd.allocate(PAGE_SIZE) as buffer:
        code, message = refusal(lambda: rdma.register(buffer, None, 0))
        buffer.free()
    assert code == IOReturn.kIOReturnUnsupported
    assert "python3-pyverbs" in message


def test_it_describes_what_is_no_memory() -> None:
    with pytest.raises(TypeError, match="descriptor"):
        rdma.register(b"bytes", None, 0)  # type: ignore[arg-type]
