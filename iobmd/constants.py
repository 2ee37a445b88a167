"""IOKit's constants under their IOKit names and values (source: the headers of the IOKit framework).

Every name is also importable from `iobmd` itself.
"""

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
    kIOMemoryKernelUserShared = 0x10000
    kIOMemoryThreadSafe = 0x100000
    kIOMemoryClearEncrypt = 0x200000
    kIOMemoryUseReserve = 0x800000


class IOMapOptions(IntFlag, boundary=KEEP):
    """Options of a mapping (IOTypes.h, IOMapTypes.h)."""

    kIOMapDefaultCache = 0
    kIOMapAnywhere = 0x1
    kIOMapInhibitCache = 0x100
    kIOMapWriteThruCache = 0x200
    kIOMapCopybackCache = 0x300
    kIOMapWriteCombineCache = 0x400
    kIOMapReadOnly = 0x1000
    kIOMapReference = 0x02000000
    kIOMapUnique = 0x04000000
    kIOMapPrefault = 0x10000000
    kIOMapGuardedSmall = 0x40000000
    kIOMapGuardedLarge = 0x80000000


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


class IOReturn(IntEnum):
    """Return values of IOKit calls (IOReturn.h)."""

    kIOReturnSuccess = 0
    kIOReturnError = 0xE00002BC
    kIOReturnNoMemory = 0xE00002BD
    kIOReturnNoResources = 0xE00002BE
    kIOReturnIPCError = 0xE00002BF
    kIOReturnNoDevice = 0xE00002C0
    kIOReturnNotPrivileged = 0xE00002C1
    kIOReturnBadArgument = 0xE00002C2
    kIOReturnLockedRead = 0xE00002C3
    kIOReturnLockedWrite = 0xE00002C4
    kIOReturnExclusiveAccess = 0xE00002C5
    kIOReturnBadMessageID = 0xE00002C6
    kIOReturnUnsupported = 0xE00002C7
    kIOReturnVMError = 0xE00002C8
    kIOReturnInternalError = 0xE00002C9
    kIOReturnIOError = 0xE00002CA
    kIOReturnCannotLock = 0xE00002CC
    kIOReturnNotOpen = 0xE00002CD
    kIOReturnNotReadable = 0xE00002CE
    kIOReturnNotWritable = 0xE00002CF
    kIOReturnNotAligned = 0xE00002D0
    kIOReturnBadMedia = 0xE00002D1
    kIOReturnStillOpen = 0xE00002D2
    kIOReturnRLDError = 0xE00002D3
    kIOReturnDMAError = 0xE00002D4
    kIOReturnBusy = 0xE00002D5
    kIOReturnTimeout = 0xE00002D6
    kIOReturnOffline = 0xE00002D7
    kIOReturnNotReady = 0xE00002D8
    kIOReturnNotAttached = 0xE00002D9
    kIOReturnNoChannels = 0xE00002DA
    kIOReturnNoSpace = 0xE00002DB
    kIOReturnPortExists = 0xE00002DD
    kIOReturnCannotWire = 0xE00002DE
    kIOReturnNoInterrupt = 0xE00002DF
    kIOReturnNoFrames = 0xE00002E0
    kIOReturnMessageTooLarge = 0xE00002E1
    kIOReturnNotPermitted = 0xE00002E2
    kIOReturnNoPower = 0xE00002E3
    kIOReturnNoMedia = 0xE00002E4
    kIOReturnUnformattedMedia = 0xE00002E5
    kIOReturnUnsupportedMode = 0xE00002E6
    kIOReturnUnderrun = 0xE00002E7
    kIOReturnOverrun = 0xE00002E8
    kIOReturnDeviceError = 0xE00002E9
    kIOReturnNoCompletion = 0xE00002EA
    kIOReturnAborted = 0xE00002EB
    kIOReturnNoBandwidth = 0xE00002EC
    kIOReturnNotResponding = 0xE00002ED
    kIOReturnIsoTooOld = 0xE00002EE
    kIOReturnIsoTooNew = 0xE00002EF
    kIOReturnNotFound = 0xE00002F0
    kIOReturnInvalid = 0xE0000001


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
kIOMemoryKernelUserShared = IOOptionBits.kIOMemoryKernelUserShared
kIOMemoryThreadSafe = IOOptionBits.kIOMemoryThreadSafe
kIOMemoryClearEncrypt = IOOptionBits.kIOMemoryClearEncrypt
kIOMemoryUseReserve = IOOptionBits.kIOMemoryUseReserve

