"""Buffers as fixed buffers of another library's ring, into which files are read."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import kernel, requirements
from support.child import NOBODY, in_child
from support.ring import Ring

import iobmd
from iobmd.units import PAGE_SIZE

SIZE, MIB = 256 << 10, 1 << 20
KINDS = {
    "wired": {},
    "pageable": {"wired": False},
    "shared": {"shared": True},
    "shared and pageable": {"shared": True, "wired": False},
    "contiguous": {"contiguous": True},
    "shared and contiguous": {"shared": True, "contiguous": True},
    "purgeable": {"wired": False, "purgeable": True},
    "secret": {"secret": True},
}


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture(params=[pytest.param(os.O_DIRECT, marks=pytest.mark.needs("direct_io")), 0], ids=["direct", "cached"])
def file(request: pytest.FixtureRequest, content: bytes, tmp_path: Path) -> Iterator[int]:
    """A file that is read without the page cache, or from it."""
    path = tmp_path / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY | request.param)
    yield fd
    os.close(fd)


def whole(buffer: iobmd.IOBufferMemoryDescriptor) -> tuple[int, int]:
    return buffer.getBytesNoCopy(), buffer.getCapacity()


def verify(buffer: iobmd.IOBufferMemoryDescriptor) -> None:
    """Compare the page frames of pinned memory, where they are visible."""
    if buffer.wiring is iobmd.Wiring.PINNED and not requirements.missing("frames"):
        buffer.verify()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.needs("frames")] if "contiguous" in kind else []) for kind in KINDS],
)
def test_a_file_is_read_into_a_fixed_buffer(kind: str, file: int, content: bytes) -> None:
    with iobmd.allocate(SIZE, **KINDS[kind]) as buffer, Ring() as ring:
        address, _size = whole(buffer)
        ring.register([whole(buffer)])
        half = SIZE // 2
        assert ring.read_fixed(file, address + half, half, 0, 0) == half
        assert ring.read_fixed(file, address, half, half, 0) == half
        assert buffer.readBytes(0, SIZE) == content[half:] + content[:half]
        assert ring.read_fixed(file, address + SIZE, half, 0, 0) == -errno.EFAULT  # outside the buffer
        verify(buffer)


@pytest.mark.needs("clone_buffers")
@pytest.mark.usefixtures("nothing_left")
def test_another_ring_uses_the_registration(file: int, content: bytes) -> None:
    """It is independent of the first ring's, which may end."""
    with iobmd.allocate(SIZE) as buffer, Ring() as other:
        with Ring() as ring:
            ring.register([whole(buffer)])
            other.clone(ring)
        assert other.read_fixed(file, buffer.getBytesNoCopy(), SIZE, 0, 0) == SIZE
        assert buffer.readBytes(0, SIZE) == content


@pytest.mark.usefixtures("nothing_left")
def test_the_ring_of_another_process(file: int, content: bytes) -> None:
    def read(handle: iobmd.Handle) -> int:
        with iobmd.attach(handle, wired=False) as buffer, Ring() as ring:
            ring.register([whole(buffer)])
            return ring.read_fixed(file, buffer.getBytesNoCopy(), SIZE, 0, 0)

    with iobmd.allocate(SIZE, shared=True) as buffer, iobmd.share(buffer) as handle:
        assert in_child(lambda: read(handle)) == SIZE
        assert buffer.readBytes(0, SIZE) == content
        verify(buffer)


@pytest.mark.needs("root")
@pytest.mark.parametrize(("wired", "charges"), [(True, 2), (False, 1)])
def test_what_counts_against_the_limit(wired: bool, charges: int) -> None:
    def charged() -> tuple[int, int]:
        iobmd.trim()
        with iobmd.allocate(MIB, wired=wired) as buffer, Ring() as ring, Ring() as other:
            before = kernel.status("VmPin") - (MIB if wired else 0)
            ring.register([whole(buffer)])
            first = kernel.status("VmPin") - before
            with contextlib.suppress(OSError):  # before Linux 6.12
                other.clone(ring)
            return first, kernel.status("VmPin") - before

    assert in_child(charged, uid=NOBODY - 31, memlock=8 * MIB) == (charges * MIB, charges * MIB)


@pytest.mark.needs("root")
@pytest.mark.parametrize(("wired", "refused"), [(True, True), (False, False)])
def test_the_limit_is_reached_by_wired_memory(wired: bool, refused: bool) -> None:
    def register() -> bool:
        with iobmd.allocate(MIB // 2, wired=wired) as buffer, Ring() as ring:
            try:
                ring.register([whole(buffer)])
            except OSError as error:
                assert error.errno == errno.ENOMEM
                return True
        return False

    # Pins count for the user until a worker of the kernel has closed their ring: each case has another user.
    assert in_child(register, uid=NOBODY - 32 - wired, memlock=MIB * 7 // 8) is refused


def concealed() -> iobmd.IOBufferMemoryDescriptor:
    return iobmd.allocate(PAGE_SIZE, secret="concealed")


@pytest.mark.parametrize("make", [concealed])
def test_memory_that_cannot_be_registered(make: Callable[[], iobmd.IOBufferMemoryDescriptor]) -> None:
    with make() as buffer, Ring() as ring, pytest.raises(OSError, match="Bad address"):
        ring.register([whole(buffer)])
