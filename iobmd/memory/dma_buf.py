"""dma-bufs: descriptors of memory that drivers accept from each other.

The kernel's interfaces: udmabuf (linux/udmabuf.h), heaps (linux/dma-heap.h), access by the processor and fdinfo
(linux/dma-buf.h, Documentation/driver-api/dma-buf.rst).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import resource
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd._native.mapping import Mapping
from iobmd.errors import (
    NO_DESCRIPTOR,
    BadArgumentError,
    IOReturnError,
    NoResourcesError,
    NotPrivilegedError,
    UnsupportedError,
)
from iobmd.host import headroom, limits
from iobmd.memory.shmem import create_memfd
from iobmd.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iobmd.memory.shmem import FileExtent

_UDMABUF_CREATE_LIST = 0x40087543  # _IOW('u', 0x43, struct udmabuf_create_list)
_UDMABUF_CLOEXEC = 1
_DMA_BUF_SYNC = 0x40086200  # _IOW('b', 0, struct dma_buf_sync)
_DMA_HEAP_ALLOC = 0xC0184800  # _IOWR('H', 0, struct dma_heap_allocation_data)

READ, WRITE = 1, 2
"""Accesses by the processor, for `sync`."""
_END = 4

_UDMABUF = "/dev/udmabuf"
_HEAPS = "/dev/dma_heap"
_PARAMETERS = "/sys/module/udmabuf/parameters"
_PROBED = 64  # pages


def export(extents: Sequence[FileExtent]) -> int:
    """Return a new dma-buf of parts of sealed memfds, in this order (udmabuf). It pins their pages until it ends.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: the kernel has no udmabuf. `kIOReturnNotPrivileged`: /dev/udmabuf is not accessible.
        `kIOReturnNoResources`: a limit of udmabuf is exceeded.
    """
    parts = _joined(extents)
    size = sum(length for _fd, _offset, length in parts)
    try:
        return _create(parts, size)
    except IOReturnError:
        raise
    except OSError as error:
        raise limits.from_oserror(error, f"cannot make a dma-buf of {format_size(size)}", size) from None


def _create(parts: Sequence[tuple[int, int, int]], size: int) -> int:
    """Return a dma-buf of parts of memfds: descriptor, offset and length of each. Raises as `export`, or OSError."""
    device = _open(_UDMABUF, "this kernel has no udmabuf (CONFIG_UDMABUF)")
    try:
        _require_limit("size_limit_mb", -(-size >> 20), f"{format_size(size)} in a dma-buf")
        _require_limit("list_limit", len(parts), f"{len(parts)} parts of shared memory in a dma-buf")
        listed = b"".join(struct.pack("=IIQQ", fd, 0, offset, length) for fd, offset, length in parts)
        head = struct.pack("=II", _UDMABUF_CLOEXEC, len(parts))
        return int(fcntl.ioctl(device, _UDMABUF_CREATE_LIST, bytearray(head + listed)))
    finally:
        os.close(device)


def _joined(extents: Sequence[FileExtent]) -> list[tuple[int, int, int]]:
    """Return the descriptor, offset and length of each part, with adjacent parts joined."""
    parts: list[tuple[int, int, int]] = []
    for extent in extents:
        if extent.fd is None:
            raise UnsupportedError("guard pages cannot be part of a dma-buf: they have no memory")
        with extent.fd.use() as fd:  # the caller's memory, and so its descriptor, remains open
            if parts and parts[-1][0] == fd and parts[-1][1] + parts[-1][2] == extent.offset:
                parts[-1] = (fd, parts[-1][1], parts[-1][2] + extent.length)
            else:
                parts.append((fd, extent.offset, extent.length))
    return parts


def _open(path: str, absent: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise UnsupportedError(f"{absent}: {path} does not exist", error.errno) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            message = f"{path} is accessible only to its owner and group: run as root, or permit your user to open it"
            raise NotPrivilegedError(message, error.errno) from None
        raise limits.from_oserror(error, f"cannot open {path}") from None


def _require_limit(name: str, wanted: int, what: str) -> None:
    """Check a limit, which the kernel would report only as EINVAL."""
    try:
        limit = int(Path(_PARAMETERS, name).read_text())
    except (OSError, ValueError):  # hidden: the kernel decides
        return
    if wanted > limit:
        raise NoResourcesError(
            f"{what} exceed the limit of udmabuf, {name}={limit}: raise it (as root: echo {wanted} > "
            f"{_PARAMETERS}/{name})"
        )


@functools.cache
def reads_huge_pages_wrongly() -> bool:
    """Return whether drivers that map a udmabuf in the kernel access wrong pages if it has huge pages (Linux 6.12).

    No process can see that, but the kernel that corrected it (6.13) also began to map all pages of a dma-buf at the
    first fault, which is visible. Raises as `export`.
    """
    size = _PROBED * PAGE_SIZE
    with contextlib.ExitStack() as undo:
        memfd = create_memfd(size)
        undo.callback(os.close, memfd)
        dma_buf = _create([(memfd, 0, size)], size)
        undo.callback(os.close, dma_buf)
        mapping = Mapping.view([(dma_buf, 0, size)], 0, True, 0, PAGE_SIZE)
        undo.callback(mapping.close)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for offset in range(0, size, PAGE_SIZE):
            mapping.read(offset, 1)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before >= _PROBED


def allocate(size: int, heap: str) -> int:
    """Return a new dma-buf of zeroed memory from a heap.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: there is no such heap, with the names of those that exist. `kIOReturnNotPrivileged`.
        `kIOReturnNoMemory`, before the kernel's OOM killer would end a process.
    """
    heaps = sorted(path.name for path in Path(_HEAPS).glob("*"))
    if not re.fullmatch(r"[\w,.+-]+", heap) or heap in (".", ".."):
        raise BadArgumentError(f"{heap!r} is not the name of a heap in {_HEAPS}")
    there = f"it has {', '.join(heaps)}" if heaps else "it has none (CONFIG_DMABUF_HEAPS)"
    device = _open(f"{_HEAPS}/{heap}", f"this kernel has no dma-buf heap {heap!r}, {there}")
    try:
        headroom.require(size, swappable=False)
        request = struct.pack("=QIIQ", size, 0, os.O_RDWR | os.O_CLOEXEC, 0)
        return int(struct.unpack("=QIIQ", fcntl.ioctl(device, _DMA_HEAP_ALLOC, request))[1])
    except IOReturnError:
        raise
    except OSError as error:
        raise limits.from_oserror(error, f"the heap {heap!r} cannot allocate {format_size(size)}", size) from None
    finally:
        os.close(device)


def duplicate(fd: int) -> int:
    """Return another descriptor of a dma-buf.

    Another kind of file is refused before it is duplicated, because the server of a FUSE file may never answer the
    close(2) of the duplicate.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: not a dma-buf. `kIOReturnNoResources`: no descriptor is free.
    """
    try:
        is_dma_buf = b"exp_name" in _information(fd)
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise limits.from_oserror(error, "cannot use a dma-buf") from None
        raise BadArgumentError(f"{fd} is not a usable file descriptor: {error}") from None
    if not is_dma_buf:
        raise BadArgumentError(f"the descriptor {fd} does not belong to a dma-buf")
    return duplicate_known(fd)


def duplicate_known(fd: int) -> int:
    """As `duplicate`, of a descriptor that is known to belong to a dma-buf."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except OSError as error:
        raise limits.from_oserror(error, "cannot use a dma-buf") from None


