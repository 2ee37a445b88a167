"""Names and values of the contract (IOKit's headers), and how flags of several types combine."""

import iobmd
from iobmd import IOMapOptions, IOOptionBits, IOPurgeable, IOReturn, constants

IOKIT = {
    "kIODirectionNone": 0, "kIODirectionIn": 1, "kIODirectionOut": 2, "kIODirectionInOut": 3, "kIODirectionOutIn": 3,
    "kIOMemoryPhysicallyContiguous": 0x10, "kIOMemoryPageable": 0x20, "kIOMemoryPurgeable": 0x40,
    "kIOMemoryHostPhysicallyContiguous": 0x80, "kIOMemoryMapperNone": 0x800, "kIOMemoryThreadSafe": 0x100000,
    "kIOMemoryClearEncrypt": 0x200000, "kIOMemoryUseReserve": 0x800000, "kIOMemoryUnshared": 0,
    "kIOMemoryKernelUserShared": 0x10000, "kIOMapDefaultCache": 0, "kIOMapInhibitCache": 0x100,
    "kIOMapWriteThruCache": 0x200, "kIOMapCopybackCache": 0x300, "kIOMapWriteCombineCache": 0x400,
    "kIOMapAnywhere": 1, "kIOMapReadOnly": 0x1000, "kIOMapReference": 0x02000000, "kIOMapUnique": 0x04000000,
    "kIOMapPrefault": 0x10000000, "kIOMapGuardedSmall": 0x40000000, "kIOMapGuardedLarge": 0x80000000,
    "kIOMemoryPurgeableKeepCurrent": 1, "kIOMemoryPurgeableNonVolatile": 2, "kIOMemoryPurgeableVolatile": 3,
    "kIOMemoryPurgeableEmpty": 4, "kIOMemoryPurgeableVolatileGroup0": 0, "kIOMemoryPurgeableVolatileGroup7": 0x700,
    "kIOMemoryPurgeableVolatileBehaviorFifo": 0, "kIOMemoryPurgeableVolatileBehaviorLifo": 0x40,
    "kIOMemoryPurgeableVolatileOrderingObsolete": 0x20, "kIOMemoryPurgeableVolatileOrderingNormal": 0,
    "kIOReturnSuccess": 0, "kIOReturnError": 0xE00002BC, "kIOReturnNoMemory": 0xE00002BD,
    "kIOReturnNoResources": 0xE00002BE, "kIOReturnNotPrivileged": 0xE00002C1, "kIOReturnBadArgument": 0xE00002C2,
    "kIOReturnUnsupported": 0xE00002C7, "kIOReturnVMError": 0xE00002C8, "kIOReturnNotOpen": 0xE00002CD,
    "kIOReturnBusy": 0xE00002D5, "kIOReturnNotReady": 0xE00002D8, "kIOReturnCannotWire": 0xE00002DE,
    "kIOReturnNotPermitted": 0xE00002E2, "kIOReturnNotFound": 0xE00002F0, "kIOReturnInvalid": 0xE0000001,
    "kIODirectionPrepareToPhys32": 4, "kIODirectionPrepareNoFault": 8, "kIOMemoryIncoherentIOFlush": 1,
    "kIOMemoryIncoherentIOStore": 2,
}  # fmt: skip


def test_names_and_values() -> None:
    for name, value in IOKIT.items():
        assert getattr(iobmd, name) == value, name


def test_every_member_is_exported_under_its_name() -> None:
    for kind in (IOOptionBits, IOMapOptions, IOPurgeable, IOReturn):
        for name, member in kind.__members__.items():
            assert getattr(iobmd, name) == member
            assert name in iobmd.__all__
    assert len(set(constants.__all__)) == len(constants.__all__)


def test_unknown_bits_are_kept() -> None:
    assert IOOptionBits(1 << 30 | 1) == 1 << 30 | 1
    assert IOPurgeable.kIOMemoryPurgeableVolatile | IOPurgeable.kIOMemoryPurgeableVolatileGroup3 == 0x303
    assert repr(IOPurgeable(3)) == "<IOPurgeable.kIOMemoryPurgeableVolatile: 3>"
