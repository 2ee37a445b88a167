"""Further values of IOKit's memory headers: kinds of memory, cache modes, ledgers, options of devices."""

from enum import KEEP, IntEnum, IntFlag


class IOMemoryTypes(IntFlag, boundary=KEEP):
    """What the arguments of `withOptions` and `initWithOptions` describe (IOMemoryDescriptor.h).

    Some values are those of options of buffers (`IOOptionBits`), with other meanings.
    """

    kIOMemoryDirectionMask = 0x7
    kIOMemoryTypeVirtual = 0x10
    kIOMemoryTypeVirtual64 = 0x10
    kIOMemoryTypePhysical = 0x20
    kIOMemoryTypePhysical64 = 0x20
    kIOMemoryTypeUPL = 0x30
    kIOMemoryTypePersistentMD = 0x40
    kIOMemoryTypeUIO = 0x50
    kIOMemoryTypeMask = 0xF0
    kIOMemoryAsReference = 0x100
    kIOMemoryBufferPageable = 0x400
    kIOMemoryPersistent = 0x10000


class IOCacheMode(IntEnum):
    """Values of the cache field of map options (IOMapTypes.h)."""

    kIODefaultCache = 0
    kIOInhibitCache = 1
    kIOWriteThruCache = 2
    kIOCopybackCache = 3
    kIOWriteCombineCache = 4
    kIOCopybackInnerCache = 5
    kIOPostedWrite = 6
    kIORealTimeCache = 7
    kIOPostedReordered = 8
    kIOPostedCombinedReordered = 9


class IOMemoryLedgerTag(IntEnum):
    """The ledgers of a task (IOMemoryDescriptor.h). Linux charges memory to cgroups instead."""

    kIOMemoryLedgerTagDefault = 1
    kIOmemoryLedgerTagNetwork = 2
    kIOmemoryLedgerTagMedia = 3
    kIOmemoryLedgerTagGraphics = 4
    kIOmemoryLedgerTagNeural = 5


class IOPreparationID(IntEnum):
    """Values of `getPreparationID` that identify no preparation (IOMemoryDescriptor.h)."""

    kIOPreparationIDUnprepared = 0
    kIOPreparationIDUnsupported = 1
    kIOPreparationIDAlwaysPrepared = 2


class IODMAMapOptions(IntFlag, boundary=KEEP):
    """Options of mappings for a device (IOMemoryDescriptor.h)."""

    kIODMAMapReadAccess = 0x1
    kIODMAMapWriteAccess = 0x2
    kIODMAMapPhysicallyContiguous = 0x10
    kIODMAMapDeviceMemory = 0x20
    kIODMAMapPagingPath = 0x40
    kIODMAMapIdentityMap = 0x80
    kIODMAMapPageListFullyOccupied = 0x100
    kIODMAMapFixedAddress = 0x200


class IODMACommandOptions(IntFlag, boundary=KEEP):
    """How a device accesses the memory of an `IODMACommand` (IODMACommand.h)."""

    kIODMAMapOptionMapped = 0
    kIODMAMapOptionBypassed = 0x1
    kIODMAMapOptionNonCoherent = 0x2
    kIODMAMapOptionUnmapped = 0x3
    kIODMAMapOptionTypeMask = 0xF
    kIODMAMapOptionNoCacheStore = 0x10
    kIODMAMapOptionOnChip = 0x20
    kIODMAMapOptionIterateOnly = 0x40
    kIODMAMapOptionDextOwner = 0x80


