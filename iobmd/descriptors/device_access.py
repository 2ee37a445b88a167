"""Memory that no device may access (`kIOMemoryHostOnly`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd.descriptors.composite_memory import CompositeBacking
from iobmd.descriptors.options import HOST_ONLY
from iobmd.errors import NotPermittedError

if TYPE_CHECKING:
    from iobmd.descriptors.descriptor import IOMemoryDescriptor
    from iobmd.descriptors.ownership import MemoryOwner


def restrict(owner: MemoryOwner, options: int) -> None:
    """Apply the options of new memory, or of a part or concatenation, to its owner."""
    if options & HOST_ONLY:
        owner.host_only = True


def require_device_access(descriptor: IOMemoryDescriptor) -> None:
    """Raise `kIOReturnNotPermitted` for a descriptor of memory that no device may access, or that contains some."""
    if _is_host_only(descriptor._usable_memory()):
        message = f"{descriptor!r} contains memory that was created with kIOMemoryHostOnly: no device may access it"
        raise NotPermittedError(message)


def _is_host_only(owner: MemoryOwner) -> bool:
    backing = owner.require_backing()
    parts = backing.parts if isinstance(backing, CompositeBacking) else ()
    return owner.host_only or any(_is_host_only(part.owner) for part in parts)
