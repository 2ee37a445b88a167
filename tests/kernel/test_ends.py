"""The end of descriptors that were not freed: garbage, cycles and exit print nothing but a ResourceWarning."""

import subprocess
import sys

import pytest

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

def cycle(*things):
    things[0].cycle = list(things)

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
    "a part of what was freed, prepared, in a cycle": (
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
    """Return what a program prints; it has to exit normally, and its warnings to be resource warnings alone."""
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
    # A command asks for physical addresses.
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
for _ in range(300):  # more than one table of pins holds
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
