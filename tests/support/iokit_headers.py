"""The public methods of the memory classes of IOKit and DriverKit, by name, from the headers of xnu-11417.

Without constructors, `free` and reserved slots, methods that only 32-bit kernels have, and methods that a class
inherits or overrides without other parameters. Overloads count once.
"""

IOKIT = {
    "IOMemoryDescriptor": """
        initialize withAddress withPhysicalAddress withAddressRange withAddressRanges withOptions
        withPersistentMemoryDescriptor initWithOptions setPurgeable setOwnership getPageCounts performOperation
        dmaCommandOperation getPhysicalSegment getPhysicalAddress getPreparationID setPreparationID setVMTags getVMTag
        getDescriptorID setDescriptorID ktraceEmitPhysicalSegments getDirection getLength getDMAMapLength setTag
        getTag getFlags readBytes writeBytes prepare complete createMappingInTask map setMapping setMapperOptions
        getMapperOptions redirect handleFault populateDevicePager makeMapping copyContext setContext
    """,
    "IOBufferMemoryDescriptor": """
        initWithPhysicalMask inTaskWithGuardPages initWithGuardPages withCopy withOptions inTaskWithOptions
        inTaskWithPhysicalMask withCapacity withBytes setLength setDirection getCapacity getBytesNoCopy appendBytes
    """,
    "IOSubMemoryDescriptor": "withSubRange initSubRange",
    "IOMultiMemoryDescriptor": "withDescriptors initWithDescriptors",
    "IOInterleavedMemoryDescriptor": """
        withCapacity initWithCapacity clearMemoryDescriptors setMemoryDescriptor getPhysicalSegment prepare complete
    """,
    "IOGuardPageMemoryDescriptor": "withSize initWithSize",
    "IODeviceMemory": "arrayFromList withRange withSubRange",
    # With those of IOFilterInterruptEventSource, which has no class here, and of IOEventSource that drivers call.
    "IOInterruptEventSource": """
        interruptEventSource init getProvider getIntIndex getAutoDisable enable disable isEnabled setWorkLoop
        checkForWork interruptOccurred normalInterruptOccurred disableInterruptOccurred warmCPU
        enablePrimaryInterruptTimestamp getPimaryInterruptTimestamp filterInterruptEventSource getFilterAction
        signalInterrupt
    """,
    "IOMemoryMap": """
        getVirtualAddress getPhysicalSegment getPhysicalAddress getLength getAddressTask getMemoryDescriptor
        getMapOptions unmap taskDied redirect getAddress getSize wireRange
    """,
    "IOMemoryCursor": "withSpecification initWithSpecification genPhysicalSegments",
    "IONaturalMemoryCursor": "outputSegment withSpecification initWithSpecification getPhysicalSegments",
    "IOBigMemoryCursor": "outputSegment withSpecification initWithSpecification getPhysicalSegments",
    "IOLittleMemoryCursor": "outputSegment withSpecification initWithSpecification getPhysicalSegments",
    "IODMACommand": """
        OutputHost32 OutputBig32 OutputLittle32 OutputHost64 OutputBig64 OutputLittle64 withSpecification
        weakWithSpecification withRefCon cloneCommand initWithSpecification setMemoryDescriptor clearMemoryDescriptor
        getMemoryDescriptor getIOMemoryDescriptor prepare complete synchronize genIOVMSegments gen32IOVMSegments
        gen64IOVMSegments readBytes writeBytes prepareWithSpecification getPreparedOffsetAndLength getNumAddressBits
        getAlignment getAlignmentLength getAlignmentInternalSegments createCopyBuffer
    """,
    "IOMapper": """
        checkForSystemMapper copyMapperForDevice copyMapperForDeviceWithIndex getPageSize iovmMapMemory
        iovmUnmapMemory iovmInsert mapToPhysicalAddress
    """,
}
IOKIT_METHODS = {cls: names.split() for cls, names in IOKIT.items()}

DRIVERKIT_METHODS = [
    "IOBufferMemoryDescriptor::Create",
    "IOBufferMemoryDescriptor::GetAddressRange",
    "IOBufferMemoryDescriptor::SetLength",
    "IOMemoryDescriptor::GetLength",
    "IOMemoryDescriptor::CreateMapping",
    "IOMemoryDescriptor::CreateSubMemoryDescriptor",
    "IOMemoryDescriptor::CreateWithMemoryDescriptors",
    "IOMemoryMap::GetAddress",
    "IOMemoryMap::GetLength",
    "IOMemoryMap::GetOffset",
    "IODMACommand::Create",
    "IODMACommand::PrepareForDMA",
    "IODMACommand::CompleteDMA",
    "IODMACommand::GetPreparation",
    "IODMACommand::PerformOperation",
    "IOInterruptDispatchSource::Create",
    "IOInterruptDispatchSource::GetInterruptType",
    "IOInterruptDispatchSource::SetHandler",
    "IOInterruptDispatchSource::SetEnableWithCompletion",
    "IOInterruptDispatchSource::GetLastInterrupt",
    "IOInterruptDispatchSource::Cancel",
]