kIOMapDefaultCache = IOMapOptions.kIOMapDefaultCache
kIOMapAnywhere = IOMapOptions.kIOMapAnywhere
kIOMapInhibitCache = IOMapOptions.kIOMapInhibitCache
kIOMapWriteThruCache = IOMapOptions.kIOMapWriteThruCache
kIOMapCopybackCache = IOMapOptions.kIOMapCopybackCache
kIOMapWriteCombineCache = IOMapOptions.kIOMapWriteCombineCache
kIOMapReadOnly = IOMapOptions.kIOMapReadOnly
kIOMapReference = IOMapOptions.kIOMapReference
kIOMapUnique = IOMapOptions.kIOMapUnique
kIOMapPrefault = IOMapOptions.kIOMapPrefault
kIOMapGuardedSmall = IOMapOptions.kIOMapGuardedSmall
kIOMapGuardedLarge = IOMapOptions.kIOMapGuardedLarge

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

kIOReturnSuccess = IOReturn.kIOReturnSuccess
kIOReturnError = IOReturn.kIOReturnError
kIOReturnNoMemory = IOReturn.kIOReturnNoMemory
kIOReturnNoResources = IOReturn.kIOReturnNoResources
kIOReturnIPCError = IOReturn.kIOReturnIPCError
kIOReturnNoDevice = IOReturn.kIOReturnNoDevice
kIOReturnNotPrivileged = IOReturn.kIOReturnNotPrivileged
kIOReturnBadArgument = IOReturn.kIOReturnBadArgument
kIOReturnLockedRead = IOReturn.kIOReturnLockedRead
kIOReturnLockedWrite = IOReturn.kIOReturnLockedWrite
kIOReturnExclusiveAccess = IOReturn.kIOReturnExclusiveAccess
kIOReturnBadMessageID = IOReturn.kIOReturnBadMessageID
kIOReturnUnsupported = IOReturn.kIOReturnUnsupported
kIOReturnVMError = IOReturn.kIOReturnVMError
kIOReturnInternalError = IOReturn.kIOReturnInternalError
kIOReturnIOError = IOReturn.kIOReturnIOError
kIOReturnCannotLock = IOReturn.kIOReturnCannotLock
kIOReturnNotOpen = IOReturn.kIOReturnNotOpen
kIOReturnNotReadable = IOReturn.kIOReturnNotReadable
kIOReturnNotWritable = IOReturn.kIOReturnNotWritable
kIOReturnNotAligned = IOReturn.kIOReturnNotAligned
kIOReturnBadMedia = IOReturn.kIOReturnBadMedia
kIOReturnStillOpen = IOReturn.kIOReturnStillOpen
kIOReturnRLDError = IOReturn.kIOReturnRLDError
kIOReturnDMAError = IOReturn.kIOReturnDMAError
kIOReturnBusy = IOReturn.kIOReturnBusy
kIOReturnTimeout = IOReturn.kIOReturnTimeout
kIOReturnOffline = IOReturn.kIOReturnOffline
kIOReturnNotReady = IOReturn.kIOReturnNotReady
kIOReturnNotAttached = IOReturn.kIOReturnNotAttached
kIOReturnNoChannels = IOReturn.kIOReturnNoChannels
kIOReturnNoSpace = IOReturn.kIOReturnNoSpace
kIOReturnPortExists = IOReturn.kIOReturnPortExists
kIOReturnCannotWire = IOReturn.kIOReturnCannotWire
kIOReturnNoInterrupt = IOReturn.kIOReturnNoInterrupt
kIOReturnNoFrames = IOReturn.kIOReturnNoFrames
kIOReturnMessageTooLarge = IOReturn.kIOReturnMessageTooLarge
kIOReturnNotPermitted = IOReturn.kIOReturnNotPermitted
kIOReturnNoPower = IOReturn.kIOReturnNoPower
kIOReturnNoMedia = IOReturn.kIOReturnNoMedia
kIOReturnUnformattedMedia = IOReturn.kIOReturnUnformattedMedia
kIOReturnUnsupportedMode = IOReturn.kIOReturnUnsupportedMode
kIOReturnUnderrun = IOReturn.kIOReturnUnderrun
kIOReturnOverrun = IOReturn.kIOReturnOverrun
kIOReturnDeviceError = IOReturn.kIOReturnDeviceError
kIOReturnNoCompletion = IOReturn.kIOReturnNoCompletion
kIOReturnAborted = IOReturn.kIOReturnAborted
kIOReturnNoBandwidth = IOReturn.kIOReturnNoBandwidth
kIOReturnNotResponding = IOReturn.kIOReturnNotResponding
kIOReturnIsoTooOld = IOReturn.kIOReturnIsoTooOld
kIOReturnIsoTooNew = IOReturn.kIOReturnIsoTooNew
kIOReturnNotFound = IOReturn.kIOReturnNotFound
kIOReturnInvalid = IOReturn.kIOReturnInvalid