kIOMemoryDirectionMask = IOMemoryTypes.kIOMemoryDirectionMask
kIOMemoryTypeVirtual = IOMemoryTypes.kIOMemoryTypeVirtual
kIOMemoryTypeVirtual64 = IOMemoryTypes.kIOMemoryTypeVirtual64
kIOMemoryTypePhysical = IOMemoryTypes.kIOMemoryTypePhysical
kIOMemoryTypePhysical64 = IOMemoryTypes.kIOMemoryTypePhysical64
kIOMemoryTypeUPL = IOMemoryTypes.kIOMemoryTypeUPL
kIOMemoryTypePersistentMD = IOMemoryTypes.kIOMemoryTypePersistentMD
kIOMemoryTypeUIO = IOMemoryTypes.kIOMemoryTypeUIO
kIOMemoryTypeMask = IOMemoryTypes.kIOMemoryTypeMask
kIOMemoryAsReference = IOMemoryTypes.kIOMemoryAsReference
kIOMemoryBufferPageable = IOMemoryTypes.kIOMemoryBufferPageable
kIOMemoryPersistent = IOMemoryTypes.kIOMemoryPersistent
kIODefaultCache = IOCacheMode.kIODefaultCache
kIOInhibitCache = IOCacheMode.kIOInhibitCache
kIOWriteThruCache = IOCacheMode.kIOWriteThruCache
kIOCopybackCache = IOCacheMode.kIOCopybackCache
kIOWriteCombineCache = IOCacheMode.kIOWriteCombineCache
kIOCopybackInnerCache = IOCacheMode.kIOCopybackInnerCache
kIOPostedWrite = IOCacheMode.kIOPostedWrite
kIORealTimeCache = IOCacheMode.kIORealTimeCache
kIOPostedReordered = IOCacheMode.kIOPostedReordered
kIOPostedCombinedReordered = IOCacheMode.kIOPostedCombinedReordered
kIOMemoryLedgerTagDefault = IOMemoryLedgerTag.kIOMemoryLedgerTagDefault
kIOmemoryLedgerTagNetwork = IOMemoryLedgerTag.kIOmemoryLedgerTagNetwork
kIOmemoryLedgerTagMedia = IOMemoryLedgerTag.kIOmemoryLedgerTagMedia
kIOmemoryLedgerTagGraphics = IOMemoryLedgerTag.kIOmemoryLedgerTagGraphics
kIOmemoryLedgerTagNeural = IOMemoryLedgerTag.kIOmemoryLedgerTagNeural
kIOPreparationIDUnprepared = IOPreparationID.kIOPreparationIDUnprepared
kIOPreparationIDUnsupported = IOPreparationID.kIOPreparationIDUnsupported
kIOPreparationIDAlwaysPrepared = IOPreparationID.kIOPreparationIDAlwaysPrepared
kIODMAMapReadAccess = IODMAMapOptions.kIODMAMapReadAccess
kIODMAMapWriteAccess = IODMAMapOptions.kIODMAMapWriteAccess
kIODMAMapPhysicallyContiguous = IODMAMapOptions.kIODMAMapPhysicallyContiguous
kIODMAMapDeviceMemory = IODMAMapOptions.kIODMAMapDeviceMemory
kIODMAMapPagingPath = IODMAMapOptions.kIODMAMapPagingPath
kIODMAMapIdentityMap = IODMAMapOptions.kIODMAMapIdentityMap
kIODMAMapPageListFullyOccupied = IODMAMapOptions.kIODMAMapPageListFullyOccupied
kIODMAMapFixedAddress = IODMAMapOptions.kIODMAMapFixedAddress
kIODMAMapOptionMapped = IODMACommandOptions.kIODMAMapOptionMapped
kIODMAMapOptionBypassed = IODMACommandOptions.kIODMAMapOptionBypassed
kIODMAMapOptionNonCoherent = IODMACommandOptions.kIODMAMapOptionNonCoherent
kIODMAMapOptionUnmapped = IODMACommandOptions.kIODMAMapOptionUnmapped
kIODMAMapOptionTypeMask = IODMACommandOptions.kIODMAMapOptionTypeMask
kIODMAMapOptionNoCacheStore = IODMACommandOptions.kIODMAMapOptionNoCacheStore
kIODMAMapOptionOnChip = IODMACommandOptions.kIODMAMapOptionOnChip
kIODMAMapOptionIterateOnly = IODMACommandOptions.kIODMAMapOptionIterateOnly
kIODMAMapOptionDextOwner = IODMACommandOptions.kIODMAMapOptionDextOwner

# Values that belong to no enumeration.
kIODefaultMemoryType = 0
kIOMapCacheShift = 8
kIOMapperUncached = 0x1
kIOMemoryLedgerFlagNoFootprint = 0x1
