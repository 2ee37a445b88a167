"""IOKit's return values under their names."""

from enum import IntEnum


class IOReturn(IntEnum):
    """Return values of IOKit calls (IOReturn.h)."""

    kIOReturnSuccess = 0
    """The operation succeeded."""
    kIOReturnError = 0xE00002BC
    """An error for which there is no other code."""
    kIOReturnNoMemory = 0xE00002BD
    """Memory or address space is exhausted."""
    kIOReturnNoResources = 0xE00002BE
    """A resource is exhausted: contiguous or low memory, descriptors, processes."""
    kIOReturnIPCError = 0xE00002BF
    """Messages between processes failed."""
    kIOReturnNoDevice = 0xE00002C0
    """There is no such device."""
    kIOReturnNotPrivileged = 0xE00002C1
    """A privilege is missing: physical addresses are hidden."""
    kIOReturnBadArgument = 0xE00002C2
    """An argument, or the combination of arguments, is invalid."""
    kIOReturnLockedRead = 0xE00002C3
    """The device is locked for reading."""
    kIOReturnLockedWrite = 0xE00002C4
    """The device is locked for writing."""
    kIOReturnExclusiveAccess = 0xE00002C5
    """The device is open, and its user has exclusive access."""
    kIOReturnBadMessageID = 0xE00002C6
    """The answer belongs to another message."""
    kIOReturnUnsupported = 0xE00002C7
    """This kernel, processor, task or kind of memory does not support the operation."""
    kIOReturnVMError = 0xE00002C8
    """A range of addresses is not mapped or not accessible."""
    kIOReturnInternalError = 0xE00002C9
    """The driver contradicts itself."""
    kIOReturnIOError = 0xE00002CA
    """A transfer failed."""
    kIOReturnCannotLock = 0xE00002CC
    """A lock cannot be acquired."""
    kIOReturnNotOpen = 0xE00002CD
    """The object was released, or the device is not open."""
    kIOReturnNotReadable = 0xE00002CE
    """Reading is not supported."""
    kIOReturnNotWritable = 0xE00002CF
    """Writing is not supported: the map is read-only."""
    kIOReturnNotAligned = 0xE00002D0
    """An address or a length has an unsuitable alignment."""
    kIOReturnBadMedia = 0xE00002D1
    """The medium is damaged."""
    kIOReturnStillOpen = 0xE00002D2
    """Devices are still open."""
    kIOReturnRLDError = 0xE00002D3
    """Loading code failed."""
    kIOReturnDMAError = 0xE00002D4
    """DMA failed."""
    kIOReturnBusy = 0xE00002D5
    """The object is in use: prepared, mapped or viewed."""
    kIOReturnTimeout = 0xE00002D6
    """A task, or a program that supplies pages, did not answer within the limit."""
    kIOReturnOffline = 0xE00002D7
    """The device is offline."""
    kIOReturnNotReady = 0xE00002D8
    """The state does not permit the operation: memory that is not pinned has no physical address."""
    kIOReturnNotAttached = 0xE00002D9
    """The device is not attached."""
    kIOReturnNoChannels = 0xE00002DA
    """No DMA channel is free."""
    kIOReturnNoSpace = 0xE00002DB
    """The data exceed the space: the device's largest transfer."""
    kIOReturnPortExists = 0xE00002DD
    """The port exists already."""
    kIOReturnCannotWire = 0xE00002DE
    """The memory cannot be locked or pinned."""
    kIOReturnNoInterrupt = 0xE00002DF
    """No interrupt is attached."""
    kIOReturnNoFrames = 0xE00002E0
    """No DMA frames are queued."""
    kIOReturnMessageTooLarge = 0xE00002E1
    """A message is too large; memory is out of the device's reach."""
    kIOReturnNotPermitted = 0xE00002E2
    """Access to another task is denied."""
    kIOReturnNoPower = 0xE00002E3
    """The device has no power."""
    kIOReturnNoMedia = 0xE00002E4
    """There is no medium."""
    kIOReturnUnformattedMedia = 0xE00002E5
    """The medium is not formatted."""
    kIOReturnUnsupportedMode = 0xE00002E6
    """There is no such mode."""
    kIOReturnUnderrun = 0xE00002E7
    """There were too few data."""
    kIOReturnOverrun = 0xE00002E8
    """There were too many data, or the offset is at the end."""
    kIOReturnDeviceError = 0xE00002E9
    """The device does not work properly."""
    kIOReturnNoCompletion = 0xE00002EA
    """A completion routine is required."""
    kIOReturnAborted = 0xE00002EB
    """The operation was aborted."""
    kIOReturnNoBandwidth = 0xE00002EC
    """The bandwidth of the bus would be exceeded."""
    kIOReturnNotResponding = 0xE00002ED
    """The device does not respond."""
    kIOReturnIsoTooOld = 0xE00002EE
    """An isochronous request for a time that is long past."""
    kIOReturnIsoTooNew = 0xE00002EF
    """An isochronous request for a time in the distant future."""
    kIOReturnNotFound = 0xE00002F0
    """There is no such object: the task has exited."""
    kIOReturnInvalid = 0xE0000001
    """The initial value of results, which no operation returns."""


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
