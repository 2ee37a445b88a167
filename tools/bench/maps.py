"""Maps of descriptors: at other addresses, in many parts, and copy-on-write."""

from __future__ import annotations

import mmap
import os
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from iobmd import api
from iobmd.constants import IOMapOptions, kIODirectionInOut, kIOMemoryMapCopyOnWrite
from iobmd.descriptors.composite import IOSubMemoryDescriptor
from iobmd.task.task import kernel_task
from iobmd.units import format_size

from .result import Result, at_most, medians

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor

_ELSEWHERE = int(IOMapOptions.kIOMapAnywhere | IOMapOptions.kIOMapUnique)
_MIB = 1 << 20
_PARTS = 256


def run(size: int, rounds: int) -> list[Result]:
    """Measure maps of `size` bytes, at most 256 MiB, and their end."""
    size = min(size, _PARTS * _MIB)
    with _filled(size, shared=True) as shared, _filled(size, shared=False) as private:
        plain, bare, parts, bare_parts = medians(
            rounds,
            partial(_map, shared, size, 1),
            partial(_mmap, size, 1),
            partial(_map, shared, size, _PARTS),
            partial(_mmap, size, _PARTS),
        )
        of_shared, copy_shared, of_private, copy_private = medians(
            rounds,
            partial(_copy_on_write, shared),
            partial(_copy, shared),
            partial(_copy_on_write, private),
            partial(_copy, private),
        )
    what = format_size(size)
    return [
        at_most(
            f"a map of {what}, and its end",
            f"{plain * 1e6:.0f} µs",
            f"mmap and munmap of a memfd: {bare * 1e6:.1f} µs",
            plain / bare,
            10,
        ),
        at_most(
            f"{_PARTS} maps of {format_size(size // _PARTS)}, and their end",
            f"{parts * 1e3:.1f} ms",
            f"mmap and munmap, {_PARTS} times: {bare_parts * 1e3:.1f} ms",
            parts / bare_parts,
            10,
        ),
        *(
            at_most(
                f"a copy-on-write map of {what} of {kind} memory",
                f"{took * 1e3:.0f} ms",
                f"iobmd.copy to shared memory: {copy * 1e3:.0f} ms",
                took / copy,
                1.25,
            )
            for kind, took, copy in (("shared", of_shared, copy_shared), ("private", of_private, copy_private))
        ),
    ]


@contextmanager
def _filled(size: int, *, shared: bool) -> Iterator[IOBufferMemoryDescriptor]:
    with api.allocate(size, wired=False, shared=shared) as buffer:
        block = os.urandom(min(size, _MIB))
        for offset in range(0, size, len(block)):
            buffer.writeBytes(offset, block)
        yield buffer


def _map(buffer: IOBufferMemoryDescriptor, size: int, parts: int) -> float:
    length = size // parts
    begin = time.perf_counter()
    maps = [buffer.createMappingInTask(kernel_task, 0, _ELSEWHERE, part * length, length) for part in range(parts)]
    for mapped in maps:
        mapped.unmap()
    return time.perf_counter() - begin


def _mmap(size: int, parts: int) -> float:
    fd = os.memfd_create("floor")
    try:
        os.ftruncate(fd, size)
        length = size // parts
        begin = time.perf_counter()
        maps = [mmap.mmap(fd, length, offset=part * length) for part in range(parts)]
        for mapped in maps:
            mapped.close()
        return time.perf_counter() - begin
    finally:
        os.close(fd)


def _copy_on_write(buffer: IOBufferMemoryDescriptor) -> float:
    part = IOSubMemoryDescriptor.withSubRange(buffer, 0, len(buffer), kIODirectionInOut | kIOMemoryMapCopyOnWrite)
    begin = time.perf_counter()
    mapped = part.map()
    took = time.perf_counter() - begin
    mapped.unmap()
    part.free()
    return took


def _copy(buffer: IOBufferMemoryDescriptor) -> float:
    begin = time.perf_counter()
    copy = api.copy(os.getpid(), buffer.getBytesNoCopy(), len(buffer), wired=False, shared=True)
    took = time.perf_counter() - begin
    copy.free()
    return took
