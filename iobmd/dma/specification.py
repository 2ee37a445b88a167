"""The checked limits of a device for an `IODMACommand`."""

from __future__ import annotations

from enum import KEEP, IntFlag
from typing import NamedTuple

from iobmd import constants
from iobmd._internal.arguments import check_integers, integers
from iobmd.errors import BadArgumentError
from iobmd.physical.zones import ALL_ADDRESSES
from iobmd.units import PAGE_SIZE, is_power_of_two


class MappingOptions(IntFlag, boundary=KEEP):
    """How a device accesses memory (IODMACommand.h)."""

    kMapped = constants.kIODMAMapOptionMapped
    kBypassed = constants.kIODMAMapOptionBypassed
    kNonCoherent = constants.kIODMAMapOptionNonCoherent
    kUnmapped = constants.kIODMAMapOptionUnmapped
    kTypeMask = constants.kIODMAMapOptionTypeMask
    kNoCacheStore = constants.kIODMAMapOptionNoCacheStore
    kOnChip = constants.kIODMAMapOptionOnChip
    kIterateOnly = constants.kIODMAMapOptionIterateOnly


_KNOWN = 0x3 | int(
    MappingOptions.kNoCacheStore
    | MappingOptions.kOnChip
    | MappingOptions.kIterateOnly
    | constants.kIODMAMapOptionDextOwner  # for Apple's IOMMU: the mapping belongs to a driver extension
)


# As plain integers, because `&` of an integer and a member of an enumeration takes 1 µs.
_TYPE_MASK = int(MappingOptions.kTypeMask)
_MAPPED = int(MappingOptions.kMapped)
_NON_COHERENT = int(MappingOptions.kNonCoherent)
_ITERATE_ONLY = int(MappingOptions.kIterateOnly)


class Specification(NamedTuple):
    """A device's limits; sizes in bytes, 0: no limit."""

    address_bits: int = 64
    max_segment: int = 0
    options: int = 0
    max_transfer: int = 0
    alignment: int = 1
    boundary: int = 0
    length_unit: int = 1
    """Every segment's length is a multiple of it (`alignmentLength`)."""
    internal_alignment: int = 0
    """The alignment of the addresses of all segments but the first; 0: `alignment`."""

    def checked(self) -> Specification:
        """Return the limits, with defaults for zeros.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: a limit that no transfer can satisfy, or an unknown option.
        """
        numbers = integers(
            numAddressBits=self.address_bits,
            maxSegmentSize=self.max_segment,
            mappingOptions=self.options,
            maxTransferSize=self.max_transfer,
            alignment=self.alignment,
            boundary=self.boundary,
            alignmentLength=self.length_unit,
            alignmentInternalSegments=self.internal_alignment,
        )
        return Specification(*numbers)._with_defaults()

    def _with_defaults(self) -> Specification:
        bits, alignment = self.address_bits or 64, self.alignment or 1
        unit, internal = self.length_unit or 1, self.internal_alignment or alignment
        if not PAGE_SIZE.bit_length() - 1 <= bits <= 64:
            raise BadArgumentError(
                f"a device with {bits} address bits: there must be at most 64, and enough for one page"
            )
        for number in (alignment, unit, internal):
            if not is_power_of_two(number) or number > 1 << bits - 1:
                raise BadArgumentError(
                    f"alignment {number} is not a power of two within the device's {bits} address bits"
                )
        if self.boundary and not is_power_of_two(self.boundary):
            raise BadArgumentError(f"boundary {self.boundary} is not a power of two")
        if min(self.max_segment, self.max_transfer, self.boundary) < 0:
            raise BadArgumentError("a limit cannot be negative")
        for name, limit in (("segments", self.max_segment), ("pieces between boundaries", self.boundary)):
            if 0 < limit < (most := max(alignment, unit, internal)):
                raise BadArgumentError(f"{name} of {limit} bytes cannot all start at a multiple of {most}")
        if self.options & ~_KNOWN:
            raise BadArgumentError(f"mapping options {self.options:#x} have unknown bits")
        return self._replace(
            address_bits=bits,
            alignment=alignment,
            length_unit=unit,
            internal_alignment=internal,
        )

    def for_32_bits(self) -> Specification:
        """Return the limits of a device whose segments have 32-bit addresses and lengths, unchecked.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: it has more address bits.
        """
        check_integers(numAddressBits=self.address_bits, maxSegmentSize=self.max_segment)
        if self.address_bits > 32:
            raise BadArgumentError(
                f"segments with 32-bit addresses require at most 32 address bits, not {self.address_bits}"
            )
        return self._replace(address_bits=self.address_bits or 32, max_segment=self.max_segment or 1 << 31)

    @property
    def highest(self) -> int:
        """The highest address that the device reaches."""
        return ALL_ADDRESSES >> 64 - self.address_bits

    @property
    def mask(self) -> int:
        """The mask of the addresses that it reaches, 0 if it reaches all."""
        return 0 if self.address_bits == 64 else self.highest

    @property
    def iterates_only(self) -> bool:
        """Whether bounce buffers are never used."""
        return bool(self.options & _ITERATE_ONLY)

    @property
    def buffer_alignment(self) -> int:
        """The alignment of a buffer whose segments have suitable addresses wherever it is divided."""
        return max(self.alignment, self.internal_alignment)

    @property
    def maps(self) -> bool:
        """Whether the device's addresses are those of its mapper, if it has one."""
        return self.options & _TYPE_MASK in (_MAPPED, _NON_COHERENT)

    @property
    def incoherent(self) -> bool:
        """Whether the device is not cache-coherent."""
        return self.options & _TYPE_MASK == _NON_COHERENT
