"""The end of descriptors that were not freed: garbage, cycles and exit print nothing but a ResourceWarning."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from support import kernel
from support.targets import until
from support.threads import collects_without_waiting

import iobmd
from iobmd import (
    IOBufferMemoryDescriptor,
    IODMACommand,
    IOMapOptions,
    IOMemoryDescriptor,
    IOMultiMemoryDescriptor,
    IOSubMemoryDescriptor,
    iommu,
)
from iobmd._internal import process_local
from iobmd.descriptors import memory_map
from iobmd.iommu import IOMapper

PAGE = kernel.PAGE
INOUT = iobmd.kIODirectionInOut
VOLATILE = iobmd.IOPurgeable.kIOMemoryPurgeableVolatile

HEAD = """
import builtins, ctypes, gc, os, sys, warnings
import iobmd
from iobmd import IODMACommand, IOMapOptions, IOMemoryDescriptor, IOMultiMemoryDescriptor, IOSubMemoryDescriptor

def pageable(**how):
    return iobmd.allocate(8192, wired=False, **how)

def command(memory, options=0):
    made = IODMACommand.withSpecification(64, 0, options)
    made.setMemoryDescriptor(memory)
    return made

def cycle(*objects):
    objects[0].cycle = list(objects)

def descriptors():
    return len(os.listdir("/proc/self/fd"))

def objects():
    with open("/proc/self/maps") as lines:
        return sum("/memfd:iobmd" in line for line in lines)
"""

PROGRAMS = {
    "prepared, dropped": "b = pageable(); b.prepare(); b.prepare(); del b",
    "wired, prepared, dropped": "b = iobmd.allocate(8192); b.prepare(); del b",
    "prepared, at exit": "b = pageable(); b.prepare()",
    "prepared, in a cycle": "b = pageable(); b.prepare(); cycle(b); del b; gc.collect()",
    "viewed, at exit": "b = iobmd.allocate(8192); v = memoryview(b)",
    "only the view, at exit": "v = memoryview(iobmd.allocate(8192))",
    "kept by the interpreter": "b = iobmd.allocate(8192); sys.kept = memoryview(b); builtins.kept = b",
    "viewed, in a cycle": "b = iobmd.allocate(8192); cycle(b, memoryview(b)); del b; gc.collect()",
    "viewed and prepared, in a cycle at exit": "b = pageable(); b.prepare(); cycle(b, memoryview(b))",
    "mapped, at exit": "b = pageable(shared=True); m = b.map(IOMapOptions.kIOMapUnique); v = memoryview(m)",
    "mapped and viewed, in a cycle": (
        "b = pageable(shared=True); m = b.map(IOMapOptions.kIOMapUnique); cycle(b, m, memoryview(m), memoryview(b)); "
        "del b, m; gc.collect()"
    ),
    "a map of its own addresses, in a cycle": (
        "b = pageable(); m = b.map(); cycle(b, m, memoryview(m)); del b, m; gc.collect()"
    ),
    "a part, prepared, at exit": "b = pageable(); s = IOSubMemoryDescriptor.withSubRange(b, 0, 4096, 3); s.prepare()",
    "a part of a freed buffer, prepared, in a cycle": (
        "b = pageable(); s = IOSubMemoryDescriptor.withSubRange(b, 0, 4096, 3); b.free(); s.prepare(); "
        "cycle(s, b); del b, s; gc.collect()"
    ),
    "a concatenation, prepared and viewed, at exit": (
        "a = pageable(); b = pageable(shared=True); s = IOMultiMemoryDescriptor.withDescriptors([a, b], 3); "
        "s.prepare(); v = memoryview(a)"
    ),
    "a command, dropped": "b = iobmd.allocate(8192); c = command(b); del c",
    "a command, at exit": "b = iobmd.allocate(8192); c = command(b)",
    "a command with bounce buffers, in a cycle": (
        "b = iobmd.allocate(8192); c = command(b); c.synchronize(0, True); cycle(b, c); del b, c; gc.collect()"
    ),
    "purgeable, volatile and viewed, at exit": (
        "b = pageable(purgeable=True, shared=True); b.setPurgeable(3); v = memoryview(b)"
    ),
    "kept non-volatile, in a cycle": (
        "b = pageable(purgeable=True); b.setPurgeable(3); n = b.nonvolatile(); n.__enter__(); cycle(b, n); del b, n; "
        "gc.collect()"
    ),
    "a cache with an item in use, at exit": (
        "c = iobmd.PurgeableCache(lambda key: bytes(8192)); i = c[1]; v = memoryview(i)"
    ),
    "a cache with an item in use, in a cycle": (
        "c = iobmd.PurgeableCache(lambda key: bytes(8192)); i = c[1]; cycle(c, i, memoryview(i)); del c, i; "
        "gc.collect()"
    ),
    "a handle, at exit": "b = pageable(shared=True); h = iobmd.share(b)",
    "existing memory, prepared and unmapped, dropped": (
        "libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p; size = ctypes.c_size_t(8192); "
        "at = libc.mmap(None, size, 3, 0x22, -1, 0); "
        "d = IOMemoryDescriptor.withAddressRange(at, 8192, 3, iobmd.kernel_task); d.prepare(); "
        "c = command(d, IODMACommand.kNonCoherent); assert libc.munmap(ctypes.c_void_p(at), size) == 0; del d, c"
    ),
}


def run(program: str, warned: str) -> str:
    """Return the output of a program, which must exit normally and issue no warnings other than resource warnings."""
    ended = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", HEAD + program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert all("ResourceWarning" in line for line in ended.stderr.splitlines()), ended.stderr
    assert warned in ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    "program",
    # A command requires physical addresses.
    [
        pytest.param(text, id=name, marks=pytest.mark.needs(*["frames"] * ("command(" in text)))
        for name, text in PROGRAMS.items()
    ],
)
def test_nothing_is_printed_but_the_resource_warning(program: str) -> None:
    run(program, "")


@pytest.mark.parametrize("name", ["prepared, dropped", "wired, prepared, dropped"])
def test_the_warning_says_what_was_never_freed(name: str) -> None:
    run(PROGRAMS[name], "never freed")


def test_what_is_dropped_while_prepared_is_unpinned_and_unmapped() -> None:
    program = """
