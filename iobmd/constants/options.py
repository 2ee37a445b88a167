"""Options of descriptors and maps, and states of purgeable memory, under their IOKit names and values."""

from enum import KEEP, IntEnum, IntFlag


class IOOptionBits(IntFlag, boundary=KEEP):
    """The options word of descriptors (IOBufferMemoryDescriptor.h, IOMemoryDescriptor.h)."""

    kIODirectionNone = 0
    """No transfer is planned."""
    kIODirectionIn = 0x1
    """A device writes the memory."""
    kIODirectionOut = 0x2
    """A device reads the memory."""
    kIODirectionInOut = 0x3
    """A device reads and writes the memory."""
    kIODirectionOutIn = 0x3
    """The same as `kIODirectionInOut`."""
    kIOMemoryUnshared = 0
    """No other process maps the memory."""
    kIOMapDefaultCache = 0
    """The mode that suits the memory: copyback for main memory."""
    kIOMemoryPhysicallyContiguous = 0x10
    """The physical addresses are contiguous."""
    kIOMemoryPageable = 0x20
    """The memory is pageable, and pinned only between `prepare` and `complete`. Without it, buffers are wired."""
    kIOMemoryPurgeable = 0x40
    """`setPurgeable` is permitted; pageable memory only."""
    kIOMemoryHostPhysicallyContiguous = 0x80
    """As `kIOMemoryPhysicallyContiguous`."""
    kIOMapInhibitCache = 0x100
    """No caching. For main memory, reads and writes by the descriptor flush the cache lines."""
    kIOMapWriteThruCache = 0x200
    """Writes by the descriptor are also written back to memory."""
    kIOMapCopybackCache = 0x300
    """Caching without further measures."""
    kIOMapWriteCombineCache = 0x400
    """Writes by the descriptor bypass the caches, and are combined."""
    kIOMemoryMapperNone = 0x800
    """Accepted, without effect."""
    kIOMemoryHostOnly = 0x1000
    """No device may access the memory: `IOMapper` refuses it."""
    kIOMemoryKernelUserShared = 0x10000
    """Other processes can map the memory, and forked children share it."""
    kIOMemoryMapCopyOnWrite = 0x20000
    """Each map is a copy, of the bytes at the time of its creation."""
    kIOMemoryRemote = 0x40000
    """The addresses are those of another bus, and belong to no task."""
    kIOMemorySharingTypeMask = 0xF0000
    """The bits that state who maps the memory."""
    kIOMemoryThreadSafe = 0x100000
    """Accepted, without effect: descriptors are always thread-safe."""
    kIOMemoryClearEncrypt = 0x200000
    """Refused: Linux encrypts swap as a whole or not at all."""
    kIOMemoryUseReserve = 0x800000
    """Refused: Linux sets no memory aside for drivers."""


class IOMapOptions(IntFlag, boundary=KEEP):
    """Options of a mapping (IOMapTypes.h)."""

    kIOMapDefaultCache = 0
    """The mode that suits the memory: copyback for main memory."""
    kIOMapAnywhere = 0x1
    """At any address."""
    kIOMapInhibitCache = 0x100
    """Without caching: memory of devices."""
    kIOMapWriteThruCache = 0x200
    """Write-through; refused, because Linux does not offer it to user programs."""
    kIOMapCopybackCache = 0x300
    """With caching: main memory."""
    kIOMapWriteCombineCache = 0x400
    """Write-combining: memory of devices whose driver or bus permits it."""
    kIOMapCopybackInnerCache = 0x500
    """A mode of Arm processors; refused."""
    kIOMapPostedWrite = 0x600
    """A mode of Arm processors; refused."""
    kIOMapRealTimeCache = 0x700
    """A mode of Arm processors; refused."""
    kIOMapPostedReordered = 0x800
    """A mode of Arm processors; refused."""
    kIOMapPostedCombinedReordered = 0x900
    """A mode of Arm processors; refused."""
    kIOMapCacheMask = 0xF00
    """The bits of the cache mode, a value of `IOCacheMode`."""
    kIOMapUserOptionsMask = 0xFFF
    """The bits of IOConnectMapMemory."""
    kIOMapReadOnly = 0x1000
    """The map can only be read."""
    kIOMapStatic = 0x01000000
    """Refused: describe an existing mapping with `withAddressRange`."""
    kIOMapReference = 0x02000000
    """Refer to an existing map that satisfies the request, or fail with `kIOReturnNotReady`."""
    kIOMapUnique = 0x04000000
    """At addresses that no other map has."""
    kIOMapPrefault = 0x10000000
    """Populate all pages at once."""
    kIOMapOverwrite = 0x20000000
    """Replace address space that this process has reserved at the address."""
    kIOMapGuardedSmall = 0x40000000
    """With an inaccessible page on each side."""
    kIOMapGuardedLarge = 0x80000000
    """With inaccessible 64 KiB on each side."""
    kIOMapGuardedMask = 0xC0000000
    """The bits of the guards."""


