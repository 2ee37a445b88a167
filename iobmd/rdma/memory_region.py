"""`MemoryRegion`: an MR of pyverbs over the memory of a descriptor, which it retains. Imported on first use."""

from __future__ import annotations

import errno
import gc
import os
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, ClassVar, Self

from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsRDMAError

from iobmd._internal import with_block
from iobmd._internal.arguments import check_type
from iobmd.backing.dma_buf import DmaBufBacking
from iobmd.constants import IOMapOptions
from iobmd.descriptors import registrations
from iobmd.descriptors.device_access import require_device_access
from iobmd.descriptors.options import check_within
from iobmd.errors import (
    BadArgumentError,
    BusyError,
    CannotWireError,
    IOReturnError,
    NoMemoryError,
    NotOpenError,
    UnsupportedError,
)
from iobmd.host import limits
from iobmd.memory import mlock, pinning
from iobmd.memory.mlock import Wiring
from iobmd.task import obstacles
from iobmd.units import PAGE_SIZE, format_size, round_down, round_up

if TYPE_CHECKING:
    from iobmd.descriptors.descriptor import IOMemoryDescriptor


class MemoryRegion(MR):  # type: ignore[misc]
    """As returned by `iobmd.rdma.register`, which describes its parameters and errors.

    Its memory is retained by a map and a view of it, so that the memory is in use until the device has released it,
    also if the region is garbage together with its descriptor.
    """

    _makers: ClassVar[dict[int, int]] = {}
    """The process that registered each open region, by the region's id.

    Not an attribute of the region: pyverbs also calls `close` when it deallocates the object, which then has none.
    """
    _held: ExitStack | None = None
    """The use of the memory, which ends with the region."""

    def __init__(self, descriptor: IOMemoryDescriptor, pd: PD, access: int) -> None:
        check_type(PD, pd=pd)
        _require_open_domain(pd)
        _require_registrable(descriptor)
        with ExitStack() as undo:
            # The memory is neither freed nor reused while it is viewed.
            mapped = undo.enter_context(descriptor.map(IOMapOptions.kIOMapAnywhere))
            undo.enter_context(memoryview(mapped))
            address, length = mapped.getAddress(), mapped.getLength()
            try:
                mlock.within_limits(self._register_patiently, pd, length, access, address)
            except OSError as error:
                raise _refused(descriptor, address, length, error) from None
            self._makers[id(self)] = os.getpid()
            self._address, self._length = address, length
            self._keys: tuple[int, int] = super().lkey, super().rkey
            self.descriptor = descriptor
            self._held = undo.pop_all()
        registrations.add(descriptor._memory(), self)

    def _register_patiently(self, pd: PD, length: int, access: int, address: int) -> None:
        until = pinning.uncharged_at()  # once: other threads may end pins endlessly
        while True:
            try:
                return self._register(pd, length, access, address)
            except OSError as error:
                if error.errno != errno.ENOMEM or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    def _register(self, pd: PD, length: int, access: int, address: int) -> None:
        """Call the constructor of pyverbs, whose error is no OSError."""
        try:
            super().__init__(pd, length, access, address=address)
        except PyverbsRDMAError as error:
            raise OSError(error.error_code, os.strerror(error.error_code)) from None

    @property
    def is_open(self) -> bool:
        """Whether the device may access the memory for this process."""
        return self._makers.get(id(self)) == os.getpid()

    @property
    def address(self) -> int:
        """The address of its first byte, in this process and for work requests."""
        self._require_open()
        return self._address

    @property
    def length(self) -> int:
        """In bytes."""
        self._require_open()
        return self._length

    @property
    def lkey(self) -> int:
        """The key for work requests of this process."""
        self._require_open()
        return self._keys[0]

    @property
    def rkey(self) -> int:
        """The key for work requests of other processes and machines."""
        self._require_open()
        return self._keys[1]

    def _require_open(self) -> None:
        # The properties of pyverbs dereference a null pointer when the region is closed.
        if not self.is_open:
            raise NotOpenError("this MemoryRegion is closed")

    def write(self, data: bytes | str, length: int, offset: int = 0) -> None:
        """Copy the first `length` bytes of `data` to `offset`. pyverbs does not check that they are in either.

        Raises
        ------
        IOReturnError
            `kIOReturnNotOpen`; `kIOReturnBadArgument`.
        """
        content = data.encode() if isinstance(data, str) else data
        check_within(0, length, len(content), "the data")
        offset, length = check_within(offset, length, self.length, self)
        super().write(content, length, offset)

    def read(self, length: int, offset: int) -> bytes:
        """Return `length` bytes, starting at `offset`. Raises as `write`."""
        offset, length = check_within(offset, length, self.length, self)
        found: bytes = super().read(length, offset)
        return found

    def close(self) -> None:
        """End the registration: the device no longer accesses the memory. Idempotent.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy`: a memory window is bound to it.
        """
        if self._makers.get(id(self), os.getpid()) != os.getpid():
            return  # a forked child shares the descriptor of the device, by which it would end the parent's region
        try:
            super().close()
        except PyverbsRDMAError as error:
            raise BusyError(f"the device does not release the region: {error}", error.error_code) from None
        self._makers.pop(id(self), None)
        if held := self._held:
            self._held = None
            held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        with_block.leave(self.close, error)

    def __del__(self) -> None:
        # Now, because pyverbs would close it only after `_held` has released the memory.
        with suppress(IOReturnError):
            self.close()

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        state = f"{self._length} bytes at {self._address:#x}, rkey {self._keys[1]:#x}" if self.is_open else "closed"
        return f"<{type(self).__name__} {state}>"