for _ in range(300):  # more than fit in one table of pins
    b = iobmd.allocate(1 << 16, wired=False, shared=True)
    b.prepare()
    del b
print(objects())
"""
    assert run(program, "never freed").split() == ["0"]


def test_cycles_with_views_leave_no_mapping_and_no_descriptor() -> None:
    program = """
iobmd.allocate(8192, shared=True).free()
before = descriptors()
for _ in range(20):
    b = pageable(shared=True)
    b.prepare()
    m = b.map(IOMapOptions.kIOMapUnique)
    cycle(b, memoryview(b), m, memoryview(m))
    del b, m
    gc.collect()
print(descriptors() - before, objects())
"""
    assert run(program, "never freed").split() == ["0", "0"]


def test_a_view_keeps_memory_whose_handle_is_gone() -> None:
    program = """
b = pageable()
b.writeBytes(0, b"kept")
v = memoryview(b)
del b
gc.collect()
print(bytes(v[:4]).decode())
v.release()
"""
    assert run(program, "never freed").split() == ["kept"]


def pinned_in_use() -> int:
    """Return how much memory is pinned, without pages that are kept for the next buffers."""
    iobmd.trim()
    return kernel.status("VmPin")


class Abandoned(NamedTuple):
    """Garbage that uses memory, in a cycle, so that only the collector ends it."""

    garbage: list[object]
    others: list[object]
    guard: process_local.Guard
    """The guard of the memory."""
    held: Callable[[], int] = pinned_in_use
    """Return the kernel's measure of its use, 0 when the use has ended."""


def pageable(size: int = PAGE, **how: bool) -> IOBufferMemoryDescriptor:
    buffer = iobmd.allocate(size, wired=False, **how)
    buffer.writeBytes(0, bytes(size))
    kernel.set_apart(buffer)
    return buffer


def dirty(*buffers: IOBufferMemoryDescriptor) -> int:
    """Return how many bytes are not lazily freed, nor reclaimed."""
    return sum(kernel.smaps(buffer.getBytesNoCopy())["Private_Dirty"] for buffer in buffers)


def a_part() -> Abandoned:
    whole = pageable()
    part = IOSubMemoryDescriptor.withSubRange(whole, 0, 1, INOUT)
    part.prepare()
    return Abandoned([part], [whole], whole._memory().guard)