class IOPurgeable(IntFlag, boundary=KEEP):
    """States of purgeable memory and their modifiers (IOMemoryDescriptor.h, vm_purgable.h)."""

    kIOMemoryPurgeableVolatileGroup0 = 0
    """Group 0, which is purged first."""
    kIOMemoryPurgeableVolatileBehaviorFifo = 0
    """Within its group, memory is purged in the order in which it became volatile."""
    kIOMemoryPurgeableVolatileOrderingNormal = 0
    """Memory is purged in the order of the groups."""
    kIOMemoryPurgeableKeepCurrent = 1
    """Only return the state."""
    kIOMemoryPurgeableNonVolatile = 2
    """The contents are retained."""
    kIOMemoryPurgeableVolatile = 3
    """The system may reclaim the memory when memory is short, all or nothing."""
    kIOMemoryPurgeableEmpty = 4
    """The contents are dropped, or were lost: every byte reads zero until it is written to."""
    kIOMemoryPurgeableVolatileOrderingObsolete = 0x20
    """Purge before all other memory; private memory is dropped immediately."""
    kIOMemoryPurgeableVolatileBehaviorLifo = 0x40
    """Within its group, memory that became volatile last is purged first, and after FIFO memory."""
    kIOMemoryPurgeableVolatileGroup1 = 0x100
    """Group 1."""
    kIOMemoryPurgeableVolatileGroup2 = 0x200
    """Group 2."""
    kIOMemoryPurgeableVolatileGroup3 = 0x300
    """Group 3."""
    kIOMemoryPurgeableVolatileGroup4 = 0x400
    """Group 4."""
    kIOMemoryPurgeableVolatileGroup5 = 0x500
    """Group 5."""
    kIOMemoryPurgeableVolatileGroup6 = 0x600
    """Group 6."""
    kIOMemoryPurgeableVolatileGroup7 = 0x700
    """Group 7, which is purged last."""
    kIOMemoryPurgeableFaultOnAccess = 0x2000
    """With Volatile or Empty: accesses fail until the state is set again."""


class IODirection(IntFlag, boundary=KEEP):
    """Flags of `prepare` and `complete`, in addition to the directions of `IOOptionBits` (IOMemoryDescriptor.h).

    `kIODirectionPrepareNoZeroFill` is the name of `kIODirectionPrepareReserved1` in XNU itself (IOKitKeysPrivate.h).
    """

    kIODirectionPrepareToPhys32 = 0x4
    """Fail if the memory is above 4 GiB."""
    kIODirectionPrepareNoFault = 0x8
    """Fail instead of faulting in pages."""
    kIODirectionPrepareReserved1 = 0x10
    """Permits pages that are not zeroed; without effect."""
    kIODirectionPrepareNoZeroFill = 0x10
    """The same."""
    kIODirectionPrepareNonCoherent = 0x20
    """Write the cache lines of the memory back and drop them."""
    kIODirectionCompleteWithError = 0x40
    """The transfer failed; without effect."""
    kIODirectionCompleteWithDataValid = 0x80
    """The transfer filled the memory; without effect."""


class IOMemoryOperation(IntEnum):
    """Operations of `performOperation` (IOMemoryDescriptor.h)."""

    kIOMemoryIncoherentIOFlush = 1
    """Write cache lines back and invalidate them, before data that a device wrote is read."""
    kIOMemoryIncoherentIOStore = 2
    """Write cache lines back, before a device reads the memory."""
    kIOMemoryClearEncrypted = 50
    """Refused: Linux does not encrypt single pages."""
    kIOMemorySetEncrypted = 51
    """Refused: Linux does not encrypt single pages."""


