"""Secrets: what the kernel keeps from swap, dumps, forks and stray accesses, and what remains of them."""

import ctypes
import gc
import itertools
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from support import kernel
from support.child import in_child
from support.errors import code_of, error_of
from support.owners_model import check_owners
from support.threads import run_all

import iobmd
from iobmd import IOReturn, Wiring
from iobmd.constants import kIOMemoryIncoherentIOFlush
from iobmd.units import PAGE_SIZE

KINDS: list[tuple[int, bool | Literal["concealed"]]] = [
    (1, True), (32, True), (992, True), (993, True), (PAGE_SIZE, True), (5000, True),
    (32, "concealed"), (9000, "concealed"),
]  # fmt: skip
"""Sizes and kinds: those that share pages, and those that do not."""
OWN_PAGES = [kind for kind in KINDS if kind[0] > 992 or kind[1] == "concealed"]
Buffer = iobmd.IOBufferMemoryDescriptor

every_kind = pytest.mark.parametrize(("size", "secret"), KINDS)
with_own_pages = pytest.mark.parametrize(("size", "secret"), OWN_PAGES)


@pytest.fixture(autouse=True)
def trimmed() -> None:
    iobmd.trim()


def flags(address: int) -> set[str]:
    """Return the VmFlags of the mapping that contains an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(head[1], 16) <= address < int(head[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    return set()


def is_accessible(address: int) -> bool:
    return {"rd", "wr"} <= flags(address)


def pages_of(buffer: Buffer) -> range:
    address = buffer.getBytesNoCopy()
    return range(address // kernel.PAGE * kernel.PAGE, address + buffer.getCapacity(), kernel.PAGE)


def store(address: int, value: bytes) -> None:
    ctypes.memmove(address, value, len(value))


def load(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def killed_by_store(address: int) -> bool:
    """Return whether a store to an address ends a forked child by SIGSEGV."""
    if not (child := os.fork()):
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        store(address, b"x")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV


@every_kind
def test_the_kernel_locks_it_and_neither_dumps_nor_inherits_it(
    size: int, secret: bool | Literal["concealed"]
) -> None:
    with iobmd.allocate(size, secret=secret) as buffer:
        assert buffer.wiring in (Wiring.PINNED, Wiring.RESIDENT)
        for page in pages_of(buffer):
            assert {"lo", "dd", "wf"} <= flags(page)
            assert kernel.smaps(page)["Locked"] == kernel.smaps(page)["Rss"] > 0


@every_kind
def test_a_forked_child_finds_zeros(size: int, secret: bool | Literal["concealed"]) -> None:
    with iobmd.allocate(size, secret=secret) as buffer, memoryview(buffer) as view:
        view[:] = b"s" * size
        address = buffer.getBytesNoCopy()

        def child() -> tuple[bytes, object]:
            return load(address, size), code_of(lambda: buffer.readBytes(0, size))

        assert in_child(child) == (bytes(size), IOReturn.kIOReturnNotOpen)
        assert bytes(view) == b"s" * size


@with_own_pages
def test_guard_pages_adjoin_its_last_byte_and_its_pages(size: int, secret: bool | Literal["concealed"]) -> None:
    with iobmd.allocate(size, secret=secret) as buffer, memoryview(buffer):
        address = buffer.getBytesNoCopy()
        assert (address + size) % kernel.PAGE == 0
        store(address + size - 1, b"x")
        assert killed_by_store(address + size)
        assert killed_by_store(pages_of(buffer)[0] - 1)
        assert not killed_by_store(address)


def test_a_guard_page_follows_the_last_page_of_small_secrets() -> None:
    with iobmd.allocate(32, secret=True) as buffer:
        (page,) = pages_of(buffer)
        assert killed_by_store(page + kernel.PAGE)
        assert killed_by_store(page - 1)


@pytest.mark.parametrize("alignment", [1, 2, 16, 64, 256, PAGE_SIZE])
@every_kind
def test_alignment(size: int, secret: bool | Literal["concealed"], alignment: int) -> None:
    with iobmd.allocate(size, secret=secret, alignment=alignment) as buffer:
        address = buffer.getBytesNoCopy()
        assert address % alignment == 0
        assert buffer.readBytes(0, size) == bytes(size)
        if buffer.getCapacity() > 992:
            assert -(address + size) % kernel.PAGE < alignment
        buffer.writeBytes(0, b"\xff" * size)


@every_kind
def test_it_is_cleared_when_it_is_freed(size: int, secret: bool | Literal["concealed"]) -> None:
    """A pipe that refers to the page (vmsplice(2)) shows its contents after it was unmapped."""
    for end in (Buffer.free, lambda one: one.__exit__(None, None, None)):
        buffer = iobmd.allocate(size, secret=secret)
        buffer.writeBytes(0, b"\x5a" * size)
        with memoryview(buffer):
            pipe, page = spliced(buffer.getBytesNoCopy(), min(size, PAGE_SIZE - buffer.getBytesNoCopy() % PAGE_SIZE))
        end(buffer)
        assert not any(os.read(pipe, page))
        os.close(pipe)


def test_garbage_is_cleared() -> None:
    buffer = iobmd.allocate(100, secret=True)
    buffer.writeBytes(0, b"\x5a" * 100)
    pipe, size = spliced(buffer.getBytesNoCopy(), 100)
    with pytest.warns(ResourceWarning, match="never freed"):
        del buffer
        gc.collect()
    assert os.read(pipe, size) == bytes(100)
    os.close(pipe)


def spliced(address: int, size: int) -> tuple[int, int]:
    """Return a pipe that refers to the bytes at an address, all in one page, and their number."""

    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    reading, writing = os.pipe()
    vector = Vector(address, size)
    assert ctypes.CDLL(None).vmsplice(writing, ctypes.byref(vector), 1, 0) == size
    os.close(writing)
    return reading, size


@pytest.mark.needs("memlock")
def test_many_fit_into_a_limit_of_8_mib() -> None:
    def child() -> int:
        secrets = [iobmd.allocate(32, secret=True) for _ in range(50_000)]
        locked = kernel.status("VmLck")
        for one in secrets:
            one.free()
        return locked

    assert in_child(child, uid=65534, memlock=8 << 20) <= 1.1 * 50_000 * 64


def test_a_missed_store_is_reported_and_the_memory_freed() -> None:
    for (size, secret), beyond in itertools.product(KINDS, (True, False)):
        with iobmd.allocate(size, secret=secret, alignment=8) as buffer:
            address = buffer.getBytesNoCopy()
            wrong = address + size if beyond else address - 1
            if wrong % kernel.PAGE == (0 if beyond else kernel.PAGE - 1):
                continue  # a guard page
            with memoryview(buffer):
                was = load(wrong, 1)
                store(wrong, b"\0")
            assert error_of(buffer.verify).address == wrong
            with memoryview(buffer):
                store(wrong, was)
            if buffer.wiring is Wiring.PINNED and iobmd.host.pfns_visible():
                buffer.verify()
            with memoryview(buffer):
                store(wrong, b"\0")
            error = error_of(buffer.free)
            assert (error.code, error.address) == (IOReturn.kIOReturnVMError, wrong)
            assert code_of(buffer.getLength) == IOReturn.kIOReturnNotOpen
            buffer.free()
    iobmd.trim()
    assert iobmd.statistics().slabs == 0


@pytest.mark.parametrize("size", [32, 9000])
def test_concealed_memory_is_accessible_only_during_its_uses(size: int) -> None:
    with iobmd.allocate(size, secret="concealed") as buffer:
        address = buffer.getBytesNoCopy()
        assert not any(is_accessible(page) for page in pages_of(buffer))
        assert killed_by_store(address)
        assert code_of(lambda: iobmd.current_task().read(address, 1)) == IOReturn.kIOReturnVMError
        uses: list[Callable[[], object]] = [
            lambda: buffer.writeBytes(0, b"s" * size),
            lambda: buffer.readBytes(0, size),
            lambda: buffer.readBytesInto(0, bytearray(size)),
            lambda: buffer.appendBytes(b""),
            lambda: buffer.performOperation(kIOMemoryIncoherentIOFlush, 0, size),
            lambda: (buffer.prepare(), buffer.complete()),
            buffer.getPageCounts,
            lambda: repr(buffer),
            lambda: iobmd.IOMemoryDescriptor.withAddressRange(address, 8, 3, iobmd.kernel_task).release(),
        ]
        for use in uses:
            use()
            assert not any(is_accessible(page) for page in pages_of(buffer))
        with memoryview(buffer) as outer:
            with memoryview(buffer) as inner:
                assert all(is_accessible(page) for page in pages_of(buffer))
                assert bytes(inner) == b"s" * size
            buffer.readBytes(0, 1)
            outer[0] = ord("t")
        assert not any(is_accessible(page) for page in pages_of(buffer))
        assert buffer[0] == ord("t")
        assert kernel.smaps(address)["Locked"] == len(pages_of(buffer)) * kernel.PAGE


@pytest.mark.parametrize("size", [64, 9000])
def test_registers_of_concealed_memory(size: int) -> None:
    """A map is no view: it leaves the memory inaccessible between the accesses."""
    with iobmd.allocate(size, secret="concealed", alignment=8) as buffer, buffer.map() as mapped:
        for _repeated in range(2):
            mapped.write64(8, 0x0123456789ABCDEF)
            assert not any(is_accessible(page) for page in pages_of(buffer))
            assert mapped.read64(8) == 0x0123456789ABCDEF
            assert mapped.read8(15) == 0x01
        assert not any(is_accessible(page) for page in pages_of(buffer))
        assert buffer.readBytes(8, 8) == bytes.fromhex("efcdab8967452301")


@pytest.mark.needs("frames")
def test_physical_addresses_of_concealed_memory() -> None:
    with iobmd.allocate(9000, secret="concealed") as buffer:
        address = buffer.getBytesNoCopy()
        frames = kernel.frames(address, 9000)
        assert buffer.getPhysicalAddress() == frames[0] * kernel.PAGE + address % kernel.PAGE
        assert list(buffer.page_addresses()) == [frame * kernel.PAGE for frame in frames]
        buffer.verify()


def test_concealed_memory_beside_a_view_in_another_thread() -> None:
    """The last of several users conceals it, whichever thread that is."""
    with iobmd.allocate(64, secret="concealed") as buffer:

        def work() -> None:
            for _ in range(3000):
                with memoryview(buffer) as view:
                    view[0] = 1
                assert len(buffer.readBytes(0, 64)) == 64

        run_all(*[work] * 4)
        assert not is_accessible(buffer.getBytesNoCopy())


@with_own_pages
def test_memory_that_the_program_replaced_is_left_alone(size: int, secret: bool | Literal["concealed"]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    buffer = iobmd.allocate(size, secret=secret)
    pages = pages_of(buffer)
    whole = len(pages) * kernel.PAGE
    shared_anonymous_fixed = 0x01 | 0x20 | 0x10
    assert libc.mmap(ctypes.c_void_p(pages[0]), whole, 3, shared_anonymous_fixed, -1, 0) == pages[0]
    store(pages[0], b"ours")
    buffer.free()
    assert load(pages[0], 4) == b"ours"
    assert libc.munmap(ctypes.c_void_p(pages[0]), whole) == 0


def test_nothing_remains() -> None:
    for turn in range(3):
        for size, secret in KINDS:
            for _ in range(20):
                iobmd.allocate(size, secret=secret).free()
        if not turn:
            before = kernel.Footprint.settled()
    after = kernel.Footprint.settled()
    assert (after.descriptors, after.locked) == (before.descriptors, before.locked)
    assert after.mappings <= before.mappings + 1  # Python's allocator may add an arena


def test_large_secrets_are_unmapped_and_not_kept_for_reuse() -> None:
    with iobmd.policy(keep=1 << 30):
        buffer = iobmd.allocate(8 << 20, secret=True)
        address = buffer.getBytesNoCopy()
        buffer.free()
    assert flags(address) == set()
    assert iobmd.statistics().kept == 0


def test_copies_of_a_task_into_a_secret() -> None:
    with iobmd.allocate(5000) as source:
        source.writeBytes(0, bytes(range(250)) * 20)
        for secret in (True, "concealed"):
            with iobmd.copy(iobmd.current_task(), source.getBytesNoCopy(), 5000, secret=secret) as buffer:
                assert buffer.readBytes(0, 5000) == source.readBytes(0, 5000)
                assert "dd" in flags(buffer.getBytesNoCopy())
                assert is_accessible(buffer.getBytesNoCopy()) == (secret is True)
        assert code_of(lambda: iobmd.copy(0, 1 << 12, 100, secret=True)) is not None
    assert code_of(lambda: iobmd.copy(iobmd.current_task(), PAGE_SIZE, 100, secret=True)) == IOReturn.kIOReturnVMError
    with pytest.raises(iobmd.BadArgumentError, match="lazy=True"):
        iobmd.copy(iobmd.current_task(), PAGE_SIZE, 100, secret=True, lazy=True)


@pytest.mark.parametrize(
    "kind",
    [
        {"wired": False},
        {"shared": True},
        {"task": None},
        {"contiguous": True, "size": 3 * kernel.PAGE},
        {"physical_mask": 0xFFFFFFFF},
        {"alignment": 2 * kernel.PAGE},
        {"cache": "inhibit"},
        {"address": 0x10000000},
        {"node": 0},
        {"wired": "try"},
    ],
)
def test_impossible_secrets(kind: dict[str, object]) -> None:
    arguments: dict[str, object] = {"size": 32, "secret": True, **kind}
    assert code_of(lambda: iobmd.allocate(**arguments)) == IOReturn.kIOReturnBadArgument  # type: ignore[arg-type]


def test_types() -> None:
    iobmd.allocate(32, secret=0).free()  # type: ignore[arg-type]
    for bad in (None, 1.5, "", "hidden"):
        with pytest.raises(TypeError, match=r"^secret must be True or False, or 'concealed'"):
            iobmd.allocate(32, secret=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(2))
def test_random_threads_against_a_model(seed: int) -> None:
    def allocate(chance: random.Random) -> Buffer:
        size, secret = chance.choice(KINDS[:4] * 8 + KINDS)
        return iobmd.allocate(size, secret=secret)

    check_owners(seed, allocate, turns=1500, most=100)
    iobmd.trim()
    counted = iobmd.statistics()
    assert counted.pinned.buffers + counted.resident.buffers + counted.slabs == 0