def size_of(fd: int) -> int:
    """Return the size of a dma-buf in bytes."""
    return os.lseek(fd, 0, os.SEEK_END)


def references(fd: int) -> int:
    """Return how many descriptors, mappings and drivers use a dma-buf, `fd` included. Raises as `duplicate`."""
    try:
        return int(_information(fd).get(b"count", b"1"))
    except OSError as error:
        raise limits.from_oserror(error, "cannot count the users of a dma-buf") from None


def _information(fd: int) -> dict[bytes, bytes]:
    """Return the fields of a descriptor, the first of each name.

    The last field of a dma-buf, its name, may contain any bytes, including line breaks, which a process with a
    descriptor has set (DMA_BUF_SET_NAME).
    """
    fields: dict[bytes, bytes] = {}
    for line in Path(f"/proc/self/fdinfo/{fd}").read_bytes().split(b"\n"):
        name, _colon, value = line.partition(b":")
        fields.setdefault(name, value.strip())
    return fields


def begin(fd: int, access: int) -> None:
    """Begin accesses by the processor, `READ` and `WRITE`: it then sees what devices wrote. Raises OSError."""
    fcntl.ioctl(fd, _DMA_BUF_SYNC, struct.pack("=Q", access))


def end(fd: int, access: int) -> None:
    """End accesses by the processor: devices then see what it wrote. Raises OSError."""
    fcntl.ioctl(fd, _DMA_BUF_SYNC, struct.pack("=Q", access | _END))
