"""The options of DriverKit's memory classes, converted to those of IOKit."""

from __future__ import annotations

from iobmd._internal.arguments import check_integers
from iobmd.constants import IOMapOptions, IOMemoryCreateOptions, IOMemoryMapOptions, IOOptionBits
from iobmd.errors import BadArgumentError

_DIRECTION = int(IOMemoryCreateOptions.kIOMemoryDirectionInOut)
_NO_COPY = int(IOMemoryCreateOptions.kIOMemoryDisableCopyOnWrite)

_FIXED, _READ_ONLY = int(IOMemoryMapOptions.kIOMemoryMapFixedAddress), int(IOMemoryMapOptions.kIOMemoryMapReadOnly)
_GUARDS = {
    # XNU's default is a small guard. Here there is no guard, because private memory has only its own addresses.
    int(IOMemoryMapOptions.kIOMemoryMapGuardedDefault): 0,
    int(IOMemoryMapOptions.kIOMemoryMapGuardedNone): 0,
    int(IOMemoryMapOptions.kIOMemoryMapGuardedSmall): int(IOMapOptions.kIOMapGuardedSmall),
    int(IOMemoryMapOptions.kIOMemoryMapGuardedLarge): int(IOMapOptions.kIOMapGuardedLarge),
}
_GUARD_MASK = int(IOMemoryMapOptions.kIOMemoryMapGuardedMask)
_CACHES = {
    int(IOMemoryMapOptions.kIOMemoryMapCacheModeDefault): IOMapOptions.kIOMapDefaultCache,
    int(IOMemoryMapOptions.kIOMemoryMapCacheModeInhibit): IOMapOptions.kIOMapInhibitCache,
    int(IOMemoryMapOptions.kIOMemoryMapCacheModeCopyback): IOMapOptions.kIOMapCopybackCache,
    int(IOMemoryMapOptions.kIOMemoryMapCacheModeWriteThrough): IOMapOptions.kIOMapWriteThruCache,
    int(IOMemoryMapOptions.kIOMemoryMapCacheModeRealTime): IOMapOptions.kIOMapRealTimeCache,
}


def map_options(options: int, direction: int) -> int:
    """Return the `IOMapOptions` for those of `CreateMapping`, and the direction of the descriptor.

    As in DriverKit, a descriptor whose direction is only out is mapped read-only.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: unknown or contradictory options.
    """
    check_integers(options=options)
    guard, cache = options & _GUARD_MASK, options & ~(_FIXED | _READ_ONLY | _GUARD_MASK)
    if guard not in _GUARDS or cache not in _CACHES:
        raise BadArgumentError(f"options {int(options):#x} are not those of CreateMapping")
    read_only = options & _READ_ONLY or direction == IOOptionBits.kIODirectionOut
    found = int(_CACHES[cache]) | (int(IOMapOptions.kIOMapReadOnly) if read_only else 0)
    # As in DriverKit, maps at a fixed address have no guards.
    return found if options & _FIXED else found | _GUARDS[guard] | int(IOMapOptions.kIOMapAnywhere)


def create_options(options: int) -> int:
    """Return the `IOOptionBits` for `IOMemoryCreateOptions`: copy-on-write, unless that is disabled.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: unknown options.
    """
    check_integers(options=options)
    if options & ~(_DIRECTION | _NO_COPY):
        raise BadArgumentError(f"options {int(options):#x} are not those of CreateMemoryDescriptorFromClient")
    copy = 0 if options & _NO_COPY else int(IOOptionBits.kIOMemoryMapCopyOnWrite)
    return int(options) & _DIRECTION | copy
