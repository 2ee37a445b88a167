"""Volatile memory that faults on access, seen by another process that touches it, and by the permissions in maps."""

import os
from collections.abc import Iterator

import pytest
from support import kernel
from support.child import sleeping
from support.errors import code_of, error_of
from support.faulting import faults
from support.targets import need_ptrace

import iobmd
from iobmd import IOMultiMemoryDescriptor, IOPurgeable, IOReturn, IOSubMemoryDescriptor, procfs

PAGE = kernel.PAGE
INOUT = iobmd.kIODirectionInOut
FAULT = IOPurgeable.kIOMemoryPurgeableFaultOnAccess
KEEP, NON_VOLATILE = IOPurgeable.kIOMemoryPurgeableKeepCurrent, IOPurgeable.kIOMemoryPurgeableNonVolatile
VOLATILE, EMPTY = IOPurgeable.kIOMemoryPurgeableVolatile, IOPurgeable.kIOMemoryPurgeableEmpty
Buffer = iobmd.IOBufferMemoryDescriptor


@pytest.fixture(params=[False, True], ids=["private", "shared"])
def memory(request: pytest.FixtureRequest) -> Iterator[tuple[Buffer, bytes]]:
    with iobmd.allocate(20 * PAGE, wired=False, purgeable=True, shared=request.param) as buffer:
        buffer.writeBytes(0, data := os.urandom(20 * PAGE))
        yield buffer, data


def permissions(address: int) -> str:
    return next(area.perms for area in procfs.areas("self", address, address + 1))


@pytest.mark.usefixtures("nothing_left")
def test_accesses_fault_until_it_is_nonvolatile(memory: tuple[Buffer, bytes]) -> None:
    buffer, data = memory
    at = buffer.getBytesNoCopy()
    assert buffer.setPurgeable(VOLATILE | FAULT) == NON_VOLATILE
    assert faults(at)
    assert faults(at + 20 * PAGE - 1, write=True)
    for use in (
        lambda: buffer.readBytes(9, 2),
        lambda: buffer.writeBytes(9, b"x"),
        lambda: buffer.readBytes(0, 20 * PAGE),
    ):
        assert error_of(use).code == IOReturn.kIOReturnVMError
    assert error_of(lambda: buffer.readBytes(PAGE + 9, 2)).address == at + PAGE + 9
    assert buffer.setPurgeable(KEEP) == VOLATILE
    assert faults(at)
    assert buffer.setPurgeable(NON_VOLATILE) == VOLATILE, "every byte is intact"
    assert bytes(buffer) == data
    assert not faults(at, write=True)
    assert buffer.setPurgeable(VOLATILE) == NON_VOLATILE
    assert not faults(at), "without the modifier it may be read"


@pytest.mark.usefixtures("nothing_left")
def test_purged_while_it_faults(memory: tuple[Buffer, bytes]) -> None:
    buffer, _ = memory
    at = buffer.getBytesNoCopy()
    buffer.setPurgeable(VOLATILE | FAULT)
    assert iobmd.purge() >= 20 * PAGE
    assert faults(at)
    with buffer.nonvolatile() as intact:
        assert not intact
        buffer.writeBytes(0, b"again" * (4 * PAGE))
    assert faults(at), "as volatile as before, with its modifiers"
    assert buffer.setPurgeable(NON_VOLATILE) == VOLATILE
    assert bytes(buffer) == b"again" * (4 * PAGE)
    buffer.setPurgeable(EMPTY | FAULT)
    assert faults(at)
    assert buffer.setPurgeable(NON_VOLATILE) == EMPTY
    assert bytes(buffer) == bytes(20 * PAGE)


@pytest.mark.usefixtures("nothing_left")
def test_views_fault_and_the_memory_is_freed(memory: tuple[Buffer, bytes]) -> None:
    buffer, _ = memory
    with memoryview(buffer):
        buffer.setPurgeable(VOLATILE | FAULT)
        assert permissions(buffer.getBytesNoCopy()) in ("---p", "---s")
    buffer.free()
    with iobmd.allocate(20 * PAGE, wired=False) as other:
        other.writeBytes(0, b"x" * (20 * PAGE))


@pytest.mark.usefixtures("nothing_left")
def test_maps_exclude_it() -> None:
    unique = iobmd.IOMapOptions.kIOMapUnique
    with (
        iobmd.allocate(PAGE, wired=False, purgeable=True, shared=True) as buffer,
        IOSubMemoryDescriptor.withSubRange(buffer, 0, PAGE, INOUT) as part,
    ):
        buffer.writeBytes(0, data := os.urandom(PAGE))
        with part.map(unique):
            assert code_of(lambda: buffer.setPurgeable(VOLATILE | FAULT)) == IOReturn.kIOReturnBusy
            assert buffer.setPurgeable(KEEP) == NON_VOLATILE
        with buffer.map():
            buffer.setPurgeable(VOLATILE | FAULT)
        assert code_of(lambda: part.map(unique)) == IOReturn.kIOReturnNotReady
        assert code_of(lambda: buffer.map(unique)) == IOReturn.kIOReturnNotReady
        buffer.setPurgeable(NON_VOLATILE)
        with part.map(unique) as mapped:
            assert bytes(mapped) == data


@pytest.mark.usefixtures("nothing_left")
def test_parts_of_a_concatenation() -> None:
    with (
        iobmd.allocate(PAGE, wired=False, purgeable=True) as first,
        iobmd.allocate(PAGE, wired=False, purgeable=True, shared=True) as second,
    ):
        first.writeBytes(0, b"1" * PAGE)
        second.writeBytes(0, b"2" * PAGE)
        whole = IOMultiMemoryDescriptor.withDescriptors([first, second], INOUT)
        whole.setPurgeable(VOLATILE | FAULT)
        assert faults(first.getBytesNoCopy())
        assert faults(second.getBytesNoCopy())
        assert code_of(lambda: whole.readBytes(PAGE - 1, 2)) == IOReturn.kIOReturnVMError
        assert whole.setPurgeable(NON_VOLATILE) == VOLATILE
        assert whole.readBytes(PAGE - 1, 2) == b"12"
        whole.free()


@pytest.mark.usefixtures("nothing_left")
def test_only_of_memory_in_this_process() -> None:
    with iobmd.allocate(PAGE, task=None, wired=False, purgeable=True) as nowhere:
        assert code_of(lambda: nowhere.setPurgeable(VOLATILE | FAULT)) == IOReturn.kIOReturnUnsupported
        assert nowhere.setPurgeable(KEEP) == NON_VOLATILE
    need_ptrace()
    with sleeping() as program, iobmd.allocate(PAGE, task=program.pid, wired=False, purgeable=True) as theirs:
        assert code_of(lambda: theirs.setPurgeable(VOLATILE | FAULT)) == IOReturn.kIOReturnUnsupported


@pytest.mark.usefixtures("nothing_left")
def test_refused_by_the_kernel(memory: tuple[Buffer, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the protection cannot be changed, the memory remains non-volatile."""
    buffer, data = memory

    def refuse(*_: object, **__: object) -> None:
        raise iobmd.NoMemoryError("too many areas")

    with monkeypatch.context() as patch:
        patch.setattr("iobmd.descriptors.purge_control._set_access", refuse)
        assert code_of(lambda: buffer.setPurgeable(VOLATILE | FAULT)) == IOReturn.kIOReturnNoMemory
    assert buffer.setPurgeable(KEEP) == NON_VOLATILE
    assert iobmd.purge() == 0
    assert bytes(buffer) == data