def a_concatenation() -> Abandoned:
    parts = [pageable(), pageable()]
    whole = IOMultiMemoryDescriptor.withDescriptors(parts, INOUT)
    whole.prepare()
    return Abandoned([whole], [*parts], parts[1]._memory().guard)


def a_concatenation_in_use() -> Abandoned:
    whole = IOMultiMemoryDescriptor.withDescriptors([pageable(), pageable()], INOUT)
    part = IOSubMemoryDescriptor.withSubRange(whole, 0, PAGE + 1, INOUT)
    part.prepare()
    return Abandoned([part], [whole], whole._memory().guard)


def a_command() -> Abandoned:
    memory = pageable()
    memory.prepare()
    command = IODMACommand.withSpecification(64)
    command.setMemoryDescriptor(memory)
    command.synchronize(0, forceDoubleBuffer=True)
    memory.complete()
    return Abandoned([command], [memory], memory._memory().guard)


def a_device_range() -> Abandoned:
    memory, mapper = pageable(), IOMapper("")
    prepared = mapper.prepare(memory)
    held = lambda: len(mapper._attachment.mapped) + kernel.status("VmPin")  # type: ignore[union-attr]  # noqa: E731
    return Abandoned([prepared], [memory, mapper], mapper._guard, held)


def memory_of_a_device_range() -> Abandoned:
    found = a_device_range()
    return found._replace(guard=found.others[0]._memory().guard)  # type: ignore[attr-defined]


def an_interrupted_block() -> Abandoned:
    memory = pageable(purgeable=True)
    memory.setPurgeable(VOLATILE)
    block = memory.nonvolatile()
    assert block.__enter__()
    return Abandoned([block], [memory], memory._memory().guard, lambda: dirty(memory))


def an_interrupted_block_of_parts() -> Abandoned:
    parts = [pageable(purgeable=True), pageable(purgeable=True)]
    whole = IOMultiMemoryDescriptor.withDescriptors(parts, INOUT)
    whole.setPurgeable(VOLATILE)
    block = whole.nonvolatile()
    assert block.__enter__()
    return Abandoned([block], [*parts, whole], parts[1]._memory().guard, lambda: dirty(*parts))


def a_map() -> Abandoned:
    memory = pageable(shared=True)
    mapped = memory.map(IOMapOptions.kIOMapUnique)
    address = mapped.getAddress()
    return Abandoned([mapped], [memory], memory_map._changes, lambda: len(kernel.smaps(address)))


class Mapped:
    """An I/O address space without a device."""

    interface = "none"

    def __init__(self, _device: object) -> None:
        self.mapped: dict[int, int] = {}

    def ranges(self) -> list[tuple[int, int]]:
        return [(0, 1 << 39)]

    def map(self, _virtual: int, address: int, size: int, _access: int) -> None:
        self.mapped[address] = size

    def unmap(self, address: int, size: int) -> None:
        assert self.mapped.pop(address) == size

    def close(self) -> None:
        assert not self.mapped


USES = [
    a_part, a_concatenation, a_concatenation_in_use, pytest.param(a_command, marks=pytest.mark.needs("frames")),
    a_device_range, memory_of_a_device_range, an_interrupted_block, an_interrupted_block_of_parts, a_map,
]  # fmt: skip


@pytest.fixture
def abandoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Abandoned]:
    monkeypatch.setattr(iommu, "attach", Mapped)
    found: Abandoned = request.param()
    assert found.held()
    yield found
    for other in reversed(found.others):
        if isinstance(other, IOMemoryDescriptor):
            other.free()
        elif isinstance(other, IOMapper):
            other.close()


@pytest.mark.filterwarnings("ignore:.*never:ResourceWarning")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("abandoned", USES, indirect=True)
@pytest.mark.parametrize("in_thread", [False, True], ids=["itself", "another thread"])
def test_a_destructor_never_waits(abandoned: Abandoned, *, in_thread: bool) -> None:
    """The collector runs in any thread, inside a guard or while another thread is; the use ends afterwards."""
    assert collects_without_waiting(abandoned.guard, abandoned.garbage, in_thread=in_thread)
    assert until(lambda: not abandoned.held())  # a ring ends in a work queue of the kernel
