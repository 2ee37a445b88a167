"""Registrations of memory with RDMA devices, which prevent the release of its handles (`iobmd.rdma`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

from iobmd._internal.weak_registry import WeakRegistry
from iobmd.errors import BusyError
from iobmd.units import format_count

if TYPE_CHECKING:
    from iobmd.descriptors.ownership import MemoryOwner


class Registration(Protocol):
    """A registration of memory with a device, which pins the memory and accesses it by itself."""

    @property
    def is_open(self) -> bool:
        """Whether the device may access the memory for this process."""


_by_owner: WeakKeyDictionary[MemoryOwner, WeakRegistry[Registration]] = WeakKeyDictionary()
"""Here and not in the owners, because few have any."""


def add(owner: MemoryOwner, registration: Registration) -> None:
    """Register a use of an owner's memory, also with the owners of its parts, until it is no longer open."""
    for one in {owner, *owner.origins()}:
        _by_owner.setdefault(one, WeakRegistry()).add(registration)


def require_none(owner: MemoryOwner) -> None:
    """Raise `kIOReturnBusy` while a device may access an owner's memory."""
    if not _by_owner or (found := _by_owner.get(owner)) is None:
        return
    if count := sum(one.is_open for one in found.all()):
        regions = format_count(count, "memory region")
        raise BusyError(f"{owner!r} is still registered for RDMA ({regions}): call close() of each first")
