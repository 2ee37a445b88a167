"""Further values of IOKit's memory headers: kinds of memory, cache modes, ledgers, options of devices."""

from enum import KEEP, IntEnum, IntFlag


class IOMemoryTypes(IntFlag, boundary=KEEP):
    """What the arguments of `withOptions` and `initWithOptions` describe (IOMemoryDescriptor.h).

    Some values are those of options of buffers (`IOOptionBits`), with other meanings.
    """

    kIOMemoryDirectionMask = 0x7
    """The bits of the direction."""
    kIOMemoryTypeVirtual = 0x10
    """Addresses of a task."""
    kIOMemoryTypeVirtual64 = 0x10
    """The same as `kIOMemoryTypeVirtual`."""
    kIOMemoryTypePhysical = 0x20
    """Addresses of a bus, without a task."""
    kIOMemoryTypePhysical64 = 0x20
    """The same as `kIOMemoryTypePhysical`."""
    kIOMemoryTypeUPL = 0x30
    """A list of pages of XNU; refused."""
    kIOMemoryTypePersistentMD = 0x40
    """A persistent descriptor of XNU; refused."""
    kIOMemoryTypeUIO = 0x50
    """A request of XNU's file systems; refused."""
    kIOMemoryTypeMask = 0xF0
    """The bits of the type."""
    kIOMemoryAsReference = 0x100
    """Accepted, without effect: ranges are always copied."""
    kIOMemoryBufferPageable = 0x400
    """The value that XNU uses internally for pageable buffers."""
    kIOMemoryPersistent = 0x10000
    """Accepted, without effect."""


class IOCacheMode(IntEnum):
    """Values of the cache field of map options (IOMapTypes.h)."""

    kIODefaultCache = 0
    """The mode that suits the memory."""
    kIOInhibitCache = 1
    """Without caching."""
    kIOWriteThruCache = 2
    """Write-through."""
    kIOCopybackCache = 3
    """With caching."""
    kIOWriteCombineCache = 4
    """Write-combining."""
    kIOCopybackInnerCache = 5
    """With caching in the inner caches only."""
    kIOPostedWrite = 6
    """Without caching; writes are posted."""
    kIORealTimeCache = 7
    """With caching, for data with deadlines."""
    kIOPostedReordered = 8
    """Without caching; writes are posted, and accesses reordered."""
    kIOPostedCombinedReordered = 9
    """Without caching; writes are posted and combined, and accesses reordered."""


class IOMemoryLedgerTag(IntEnum):
    """The ledgers of a task (IOMemoryDescriptor.h). Linux charges memory to cgroups instead.

    Older headers spell three of the names with a small m, and all headers that of the network.
    """

    kIOMemoryLedgerTagDefault = 1
    """The ledger of all other memory."""
    kIOmemoryLedgerTagNetwork = 2
    """The ledger of network memory."""
    kIOMemoryLedgerTagMedia = 3
    """The ledger of media memory."""
    kIOmemoryLedgerTagMedia = 3
    """The same."""
    kIOMemoryLedgerTagGraphics = 4
    """The ledger of graphics memory."""
    kIOmemoryLedgerTagGraphics = 4
    """The same."""
    kIOMemoryLedgerTagNeural = 5
    """The ledger of memory for neural networks."""
    kIOmemoryLedgerTagNeural = 5
    """The same."""


class IOPreparationID(IntEnum):
    """Values of `getPreparationID` that identify no preparation (IOMemoryDescriptor.h)."""

    kIOPreparationIDUnprepared = 0
    """The memory is not prepared."""
    kIOPreparationIDUnsupported = 1
    """This kind of descriptor has no such number."""
    kIOPreparationIDAlwaysPrepared = 2
    """The memory needs no preparation."""


class IODMAMapOptions(IntFlag, boundary=KEEP):
    """Options of mappings for a device (IOMemoryDescriptor.h)."""

    kIODMAMapReadAccess = 0x1
    """The device reads the memory."""
    kIODMAMapWriteAccess = 0x2
    """The device writes the memory."""
    kIODMAMapPhysicallyContiguous = 0x10
    """The memory is physically contiguous."""
    kIODMAMapDeviceMemory = 0x20
    """The memory is that of a device."""
    kIODMAMapPagingPath = 0x40
    """The mapping is needed for paging."""
    kIODMAMapIdentityMap = 0x80
    """The device's addresses are the physical ones."""
    kIODMAMapPageListFullyOccupied = 0x100
    """Every page of the list is used completely."""
    kIODMAMapFixedAddress = 0x200
    """At a given address."""


class IODMACommandOptions(IntFlag, boundary=KEEP):
    """How a device accesses the memory of an `IODMACommand` (IODMACommand.h)."""

    kIODMAMapOptionMapped = 0
    """Addresses of the mapper, if there is one."""
    kIODMAMapOptionBypassed = 0x1
    """Physical addresses, also with a mapper."""
    kIODMAMapOptionNonCoherent = 0x2
    """As `kIODMAMapOptionMapped`; the device does not snoop the caches."""
    kIODMAMapOptionUnmapped = 0x3
    """Physical addresses, also with a mapper."""
    kIODMAMapOptionTypeMask = 0xF
    """The bits of the four options above."""
    kIODMAMapOptionNoCacheStore = 0x10
    """Accepted, without effect."""
    kIODMAMapOptionOnChip = 0x20
    """Accepted, without effect."""
    kIODMAMapOptionIterateOnly = 0x40
    """Only generate segments: do not use bounce buffers."""
    kIODMAMapOptionDextOwner = 0x80
    """The command belongs to a driver of DriverKit; accepted, without effect."""


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
kIOMemoryLedgerTagMedia = IOMemoryLedgerTag.kIOMemoryLedgerTagMedia
kIOmemoryLedgerTagMedia = IOMemoryLedgerTag.kIOmemoryLedgerTagMedia
kIOMemoryLedgerTagGraphics = IOMemoryLedgerTag.kIOMemoryLedgerTagGraphics
kIOmemoryLedgerTagGraphics = IOMemoryLedgerTag.kIOmemoryLedgerTagGraphics
kIOMemoryLedgerTagNeural = IOMemoryLedgerTag.kIOMemoryLedgerTagNeural
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
kIOBufferDescriptorMemoryFlags = 0xB00807
kIODefaultMemoryType = 0
kIOMapCacheShift = 8
kIOMapperUncached = 0x1
kIOMemoryLedgerFlagNoFootprint = 0x1
