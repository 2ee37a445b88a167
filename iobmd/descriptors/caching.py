"""How a descriptor's memory treats the processors' caches: the part of `IOMemoryDescriptor` about that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd._native import cacheline
from iobmd.constants import IOMapOptions, IOReturn, kIOMemoryIncoherentIOFlush, kIOMemoryIncoherentIOStore
from iobmd.errors import IOReturnError

if TYPE_CHECKING:
    from iobmd.backing import Backing

MODES = 0x700
"""The cache field of the options (IOTypes.h); the bit above is kIOMemoryMapperNone."""

_EFFECTIVE = IOMapOptions.kIOMapCopybackCache
_PLAIN = (int(IOMapOptions.kIOMapDefaultCache), int(IOMapOptions.kIOMapCopybackCache))


class Caching:
    """Cache modes, as far as a process has a say in them."""

    _options: int

    def _memory(self) -> Backing:
        raise NotImplementedError

    def _check_range(self, offset: int, length: int) -> None:
        raise NotImplementedError

    @property
    def cache_mode(self) -> tuple[IOMapOptions, IOMapOptions]:
        """The cache mode that was requested, and the one that the memory has.

        The second is `kIOMapCopybackCache`: Linux gives a process no other for main memory. What the descriptor reads
        and writes honours the first nevertheless, by instructions on cache lines; a view of it does not.
        """
        self._memory()
        return IOMapOptions(self._options & MODES), _EFFECTIVE

    def performOperation(self, options: int, offset: int, length: int) -> None:
        """Have the processors' caches and the memory agree about a range, for a device that does not look there.

        Parameters
        ----------
        options : int
            `kIOMemoryIncoherentIOStore`: write lines back, before a device reads. `kIOMemoryIncoherentIOFlush`: drop
            them too, before what a device wrote is read.
        offset, length : int
            The range in bytes, any: all lines that hold a byte of it.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument` when the range passes the end. `kIOReturnUnsupported`: another operation, or a
            processor without such instructions. `kIOReturnVMError`: the memory is gone, or went away during the
            operation; `.address` is the first byte. `kIOReturnNoResources`: no child process can be started.

        Notes
        -----
        By clwb, clflushopt or clflush, whichever the processor has, and mfence; on aarch64 by DC CVAC or DC CIVAC and
        DSB. A page that is not present is faulted in. Existing memory, and shared memory that cannot be sealed, may
        go away at any time: a child process that shares the address space (clone(2), CLONE_VM) flushes it, in 23 to
        50 µs more, and a fault there ends the child alone.
        """
        backing = self._memory()
        if options not in (kIOMemoryIncoherentIOFlush, kIOMemoryIncoherentIOStore):
            raise IOReturnError(IOReturn.kIOReturnUnsupported, f"operation {options:#x} is not known")
        require(cacheline.BEST)
        self._check_range(offset, length)
        backing.write_back(offset, length, drop=options == kIOMemoryIncoherentIOFlush)


def check(options: int) -> None:
    """Raise `kIOReturnUnsupported` for a cache mode that cannot be honoured."""
    mode = options & MODES
    if mode > IOMapOptions.kIOMapWriteCombineCache:
        raise IOReturnError(IOReturn.kIOReturnUnsupported, f"cache mode {mode:#x} is not one that a process can have")
    if mode not in _PLAIN:
        require(cacheline.BEST)


def require(instruction: int) -> None:
    """Raise `kIOReturnUnsupported` where there is no `instruction` on cache lines."""
    if instruction == cacheline.NONE:
        message = "this processor lets no process write back or drop cache lines (x86-64 and aarch64 do)"
        raise IOReturnError(IOReturn.kIOReturnUnsupported, message)


def of_copies(options: int) -> int:
    """Return what `Mapping.cache` is to be for these options."""
    return (options & MODES) >> 8
