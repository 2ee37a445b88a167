"""Options of descriptors and maps, and states of purgeable memory, under their IOKit names and values."""

from enum import KEEP, IntEnum, IntFlag


class IOOptionBits(IntFlag, boundary=KEEP):
    """The options word of descriptors (IOBufferMemoryDescriptor.h, IOMemoryDescriptor.h)."""

    kIODirectionNone = 0
    kIODirectionIn = 0x1
    kIODirectionOut = 0x2
    kIODirectionInOut = 0x3
    kIODirectionOutIn = 0x3
    kIOMemoryUnshared = 0
    kIOMapDefaultCache = 0
    kIOMemoryPhysicallyContiguous = 0x10
    kIOMemoryPageable = 0x20
    kIOMemoryPurgeable = 0x40
    kIOMemoryHostPhysicallyContiguous = 0x80
    kIOMapInhibitCache = 0x100
    kIOMapWriteThruCache = 0x200
    kIOMapCopybackCache = 0x300
    kIOMapWriteCombineCache = 0x400
    kIOMemoryMapperNone = 0x800
    kIOMemoryHostOnly = 0x1000
    kIOMemoryKernelUserShared = 0x10000
    kIOMemoryMapCopyOnWrite = 0x20000
    kIOMemoryRemote = 0x40000
    kIOMemorySharingTypeMask = 0xF0000
    kIOMemoryThreadSafe = 0x100000
    kIOMemoryClearEncrypt = 0x200000
    kIOMemoryUseReserve = 0x800000


class IOMapOptions(IntFlag, boundary=KEEP):
    """Options of a mapping (IOMapTypes.h)."""

    kIOMapDefaultCache = 0
    kIOMapAnywhere = 0x1
    kIOMapInhibitCache = 0x100
    kIOMapWriteThruCache = 0x200
    kIOMapCopybackCache = 0x300
    kIOMapWriteCombineCache = 0x400
    kIOMapCopybackInnerCache = 0x500
    kIOMapPostedWrite = 0x600
    kIOMapRealTimeCache = 0x700
    kIOMapPostedReordered = 0x800
    kIOMapPostedCombinedReordered = 0x900
    kIOMapCacheMask = 0xF00
    kIOMapUserOptionsMask = 0xFFF
    kIOMapReadOnly = 0x1000
    kIOMapStatic = 0x01000000
    kIOMapReference = 0x02000000
    kIOMapUnique = 0x04000000
    kIOMapPrefault = 0x10000000
    kIOMapOverwrite = 0x20000000
    kIOMapGuardedSmall = 0x40000000
    kIOMapGuardedLarge = 0x80000000
    kIOMapGuardedMask = 0xC0000000


class IOPurgeable(IntFlag, boundary=KEEP):
    """States of purgeable memory and their modifiers (IOMemoryDescriptor.h, vm_purgable.h)."""

    kIOMemoryPurgeableVolatileGroup0 = 0
    kIOMemoryPurgeableVolatileBehaviorFifo = 0
    kIOMemoryPurgeableVolatileOrderingNormal = 0
    kIOMemoryPurgeableKeepCurrent = 1
    kIOMemoryPurgeableNonVolatile = 2
    kIOMemoryPurgeableVolatile = 3
    kIOMemoryPurgeableEmpty = 4
    kIOMemoryPurgeableVolatileOrderingObsolete = 0x20
    kIOMemoryPurgeableVolatileBehaviorLifo = 0x40
    kIOMemoryPurgeableVolatileGroup1 = 0x100
    kIOMemoryPurgeableVolatileGroup2 = 0x200
    kIOMemoryPurgeableVolatileGroup3 = 0x300
    kIOMemoryPurgeableVolatileGroup4 = 0x400
    kIOMemoryPurgeableVolatileGroup5 = 0x500
    kIOMemoryPurgeableVolatileGroup6 = 0x600
    kIOMemoryPurgeableVolatileGroup7 = 0x700
    kIOMemoryPurgeableFaultOnAccess = 0x2000


class IODirection(IntFlag, boundary=KEEP):
    """Flags of `prepare` and `complete`, in addition to the directions of `IOOptionBits` (IOMemoryDescriptor.h)."""

    kIODirectionPrepareToPhys32 = 0x4
    kIODirectionPrepareNoFault = 0x8
    kIODirectionPrepareReserved1 = 0x10
    kIODirectionPrepareNonCoherent = 0x20
    kIODirectionCompleteWithError = 0x40
    kIODirectionCompleteWithDataValid = 0x80


class IOMemoryOperation(IntEnum):
    """Operations of `performOperation` (IOMemoryDescriptor.h)."""

    kIOMemoryIncoherentIOFlush = 1
    kIOMemoryIncoherentIOStore = 2
    kIOMemoryClearEncrypted = 50
    kIOMemorySetEncrypted = 51


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
kIODirectionPrepareNonCoherent = IODirection.kIODirectionPrepareNonCoherent
kIODirectionCompleteWithError = IODirection.kIODirectionCompleteWithError
kIODirectionCompleteWithDataValid = IODirection.kIODirectionCompleteWithDataValid
kIOMemoryIncoherentIOFlush = IOMemoryOperation.kIOMemoryIncoherentIOFlush
kIOMemoryIncoherentIOStore = IOMemoryOperation.kIOMemoryIncoherentIOStore
kIOMemoryClearEncrypted = IOMemoryOperation.kIOMemoryClearEncrypted
kIOMemorySetEncrypted = IOMemoryOperation.kIOMemorySetEncrypted
