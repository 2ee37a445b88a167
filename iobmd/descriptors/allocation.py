"""The choice of the kind of memory for a request, and its allocation."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd.backing.anonymous import AnonymousBacking
from iobmd.backing.lazy import LazyBacking, LazyCopyOf
from iobmd.backing.mapped import MappedBacking
from iobmd.backing.remote import RemoteBacking
from iobmd.backing.remote_private import RemotePrivateBacking
from iobmd.backing.shared import SharedBacking
from iobmd.backing.unmapped import UnmappedBacking
from iobmd.descriptors import slabs
from iobmd.errors import BadArgumentError, CannotWireError, NoMemoryError, NoResourcesError
from iobmd.host import headroom
from iobmd.memory import numa, reuse
from iobmd.memory.mlock import Wiring
from iobmd.memory.shmem import SharedObject
from iobmd.physical import search
from iobmd.physical.pin_attempts import PinAttempts
from iobmd.purgeable.shared import TRAILER
from iobmd.remote.trust import is_trusted
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from iobmd.backing import Contents
    from iobmd.descriptors.options import Request
    from iobmd.physical.search import PhysicalConstraints


def allocate(wanted: Request, contents: Contents | None) -> MappedBacking | RemotePrivateBacking:
    """Allocate and fill the requested memory, if necessary after memory that is kept for reuse was freed.

    Memory of this process that no other process may map is private; all other memory is a shared object, including
    memory with guard pages, which can be mapped again as in XNU. Only `iobmd.allocate` requests private memory in
    another task, because IOKit maps memory of every task. Wired memory is on the requested NUMA node.

    Raises
    ------
    IOReturnError
        As `IOBufferMemoryDescriptor.initWithPhysicalMask`.
    """
    try:
        return _allocate(wanted, contents)
    except (CannotWireError, NoMemoryError, NoResourcesError):
        if not (reuse.trim() + slabs.trim()):
            raise
    return _allocate(wanted, contents)


def _allocate(wanted: Request, contents: Contents | None) -> MappedBacking | RemotePrivateBacking:
    if wanted.wired and wanted.want is None:
        numa.require_room(wanted.capacity)
    backing = _obtain(wanted, contents)
    try:
        if wanted.wired and isinstance(backing, MappedBacking) and numa.wanted() is not None:
            with backing.here(populated=True) as mapping:
                numa.require(mapping.address, backing.size)
        if wanted.progress:
            wanted.progress(wanted.capacity)
    except BaseException:
        backing.close()
        raise
    return backing


def _obtain(wanted: Request, contents: Contents | None) -> MappedBacking | RemotePrivateBacking:
    if wanted.private_there and contents is None and wanted.task is not None and numa.wanted() is None:
        return RemotePrivateBacking(wanted.task, wanted.capacity, wired=wanted.wired, placement=wanted.placement)
    return _make(wanted, contents)


def _make(wanted: Request, contents: Contents | None) -> MappedBacking:
    if isinstance(contents, LazyCopyOf):
        _require_lazy(wanted)
        return _named(LazyBacking(wanted.capacity, contents), wanted)
    if wanted.here and not wanted.shared and not wanted.guard:
        return _named(
            AnonymousBacking(
                wanted.capacity,
                wired=wanted.wired,
                purgeable=wanted.purgeable,
                want=wanted.want,
                contents=contents,
                placement=wanted.placement,
                alignment=wanted.alignment,
                progress=wanted.progress,
            ),
            wanted,
        )
    if wanted.wired or contents:  # wired memory is checked again after the search
        headroom.require(wanted.capacity, swappable=not wanted.wired)
    sealed = wanted.task is not None and not wanted.here and not is_trusted(wanted.task)
    if wanted.want is None:
        size, trailer = round_up(wanted.capacity, PAGE_SIZE), TRAILER if wanted.purgeable else 0
        new = SharedObject.create(size, trailer, wanted.name, sealed=sealed, populated=wanted.wired)
        return _show(new, wanted, contents)
    attempts = PinAttempts()
    for _attempt in attempts:
        backing = _show(search.obtain_shared(wanted.want, attempts, wanted.name, sealed=sealed), wanted, contents)
        try:
            if _is_as_wanted(backing, wanted.want):
                return backing
            attempts.failed(backing.runs)
        except BaseException:
            backing.close()
            raise
        backing.close()
    raise search.kept_moving(wanted.want, attempts)


def _require_lazy(wanted: Request) -> None:
    """Raise `kIOReturnBadArgument` unless the memory can be that of a lazy copy."""
    kinds = {
        "wired": wanted.wired,
        "purgeable": wanted.purgeable,
        "shared": wanted.shared,
        "in another task, or in none": not wanted.here,
    }
    if kind := next((kind for kind, is_wanted in kinds.items() if is_wanted), None):
        raise BadArgumentError(
            f"a lazy copy cannot be {kind}: only pageable private memory of this process can be fetched later "
            "(kIOMemoryPageable, wired=False)"
        )


def _named(backing: AnonymousBacking, wanted: Request) -> AnonymousBacking:
    """Name private memory by its tag, if the kernel supports names for it."""
    if wanted.tag:
        backing.without_reuse()
        with contextlib.suppress(OSError):
            mman.name(backing.address, backing.size, wanted.name.encode())
    return backing


def _show(shared: SharedObject, wanted: Request, contents: Contents | None) -> SharedBacking:
    """Map a new object in the requested task."""
    wired, purgeable, task = wanted.wired, wanted.purgeable, wanted.task
    if task is None:
        return UnmappedBacking(shared, wired=wired, purgeable=purgeable, contents=contents)
    guard, placement = wanted.guard, wanted.placement
    if wanted.here:
        return SharedBacking(
            shared,
            wired=wired,
            purgeable=purgeable,
            contents=contents,
            guard=guard,
            placement=placement,
            alignment=wanted.alignment,
        )
    return RemoteBacking(
        shared, task, wired=wired, purgeable=purgeable, contents=contents, guard=guard, placement=placement
    )


def _is_as_wanted(backing: SharedBacking, want: PhysicalConstraints) -> bool:
    if backing.wiring is not Wiring.PINNED:
        backing.pin()  # raises the error with the reason
    return want.accepts(backing.runs) if backing.runs else backing.huge_bytes() >= want.size
