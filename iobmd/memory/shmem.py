"""Shared objects: memory with a descriptor, which can be mapped by several processes and at several addresses.

There are three kinds: a memfd, a file in a detached tmpfs mount with huge pages (CAP_SYS_ADMIN, if the host's
settings restrict memfds to small pages), and hugetlb pages. All mappings of a page have the same frame.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import os
from typing import TYPE_CHECKING, NamedTuple

from iobmd._internal import process_local
from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.errors import BadArgumentError, IOReturnError, NoResourcesError, NotPermittedError, UnsupportedError
from iobmd.host import limits
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from iobmd.device.region import Region

NO_FD = -1
"""The descriptor number of inaccessible pages."""

NAME = "iobmd"
"""The name of objects without a tag in /proc/PID/maps."""

# linux/fcntl.h: without them a process that has the descriptor could truncate the object while others use it, or, by
# F_SEAL_FUTURE_WRITE, prevent its owner from mapping it again.
_F_ADD_SEALS, _F_GET_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1034, 0x1, 0x2, 0x4
_READ_ONLY = {0x8: "F_SEAL_WRITE", 0x10: "F_SEAL_FUTURE_WRITE"}


class Extent(NamedTuple):
    """A part of a shared object: its offset in the object and its length, in bytes."""

    offset: int
    length: int


class FileExtent(NamedTuple):
    """Pages of a shared object, to be mapped contiguously with those of other extents; sizes in bytes."""

    fd: process_local.Fd | None
    """A descriptor of the object, which remains open as long as its owner. None: inaccessible pages."""
    offset: int
    length: int
    page: int
    """Page size; mappings are multiples of it."""
    alignment: int
    """Alignment of its first address, if that is not fixed."""
    device: Region | None = None
    """The region of a device to which they belong; None: they are main memory."""


class SharedObject:
    """Memory that consists of parts of an object, in any order. It owns a descriptor of the object.

    Parameters
    ----------
    fd : int
        The descriptor.
    extents : sequence of Extent
        The parts, in whole pages.
    alignment : int
        Alignment of the addresses at which it is mapped.
    page : int
        Page size; mappings are multiples of it.
    immovable : bool
        Whether the pages never move, even without a pin.
    collapses : bool
        Whether it has no huge pages unless they are requested (`populate`).
    """

    def __init__(
        self,
        fd: int,
        extents: Sequence[Extent],
        *,
        alignment: int = PAGE_SIZE,
        page: int = PAGE_SIZE,
        immovable: bool = False,
        collapses: bool = False,
    ) -> None:
        self.extents = tuple(extents)
        self.size = sum(extent.length for extent in extents)
        self.alignment = alignment
        self.page = page
        self.immovable = immovable
        self.collapses = collapses
        self.fd = process_local.Fd(fd, "this shared memory")  # last: until then the caller owns it

    @classmethod
    def create(
        cls, size: int, trailer: int = 0, name: str = NAME, *, sealed: bool = False, populated: bool = False
    ) -> SharedObject:
        """Create a zeroed object of `size` bytes (whole pages), followed by `trailer` bytes.

        With `sealed` it cannot be truncated. Other objects cannot be truncated either, unless they receive huge pages
        one by one as they are touched. An object that is `populated` now can be a memfd and nevertheless have huge
        pages (Linux 6.1).

        Raises
        ------
        IOReturnError
            `kIOReturnNoResources`: no descriptor is free. `kIOReturnNoMemory`.
        """
        try:
            collapses = populated and size >= HUGE_PAGE_SIZE and can_collapse()
            fd = -1 if sealed or trailer or collapses or size < HUGE_PAGE_SIZE else create_huge(size, name)
            fd = create_memfd(size + trailer, name) if fd < 0 else fd
            alignment = HUGE_PAGE_SIZE if collapses else PAGE_SIZE
            return cls(fd, [Extent(0, size)], alignment=alignment, collapses=collapses)
        except OSError as error:
            raise limits.from_oserror(error, f"cannot create a shared object of {format_size(size)}", size) from None

    def cut(self, offset: int, size: int) -> list[FileExtent]:
        """Return the parts with the `size` bytes at `offset`; raise `kIOReturnUnsupported` inside a large page."""
        if offset % self.page or size % self.page:
            raise _within_a_page(self.page)
        found = []
        for extent in self.extents:
            if offset < extent.length and size:
                length = min(extent.length - offset, size)
                found.append(FileExtent(self.fd, extent.offset + offset, length, self.page, self.alignment))
                size, offset = size - length, 0
            else:
                offset -= extent.length
        return found

    def map(self, guard: int = 0, alignment: int = PAGE_SIZE) -> Mapping:
        """Map all of it in this process. Parameters and errors are those of `show`."""
        return show(self.cut(0, self.size), guard=guard, alignment=alignment)

    def close(self) -> None:
        """Close the descriptor at the end of its last use; the object is freed with its last user. Idempotent."""
        self.fd.close()


def show(
    extents: Sequence[FileExtent],
    at: int = 0,
    *,
    writable: bool = True,
    guard: int = 0,
    alignment: int = PAGE_SIZE,
    overwrite: bool = False,
) -> Mapping:
    """Map extents contiguously in this process.

    Parameters
    ----------
    extents : sequence of FileExtent
        Parts of one or more objects.
    at : int
        The address, at which nothing may be mapped; 0: any address.
    writable : bool
        Whether the mapping is writable.
    guard : int
        Inaccessible bytes on each side.
    alignment : int
        Alignment of any other address, at least that of the pages.
    overwrite : bool
        Whether the range at `at` is reserved address space, which is replaced.

    Raises
    ------
    IOReturnError
        `kIOReturnNoResources`: something is mapped at `at`. `kIOReturnBadArgument`: the range is not reserved.
        `kIOReturnNoMemory`: no address space.
        `kIOReturnUnsupported`: large pages at an unaligned address. `kIOReturnNotPermitted`: another process has
        sealed an object against writing.
    """
    alignment, size = max(alignment, alignment_of(extents)), sum(extent.length for extent in extents)
    with _numbered(extents) as pieces:
        try:
            return Mapping.view(pieces, at, writable, guard, alignment, overwrite, _is_device(extents))
        except FileExistsError as error:
            if overwrite:
                raise not_reserved(f"cannot map {format_size(size)} at {at:#x}", error) from None
            message = f"{at:#x} to {at + size:#x} is not free: something is mapped there"
            raise NoResourcesError(message, error.errno or 0) from None
        except OSError as error:
            sealed = writable and sealed_against_writing(number for number, _offset, _length in pieces)
            refused = sealed or _refused(extents, error)
            raise refused or limits.from_oserror(error, f"cannot map {format_size(size)}", size) from None


def accessible(extents: Sequence[FileExtent], address: int) -> Iterator[tuple[int, int]]:
    """Yield the address and the size of consecutive extents, mapped from an address on, between inaccessible ones."""
    for is_file, run in itertools.groupby(extents, lambda extent: extent.fd is not None):
        size = sum(extent.length for extent in run)
        if is_file:
            yield address, size
        address += size


def show_in(mapping: Mapping, extents: Sequence[FileExtent]) -> None:
    """Map extents at the addresses of `mapping`, replacing its memory. Raises as `show`."""
    alignment_of(extents)
    with _numbered(extents) as pieces:
        try:
            mapping.redirect(pieces, _is_device(extents))
        except OSError as error:
            sealed = mapping.writable and sealed_against_writing(number for number, _offset, _length in pieces)
            refused = sealed or _refused(extents, error)
            raise refused or limits.from_oserror(error, "cannot redirect a mapping") from None


def _is_device(extents: Sequence[FileExtent]) -> bool:
    return any(extent.device for extent in extents)


def _refused(extents: Sequence[FileExtent], error: OSError) -> IOReturnError | None:
    """Return the error for device memory that the kernel does not map."""
    refusals = (extent.device.refusal(error) for extent in extents if extent.device)
    return next((refusal for refusal in refusals if refusal), None)


@contextlib.contextmanager
def _numbered(extents: Sequence[FileExtent]) -> Iterator[list[tuple[int, int, int]]]:
    """Keep the descriptors of extents open inside a `with` block, and yield (number, offset, length) of each."""
    with contextlib.ExitStack() as uses:
        numbers: dict[process_local.Fd | None, int] = {None: NO_FD}
        numbers |= {fd: uses.enter_context(fd.use()) for fd in {extent.fd for extent in extents if extent.fd}}
        yield [(numbers[extent.fd], extent.offset, extent.length) for extent in extents]


def alignment_of(extents: Sequence[FileExtent]) -> int:
    """Return the required alignment of the first extent.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: large pages would not be aligned.
    """
    place = 0
    for extent in extents:
        if place % extent.page:
            raise _within_a_page(extent.page)
        place += extent.length
    return max(extent.alignment for extent in extents)


def _within_a_page(page: int) -> UnsupportedError:
    message = f"this memory has pages of {format_size(page)}, and can only be mapped in whole pages"
    return UnsupportedError(message)


def reopen(fd: int) -> int:
    """Return a descriptor of the same object with a separate open file description, to which locks belong."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def create_memfd(size: int, name: str = NAME) -> int:
    """Return a memfd of `size` bytes whose size is sealed. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """Seal the size of a memfd, so that no process can truncate it, and its seals. Raises OSError."""
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)


def why_unsafe(fd: int) -> str:
    """Return how a process with a writable mapping could free the memory while others use it; "" if it cannot."""
    if mman.hugetlb_page(fd):
        # After a hole was punched, the page is allocated from the pool again; if the pool is empty, the access raises
        # SIGBUS.
        return "free its hugetlb pages while they are in use"
    return "" if has_sealed_size(fd) else "truncate it, because its size is not sealed"


def has_sealed_size(fd: int) -> bool:
    """Return whether no process can truncate an object."""
    return bool((seals(fd) or 0) & _F_SEAL_SHRINK)


def read_only_seal(fd: int) -> str:
    """Return the name of the seal that prevents writing to a file and mapping it writable; "" if there is none."""
    found = seals(fd) or 0
    return next((name for seal, name in _READ_ONLY.items() if found & seal), "")


def sealed_against_writing(fds: Iterable[int]) -> IOReturnError | None:
    """Return the error if one of several files is sealed against writing; None if none is."""
    seal = next(filter(None, map(read_only_seal, fds)), "")
    if not seal:
        return None
    message = (
        f"the memory can no longer be mapped writable or purged: another process has sealed it ({seal}), "
        "which cannot be undone; map it with kIOMapReadOnly, or make a copy"
    )
    return NotPermittedError(message, errno.EPERM)


def seals(fd: int) -> int | None:
    """Return the seals of a file; None, without involving its server, unless it is in an in-memory file system."""
    try:
        return fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError:
        return None


def not_reserved(where: str, error: OSError) -> BadArgumentError:
    """Return the error for memory that is to replace address space which is not reserved."""
    return BadArgumentError(
        f"{where}: the range is not reserved at {error.filename}; reserve it by a private anonymous mapping without "
        "access (mmap with PROT_NONE)",
        error.errno or 0,
    )


_numbers = itertools.count()
# Huge pages are used only within the size of an object, and as far as they are available.
_huge = process_local.LazyFd(lambda: mman.mount_tmpfs({"huge": "within_size", "size": "0", "nr_inodes": "0"}))


@functools.cache
def can_collapse() -> bool:
    """Return whether the kernel replaces small pages of a memfd by huge pages on request."""
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, HUGE_PAGE_SIZE)
        mapping = Mapping.view([(fd, 0, HUGE_PAGE_SIZE)], 0, True, 0, HUGE_PAGE_SIZE)
        try:
            mman.populate(mapping.address, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE)
            mman.advise(mapping.address, HUGE_PAGE_SIZE, mman.MADV_COLLAPSE)
        finally:
            mapping.close()
    except OSError as error:
        return error.errno != errno.EINVAL  # otherwise no huge page is free
    finally:
        os.close(fd)
    return True


def create_huge(size: int, name: str = NAME) -> int:
    """Return a file of `size` bytes in huge pages, as far as available; -1 if it cannot be created.

    Such a file cannot be sealed: any process with a descriptor of it may truncate it.
    """
    try:
        name = f"{name}-{next(_numbers)}"
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=_huge.open())
    except OSError:
        return -1
    try:
        os.unlink(name, dir_fd=_huge.open())
        os.fchmod(fd, 0o666)  # it has no path: only processes with a descriptor may reopen it
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd
