"""Names and values of the contract (IOKit's headers), and how flags of several types combine."""

import ast
from enum import EnumType
from itertools import pairwise
from pathlib import Path

import iobmd
from iobmd import IOOptionBits, IOPurgeable, constants

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
    "kIODirectionPrepareToPhys32": 4, "kIODirectionPrepareNoFault": 8, "kIODirectionPrepareReserved1": 0x10,
    "kIODirectionPrepareNoZeroFill": 0x10, "kIODirectionPrepareNonCoherent": 0x20,
    "kIODirectionCompleteWithError": 0x40,
    "kIODirectionCompleteWithDataValid": 0x80, "kIOMemoryIncoherentIOFlush": 1, "kIOMemoryIncoherentIOStore": 2,
    "kIOMemoryClearEncrypted": 50, "kIOMemorySetEncrypted": 51,
    "kIOMemoryHostOnly": 0x1000, "kIOMemoryMapCopyOnWrite": 0x20000, "kIOMemoryRemote": 0x40000,
    "kIOMemorySharingTypeMask": 0xF0000, "kIOMemoryDirectionMask": 7, "kIOMemoryTypeVirtual": 0x10,
    "kIOMemoryTypePhysical": 0x20, "kIOMemoryTypeUPL": 0x30, "kIOMemoryTypePersistentMD": 0x40,
    "kIOMemoryTypeUIO": 0x50, "kIOMemoryTypeVirtual64": 0x10, "kIOMemoryTypePhysical64": 0x20,
    "kIOMemoryTypeMask": 0xF0, "kIOMemoryAsReference": 0x100, "kIOMemoryBufferPageable": 0x400,
    "kIOMemoryPersistent": 0x10000, "kIOMemoryPurgeableFaultOnAccess": 0x2000,
    "kIOMemoryLedgerTagDefault": 1, "kIOmemoryLedgerTagNetwork": 2, "kIOmemoryLedgerTagMedia": 3,
    "kIOmemoryLedgerTagGraphics": 4, "kIOmemoryLedgerTagNeural": 5, "kIOMemoryLedgerFlagNoFootprint": 1,
    "kIOMemoryLedgerTagMedia": 3, "kIOMemoryLedgerTagGraphics": 4, "kIOMemoryLedgerTagNeural": 5,
    "kIOBufferDescriptorMemoryFlags": 0xB00807,
    "kIODMAMapReadAccess": 1, "kIODMAMapWriteAccess": 2, "kIODMAMapPhysicallyContiguous": 0x10,
    "kIODMAMapDeviceMemory": 0x20, "kIODMAMapPagingPath": 0x40, "kIODMAMapIdentityMap": 0x80,
    "kIODMAMapPageListFullyOccupied": 0x100, "kIODMAMapFixedAddress": 0x200, "kIOMapperUncached": 1,
    "kIOPreparationIDUnprepared": 0, "kIOPreparationIDUnsupported": 1, "kIOPreparationIDAlwaysPrepared": 2,
    "kIODefaultMemoryType": 0, "kIODefaultCache": 0, "kIOInhibitCache": 1, "kIOWriteThruCache": 2,
    "kIOCopybackCache": 3, "kIOWriteCombineCache": 4, "kIOCopybackInnerCache": 5, "kIOPostedWrite": 6,
    "kIORealTimeCache": 7, "kIOPostedReordered": 8, "kIOPostedCombinedReordered": 9,
    "kIOMapCacheMask": 0xF00, "kIOMapCacheShift": 8, "kIOMapCopybackInnerCache": 0x500, "kIOMapPostedWrite": 0x600,
    "kIOMapRealTimeCache": 0x700, "kIOMapPostedReordered": 0x800, "kIOMapPostedCombinedReordered": 0x900,
    "kIOMapUserOptionsMask": 0xFFF, "kIOMapStatic": 0x01000000, "kIOMapOverwrite": 0x20000000,
    "kIOMapGuardedMask": 0xC0000000,
    "kIODMAMapOptionMapped": 0, "kIODMAMapOptionBypassed": 1, "kIODMAMapOptionNonCoherent": 2,
    "kIODMAMapOptionUnmapped": 3, "kIODMAMapOptionTypeMask": 0xF, "kIODMAMapOptionNoCacheStore": 0x10,
    "kIODMAMapOptionOnChip": 0x20, "kIODMAMapOptionIterateOnly": 0x40, "kIODMAMapOptionDextOwner": 0x80,
    # DriverKit: IOMemoryDescriptor.iig, IODMACommand.iig
    "kIOMemoryDirectionNone": 0, "kIOMemoryDirectionIn": 1, "kIOMemoryDirectionOut": 2,
    "kIOMemoryDirectionOutIn": 3, "kIOMemoryDirectionInOut": 3, "kIOMemoryDisableCopyOnWrite": 0x10,
    "kIOMemoryMapFixedAddress": 1, "kIOMemoryMapReadOnly": 2, "kIOMemoryMapGuardedMask": 0x1C,
    "kIOMemoryMapGuardedDefault": 0, "kIOMemoryMapGuardedNone": 4, "kIOMemoryMapGuardedSmall": 8,
    "kIOMemoryMapGuardedLarge": 0xC, "kIOMemoryMapCacheModeDefault": 0, "kIOMemoryMapCacheModeInhibit": 0x100,
    "kIOMemoryMapCacheModeCopyback": 0x200, "kIOMemoryMapCacheModeWriteThrough": 0x400,
    "kIOMemoryMapCacheModeRealTime": 0x800, "kIODMACommandCreateNoOptions": 0,
    "kIODMACommandPrepareForDMANoOptions": 0, "kIODMACommandCompleteDMANoOptions": 0,
    "kIODMACommandSpecificationNoOptions": 0, "kIODMACommandPerformOperationOptionRead": 1,
    "kIODMACommandPerformOperationOptionWrite": 2, "kIODMACommandPerformOperationOptionZero": 4,
}  # fmt: skip


def test_names_and_values() -> None:
    """Also of every other constant that is exported: none has a value that the headers do not give it."""
    others = {name for name in constants.__all__ if name.startswith("k")} - IOKIT.keys()
    assert all(name.startswith(("kIOReturn", "kIOMemoryPurgeableVolatileGroup")) for name in others), others
    for name, value in IOKIT.items():
        assert getattr(iobmd, name) == value, name


def test_every_member_is_exported_under_its_name() -> None:
    for kind in [kind for kind in vars(constants).values() if isinstance(kind, EnumType)]:
        for name, member in kind.__members__.items():
            assert getattr(iobmd, name) == member
            assert name in iobmd.__all__
    assert len(set(constants.__all__)) == len(constants.__all__)


def test_unknown_bits_are_kept() -> None:
    assert IOOptionBits(1 << 30 | 1) == 1 << 30 | 1
    assert IOPurgeable.kIOMemoryPurgeableVolatile | IOPurgeable.kIOMemoryPurgeableVolatileGroup3 == 0x303
    assert repr(IOPurgeable(3)) == "<IOPurgeable.kIOMemoryPurgeableVolatile: 3>"


def test_every_member_is_explained() -> None:
    """By a string below it, which the reference shows."""
    classes = [
        found
        for file in Path(constants.__file__).parent.glob("*.py")
        for found in ast.parse(file.read_text()).body
        if isinstance(found, ast.ClassDef)
    ]
    pairs = [
        pair for found in classes for pair in pairwise([*found.body, ast.Pass()]) if isinstance(pair[0], ast.Assign)
    ]
    assert len(pairs) > 150
    for member, below in pairs:
        assert isinstance(below, ast.Expr), ast.unparse(member)