kIODirectionNone = IOOptionBits.kIODirectionNone
kIODirectionIn = IOOptionBits.kIODirectionIn
kIODirectionOut = IOOptionBits.kIODirectionOut
kIODirectionInOut = IOOptionBits.kIODirectionInOut
kIODirectionOutIn = IOOptionBits.kIODirectionOutIn
kIOMemoryUnshared = IOOptionBits.kIOMemoryUnshared
kIOMemoryPhysicallyContiguous = IOOptionBits.kIOMemoryPhysicallyContiguous
kIOMemoryPageable = IOOptionBits.kIOMemoryPageable
kIOMemoryPurgeable = IOOptionBits.kIOMemoryPurgeable
kIOMemoryHostPhysicallyContiguous = IOOptionBits.kIOMemoryHostPhysicallyContiguous
kIOMemoryMapperNone = IOOptionBits.kIOMemoryMapperNone
kIOMemoryHostOnly = IOOptionBits.kIOMemoryHostOnly
kIOMemoryKernelUserShared = IOOptionBits.kIOMemoryKernelUserShared
kIOMemoryMapCopyOnWrite = IOOptionBits.kIOMemoryMapCopyOnWrite
kIOMemoryRemote = IOOptionBits.kIOMemoryRemote
kIOMemorySharingTypeMask = IOOptionBits.kIOMemorySharingTypeMask
kIOMemoryThreadSafe = IOOptionBits.kIOMemoryThreadSafe
kIOMemoryClearEncrypt = IOOptionBits.kIOMemoryClearEncrypt
kIOMemoryUseReserve = IOOptionBits.kIOMemoryUseReserve
kIOMapDefaultCache = IOMapOptions.kIOMapDefaultCache
kIOMapAnywhere = IOMapOptions.kIOMapAnywhere
kIOMapInhibitCache = IOMapOptions.kIOMapInhibitCache
kIOMapWriteThruCache = IOMapOptions.kIOMapWriteThruCache
kIOMapCopybackCache = IOMapOptions.kIOMapCopybackCache
kIOMapWriteCombineCache = IOMapOptions.kIOMapWriteCombineCache
kIOMapCopybackInnerCache = IOMapOptions.kIOMapCopybackInnerCache
kIOMapPostedWrite = IOMapOptions.kIOMapPostedWrite
kIOMapRealTimeCache = IOMapOptions.kIOMapRealTimeCache
kIOMapPostedReordered = IOMapOptions.kIOMapPostedReordered
kIOMapPostedCombinedReordered = IOMapOptions.kIOMapPostedCombinedReordered
kIOMapCacheMask = IOMapOptions.kIOMapCacheMask
kIOMapUserOptionsMask = IOMapOptions.kIOMapUserOptionsMask
kIOMapReadOnly = IOMapOptions.kIOMapReadOnly
kIOMapStatic = IOMapOptions.kIOMapStatic
kIOMapReference = IOMapOptions.kIOMapReference
kIOMapUnique = IOMapOptions.kIOMapUnique
kIOMapPrefault = IOMapOptions.kIOMapPrefault
kIOMapOverwrite = IOMapOptions.kIOMapOverwrite
kIOMapGuardedSmall = IOMapOptions.kIOMapGuardedSmall
kIOMapGuardedLarge = IOMapOptions.kIOMapGuardedLarge
kIOMapGuardedMask = IOMapOptions.kIOMapGuardedMask
kIOMemoryPurgeableVolatileGroup0 = IOPurgeable.kIOMemoryPurgeableVolatileGroup0
kIOMemoryPurgeableVolatileBehaviorFifo = IOPurgeable.kIOMemoryPurgeableVolatileBehaviorFifo
kIOMemoryPurgeableVolatileOrderingNormal = IOPurgeable.kIOMemoryPurgeableVolatileOrderingNormal
kIOMemoryPurgeableKeepCurrent = IOPurgeable.kIOMemoryPurgeableKeepCurrent
kIOMemoryPurgeableNonVolatile = IOPurgeable.kIOMemoryPurgeableNonVolatile
kIOMemoryPurgeableVolatile = IOPurgeable.kIOMemoryPurgeableVolatile
kIOMemoryPurgeableEmpty = IOPurgeable.kIOMemoryPurgeableEmpty
kIOMemoryPurgeableVolatileOrderingObsolete = IOPurgeable.kIOMemoryPurgeableVolatileOrderingObsolete
kIOMemoryPurgeableVolatileBehaviorLifo = IOPurgeable.kIOMemoryPurgeableVolatileBehaviorLifo
kIOMemoryPurgeableVolatileGroup1 = IOPurgeable.kIOMemoryPurgeableVolatileGroup1
kIOMemoryPurgeableVolatileGroup2 = IOPurgeable.kIOMemoryPurgeableVolatileGroup2
kIOMemoryPurgeableVolatileGroup3 = IOPurgeable.kIOMemoryPurgeableVolatileGroup3
kIOMemoryPurgeableVolatileGroup4 = IOPurgeable.kIOMemoryPurgeableVolatileGroup4
kIOMemoryPurgeableVolatileGroup5 = IOPurgeable.kIOMemoryPurgeableVolatileGroup5
kIOMemoryPurgeableVolatileGroup6 = IOPurgeable.kIOMemoryPurgeableVolatileGroup6
kIOMemoryPurgeableVolatileGroup7 = IOPurgeable.kIOMemoryPurgeableVolatileGroup7
kIOMemoryPurgeableFaultOnAccess = IOPurgeable.kIOMemoryPurgeableFaultOnAccess
kIODirectionPrepareToPhys32 = IODirection.kIODirectionPrepareToPhys32
kIODirectionPrepareNoFault = IODirection.kIODirectionPrepareNoFault
kIODirectionPrepareReserved1 = IODirection.kIODirectionPrepareReserved1
kIODirectionPrepareNoZeroFill = IODirection.kIODirectionPrepareNoZeroFill
kIODirectionPrepareNonCoherent = IODirection.kIODirectionPrepareNonCoherent
kIODirectionCompleteWithError = IODirection.kIODirectionCompleteWithError
kIODirectionCompleteWithDataValid = IODirection.kIODirectionCompleteWithDataValid
kIOMemoryIncoherentIOFlush = IOMemoryOperation.kIOMemoryIncoherentIOFlush
kIOMemoryIncoherentIOStore = IOMemoryOperation.kIOMemoryIncoherentIOStore
kIOMemoryClearEncrypted = IOMemoryOperation.kIOMemoryClearEncrypted
kIOMemorySetEncrypted = IOMemoryOperation.kIOMemorySetEncrypted