# IODirection flags of prepare() (IOMemoryDescriptor.h).
kIODirectionPrepareToPhys32 = 4
kIODirectionPrepareNoFault = 8
# Operations of performOperation() (IOMemoryDescriptor.h).
kIOMemoryIncoherentIOFlush = 1
kIOMemoryIncoherentIOStore = 2

__all__ = [
    "IOOptionBits",
    "IOMapOptions",
    "IOPurgeable",
    "IOReturn",
    "kIODirectionNone",
    "kIODirectionIn",
    "kIODirectionOut",
    "kIODirectionInOut",
    "kIODirectionOutIn",
    "kIOMemoryUnshared",
    "kIOMemoryPhysicallyContiguous",
    "kIOMemoryPageable",
    "kIOMemoryPurgeable",
    "kIOMemoryHostPhysicallyContiguous",
    "kIOMemoryMapperNone",
    "kIOMemoryKernelUserShared",
    "kIOMemoryThreadSafe",
    "kIOMemoryClearEncrypt",
    "kIOMemoryUseReserve",
    "kIOMapDefaultCache",
    "kIOMapAnywhere",
    "kIOMapInhibitCache",
    "kIOMapWriteThruCache",
    "kIOMapCopybackCache",
    "kIOMapWriteCombineCache",
    "kIOMapReadOnly",
    "kIOMapReference",
    "kIOMapUnique",
    "kIOMapPrefault",
    "kIOMapGuardedSmall",
    "kIOMapGuardedLarge",
    "kIOMemoryPurgeableVolatileGroup0",
    "kIOMemoryPurgeableVolatileBehaviorFifo",
    "kIOMemoryPurgeableVolatileOrderingNormal",
    "kIOMemoryPurgeableKeepCurrent",
    "kIOMemoryPurgeableNonVolatile",
    "kIOMemoryPurgeableVolatile",
    "kIOMemoryPurgeableEmpty",
    "kIOMemoryPurgeableVolatileOrderingObsolete",
    "kIOMemoryPurgeableVolatileBehaviorLifo",
    "kIOMemoryPurgeableVolatileGroup1",
    "kIOMemoryPurgeableVolatileGroup2",
    "kIOMemoryPurgeableVolatileGroup3",
    "kIOMemoryPurgeableVolatileGroup4",
    "kIOMemoryPurgeableVolatileGroup5",
    "kIOMemoryPurgeableVolatileGroup6",
    "kIOMemoryPurgeableVolatileGroup7",
    "kIOReturnSuccess",
    "kIOReturnError",
    "kIOReturnNoMemory",
    "kIOReturnNoResources",
    "kIOReturnIPCError",
    "kIOReturnNoDevice",
    "kIOReturnNotPrivileged",
    "kIOReturnBadArgument",
    "kIOReturnLockedRead",
    "kIOReturnLockedWrite",
    "kIOReturnExclusiveAccess",
    "kIOReturnBadMessageID",
    "kIOReturnUnsupported",
    "kIOReturnVMError",
    "kIOReturnInternalError",
    "kIOReturnIOError",
    "kIOReturnCannotLock",
    "kIOReturnNotOpen",
    "kIOReturnNotReadable",
    "kIOReturnNotWritable",
    "kIOReturnNotAligned",
    "kIOReturnBadMedia",
    "kIOReturnStillOpen",
    "kIOReturnRLDError",
    "kIOReturnDMAError",
    "kIOReturnBusy",
    "kIOReturnTimeout",
    "kIOReturnOffline",
    "kIOReturnNotReady",
    "kIOReturnNotAttached",
    "kIOReturnNoChannels",
    "kIOReturnNoSpace",
    "kIOReturnPortExists",
    "kIOReturnCannotWire",
    "kIOReturnNoInterrupt",
    "kIOReturnNoFrames",
    "kIOReturnMessageTooLarge",
    "kIOReturnNotPermitted",
    "kIOReturnNoPower",
    "kIOReturnNoMedia",
    "kIOReturnUnformattedMedia",
    "kIOReturnUnsupportedMode",
    "kIOReturnUnderrun",
    "kIOReturnOverrun",
    "kIOReturnDeviceError",
    "kIOReturnNoCompletion",
    "kIOReturnAborted",
    "kIOReturnNoBandwidth",
    "kIOReturnNotResponding",
    "kIOReturnIsoTooOld",
    "kIOReturnIsoTooNew",
    "kIOReturnNotFound",
    "kIOReturnInvalid",
    "kIODirectionPrepareToPhys32",
    "kIODirectionPrepareNoFault",
    "kIOMemoryIncoherentIOFlush",
    "kIOMemoryIncoherentIOStore",
]
