"""Options of DriverKit's memory classes, whose values differ from those of IOKit."""

from enum import KEEP, IntFlag


class IOMemoryCreateOptions(IntFlag, boundary=KEEP):
    """Options with which DriverKit creates descriptors (IOMemoryDescriptor.iig)."""

    kIOMemoryDirectionNone = 0
    kIOMemoryDirectionIn = 0x1
    kIOMemoryDirectionOut = 0x2
    kIOMemoryDirectionOutIn = 0x3
    kIOMemoryDirectionInOut = 0x3
    kIOMemoryDisableCopyOnWrite = 0x10


class IOMemoryMapOptions(IntFlag, boundary=KEEP):
    """Options of `CreateMapping` (IOMemoryDescriptor.iig)."""

    kIOMemoryMapGuardedDefault = 0
    kIOMemoryMapCacheModeDefault = 0
    kIOMemoryMapFixedAddress = 0x1
    kIOMemoryMapReadOnly = 0x2
    kIOMemoryMapGuardedNone = 0x4
    kIOMemoryMapGuardedSmall = 0x8
    kIOMemoryMapGuardedLarge = 0xC
    kIOMemoryMapGuardedMask = 0x1C
    kIOMemoryMapCacheModeInhibit = 0x100
    kIOMemoryMapCacheModeCopyback = 0x200
    kIOMemoryMapCacheModeWriteThrough = 0x400
    kIOMemoryMapCacheModeRealTime = 0x800


class IODMACommandOperation(IntFlag, boundary=KEEP):
    """Options of DriverKit's `IODMACommand`: those of `performOperation`, and the empty others (IODMACommand.iig)."""

    kIODMACommandCreateNoOptions = 0
    kIODMACommandSpecificationNoOptions = 0
    kIODMACommandPrepareForDMANoOptions = 0
    kIODMACommandCompleteDMANoOptions = 0
    kIODMACommandPerformOperationOptionRead = 0x1
    kIODMACommandPerformOperationOptionWrite = 0x2
    kIODMACommandPerformOperationOptionZero = 0x4


kIOMemoryDirectionNone = IOMemoryCreateOptions.kIOMemoryDirectionNone
kIOMemoryDirectionIn = IOMemoryCreateOptions.kIOMemoryDirectionIn
kIOMemoryDirectionOut = IOMemoryCreateOptions.kIOMemoryDirectionOut
kIOMemoryDirectionOutIn = IOMemoryCreateOptions.kIOMemoryDirectionOutIn
kIOMemoryDirectionInOut = IOMemoryCreateOptions.kIOMemoryDirectionInOut
kIOMemoryDisableCopyOnWrite = IOMemoryCreateOptions.kIOMemoryDisableCopyOnWrite
kIOMemoryMapGuardedDefault = IOMemoryMapOptions.kIOMemoryMapGuardedDefault
kIOMemoryMapCacheModeDefault = IOMemoryMapOptions.kIOMemoryMapCacheModeDefault
kIOMemoryMapFixedAddress = IOMemoryMapOptions.kIOMemoryMapFixedAddress
kIOMemoryMapReadOnly = IOMemoryMapOptions.kIOMemoryMapReadOnly
kIOMemoryMapGuardedNone = IOMemoryMapOptions.kIOMemoryMapGuardedNone
kIOMemoryMapGuardedSmall = IOMemoryMapOptions.kIOMemoryMapGuardedSmall
kIOMemoryMapGuardedLarge = IOMemoryMapOptions.kIOMemoryMapGuardedLarge
kIOMemoryMapGuardedMask = IOMemoryMapOptions.kIOMemoryMapGuardedMask
kIOMemoryMapCacheModeInhibit = IOMemoryMapOptions.kIOMemoryMapCacheModeInhibit
kIOMemoryMapCacheModeCopyback = IOMemoryMapOptions.kIOMemoryMapCacheModeCopyback
kIOMemoryMapCacheModeWriteThrough = IOMemoryMapOptions.kIOMemoryMapCacheModeWriteThrough
kIOMemoryMapCacheModeRealTime = IOMemoryMapOptions.kIOMemoryMapCacheModeRealTime
kIODMACommandCreateNoOptions = IODMACommandOperation.kIODMACommandCreateNoOptions
kIODMACommandSpecificationNoOptions = IODMACommandOperation.kIODMACommandSpecificationNoOptions
kIODMACommandPrepareForDMANoOptions = IODMACommandOperation.kIODMACommandPrepareForDMANoOptions
kIODMACommandCompleteDMANoOptions = IODMACommandOperation.kIODMACommandCompleteDMANoOptions
kIODMACommandPerformOperationOptionRead = IODMACommandOperation.kIODMACommandPerformOperationOptionRead
kIODMACommandPerformOperationOptionWrite = IODMACommandOperation.kIODMACommandPerformOperationOptionWrite
kIODMACommandPerformOperationOptionZero = IODMACommandOperation.kIODMACommandPerformOperationOptionZero
