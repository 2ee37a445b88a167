"""Options of DriverKit's memory classes, whose values differ from those of IOKit."""

from enum import KEEP, IntFlag


class IOMemoryCreateOptions(IntFlag, boundary=KEEP):
    """Options with which DriverKit creates descriptors (IOMemoryDescriptor.iig)."""

    kIOMemoryDirectionNone = 0
    """No transfer is planned."""
    kIOMemoryDirectionIn = 0x1
    """A device writes the memory."""
    kIOMemoryDirectionOut = 0x2
    """A device reads the memory."""
    kIOMemoryDirectionOutIn = 0x3
    """A device reads and writes the memory."""
    kIOMemoryDirectionInOut = 0x3
    """The same as `kIOMemoryDirectionOutIn`."""
    kIOMemoryDisableCopyOnWrite = 0x10
    """Maps show the memory itself, and not a copy."""


class IOMemoryMapOptions(IntFlag, boundary=KEEP):
    """Options of `CreateMapping` (IOMemoryDescriptor.iig)."""

    kIOMemoryMapGuardedDefault = 0
    """Without guards, because private memory has only its own addresses."""
    kIOMemoryMapCacheModeDefault = 0
    """The mode that suits the memory."""
    kIOMemoryMapFixedAddress = 0x1
    """At the given address, without guards."""
    kIOMemoryMapReadOnly = 0x2
    """The map can only be read."""
    kIOMemoryMapGuardedNone = 0x4
    """Without guards."""
    kIOMemoryMapGuardedSmall = 0x8
    """With an inaccessible page on each side."""
    kIOMemoryMapGuardedLarge = 0xC
    """With inaccessible 64 KiB on each side."""
    kIOMemoryMapGuardedMask = 0x1C
    """The bits of the guards."""
    kIOMemoryMapCacheModeInhibit = 0x100
    """Without caching: memory of devices."""
    kIOMemoryMapCacheModeCopyback = 0x200
    """With caching: main memory."""
    kIOMemoryMapCacheModeWriteThrough = 0x400
    """Write-through; refused."""
    kIOMemoryMapCacheModeRealTime = 0x800
    """A mode of Arm processors; refused."""


class IODMACommandOperation(IntFlag, boundary=KEEP):
    """Options of DriverKit's `IODMACommand`: those of `performOperation`, and the empty others (IODMACommand.iig)."""

    kIODMACommandCreateNoOptions = 0
    """`Create` has no options."""
    kIODMACommandSpecificationNoOptions = 0
    """A specification has no options."""
    kIODMACommandPrepareForDMANoOptions = 0
    """`PrepareForDMA` has no options."""
    kIODMACommandCompleteDMANoOptions = 0
    """`CompleteDMA` has no options."""
    kIODMACommandPerformOperationOptionRead = 0x1
    """Copy bytes of the command's memory to `data`."""
    kIODMACommandPerformOperationOptionWrite = 0x2
    """Copy bytes of `data` to the command's memory."""
    kIODMACommandPerformOperationOptionZero = 0x4
    """Fill the command's memory with zeros."""


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