def _require_open_domain(pd: PD) -> None:
    """Raise `kIOReturnNotOpen` for a protection domain that is closed, alone or with its context.

    pyverbs would pass a null pointer to libibverbs, which ends the process, and its properties dereference that
    pointer too. But an open domain refers to its context, and `PD.close` ends that reference.
    """
    if not any(isinstance(one, Context) for one in gc.get_referents(pd)):
        raise NotOpenError("the protection domain is closed")


def _require_registrable(descriptor: IOMemoryDescriptor) -> None:
    """Raise the named error for memory that no device can pin, or that it would keep when it is purged."""
    require_device_access(descriptor)
    owner = descriptor._usable_memory()
    if descriptor._copies_when_mapped:
        raise UnsupportedError("kIOMemoryMapCopyOnWrite: the region would be a copy of the memory")
    for origin in owner.origins():
        backing = origin.require_backing()
        if backing.purgeable:
            raise UnsupportedError(
                "purgeable memory cannot be registered, because the device would keep pages that are purged: "
                "allocate it without purgeable=True"
            )
        if isinstance(backing, DmaBufBacking):
            raise UnsupportedError(
                "the kernel does not pin the memory of a dma-buf: register the dma-buf itself "
                "(pyverbs.mr.DmaBufMR with the descriptor of iobmd.dmabuf.export), if the device supports it"
            )
        if backing.wiring is Wiring.DEVICE:
            raise UnsupportedError("memory of a device has no pages that could be registered")


def _refused(descriptor: IOMemoryDescriptor, address: int, length: int, error: OSError) -> IOReturnError:
    """Return the named error for a failed registration."""
    what, number = f"cannot register {format_size(length)} for RDMA", error.errno or 0
    start, end = round_down(address, PAGE_SIZE), round_up(address + length, PAGE_SIZE)
    if number == errno.ENOMEM and (limit := limits.pins(end - start)):
        return CannotWireError(f"{what}: {_limited(descriptor, end - start, limit)}", number)
    if number == errno.ENOMEM:
        return NoMemoryError(f"{what}: the kernel or the device does not have enough free memory", number)
    if number in (errno.EFAULT, errno.EOPNOTSUPP):
        with suppress(OSError):
            if found := obstacles.find(os.getpid(), start, end, pin=True):
                return found.kind(f"{what}: {found}", number, found.address)
    if number == errno.EINVAL:
        why = "the device refuses these accesses; remote writes and atomics require IBV_ACCESS_LOCAL_WRITE"
        return BadArgumentError(f"{what}: {why}", number)
    return UnsupportedError(f"{what}: {error.strerror}", number)


def _limited(descriptor: IOMemoryDescriptor, size: int, limit: limits.Limit) -> str:
    """Return why a limit refuses to pin pages that iobmd may have pinned as well, and the remedy."""
    text = f"the device pins {size} bytes, and {limit.name} is {limit.value} bytes, {limit.used} of them in use"
    if descriptor.wiring is not Wiring.PINNED:
        return f"{text}; {limit.remedy}"
    return (
        f"{text}, including iobmd's own pin of these pages; {limit.remedy}, or register pageable memory "
        "(wired=False), which only the device pins"
    )
