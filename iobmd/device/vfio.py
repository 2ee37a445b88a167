"""Devices of VFIO (linux/vfio.h): their regions, their interrupts, and the export of regions as dma-bufs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import weakref
from typing import TYPE_CHECKING, NamedTuple, Protocol

from iobmd._internal.process_local import Fd, Guard
from iobmd.constants import IOReturn
from iobmd.device import pci
from iobmd.device.region import Region
from iobmd.errors import BadArgumentError, BusyError, IOReturnError, NotReadyError, UnsupportedError
from iobmd.host import limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

BASE = ord(";") << 8 | 100
"""_IO(VFIO_TYPE, VFIO_BASE)."""
_REGION_INFO, _IRQ_INFO, _SET_IRQS, _FEATURE = BASE + 8, BASE + 9, BASE + 10, BASE + 17
_REGION = struct.Struct("=IIIIQQ")  # vfio_region_info: argsz, flags, index, cap_offset, size, offset
_READ, _WRITE, _MMAP, _CAPABILITIES = 1, 2, 4, 8
HEADER = struct.Struct("=HHI")
"""vfio_info_cap_header: id, version, next."""
_SPARSE_MMAP = 1
CONFIGURATION = 7
"""VFIO_PCI_CONFIG_REGION_INDEX."""

_IRQ = struct.Struct("=IIII")  # vfio_irq_info: argsz, flags, index, count
_MASKABLE, _AUTOMATIC = 2, 4
_SET = struct.Struct("=IIIII")  # vfio_irq_set: argsz, flags, index, start, count
_NO_DATA, _EVENTFDS = 1, 4
_MASK, _UNMASK, _TRIGGER = 8, 16, 32

KINDS = {"intx": 0, "msi": 1, "msix": 2, "error": 3, "request": 4}
"""The kinds of interrupts of PCI devices, by their VFIO_PCI_…_IRQ_INDEX."""

_GET, _DMA_BUF = 1 << 16, 11  # VFIO_DEVICE_FEATURE_…
_EXPORT = struct.Struct("=IIIIIIQQ")  # argsz, flags; region_index, open_flags, flags, nr_ranges; offset, length


class Attached(Protocol):
    """A device that is attached to VFIO, as `IOMapper` attaches it."""

    name: str

    def fileno(self) -> int:
        """Return VFIO's descriptor of the device."""


def control(descriptor: Fd, request: int, argument: int | bytes | bytearray) -> int:
    """Call ioctl(2), and return its result. Raises OSError."""
    with descriptor.use() as number:
        result = fcntl.ioctl(number, request, argument)
    return result if isinstance(result, int) else 0  # for a bytes argument, ioctl returns a changed copy


def capabilities(info: bytearray, first: int) -> dict[int, int]:
    """Return the offset of each capability in an information structure, by its id."""
    found, at = {}, first
    while at:
        kind, _version, following = HEADER.unpack_from(info, at)
        found[kind] = at
        at = following
    return found


def _own(device: Attached) -> Fd:
    """Return a descriptor of the device that remains open when its mapper is closed. Raises as `Attached.fileno`.

    Raises TypeError for an object without the methods of a mapper, whose class this module may not import, and
    `kIOReturnNoResources` if no file descriptor is free.
    """
    if not hasattr(device, "iovmMapMemory"):
        raise TypeError(f"mapper must be an IOMapper, not {device!r}")
    number, what = device.fileno(), f"VFIO's descriptor of {device.name}"
    try:
        own = Fd(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 0), what)
    except OSError as error:
        raise limits.from_oserror(error, f"cannot duplicate {what}") from None
    device.fileno()  # raises if another thread has closed it: the number may have been that of another device
    return own


def eventfd(what: str) -> Fd:
    """Return an eventfd. Raises `kIOReturnNoResources` if no file descriptor is free."""
    try:
        return Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), what)
    except OSError as error:
        raise limits.from_oserror(error, f"cannot create {what}") from None


class VFIORegion(Region):
    """A region of a device that is attached to VFIO.

    Parameters
    ----------
    device : Attached
        The device, by its `IOMapper`.
    number : int
        0 to 5: the base address registers; 6: the ROM; 7: the configuration space.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: there is no such region.
    """

    def __init__(self, device: Attached, number: int) -> None:
        file = _own(device)
        what = f"region {number} of {device.name}"
        self._number = number
        try:
            info = _region_info(file, number)
        except (OSError, struct.error):  # struct.error: not a number of 32 bits
            info = bytearray(_REGION.size)
        _size, self._flags, _index, first, size, start = _REGION.unpack_from(info)
        if not size:
            file.close()
            raise BadArgumentError(f"there is no {what} (VFIO reports no such region)")
        self.mappable = bool(self._flags & _MMAP)
        self._areas = _areas(info, first) if self._flags & _CAPABILITIES else []
        super().__init__(what, file, start, size, address=_bus_address(device.name, number))

    def pages(self, offset: int, length: int) -> tuple[int, int]:
        """Return the offset in the file, and the size, of the pages that contain a range, as `Region.pages`."""
        if not self.mappable:
            message = f"{self.what} cannot be mapped: use readBytes and writeBytes of its descriptor"
            raise UnsupportedError(message)
        start, size = super().pages(offset, length)
        first = start - self._start
        if self._areas and not any(at <= first and first + size <= at + most for at, most in self._areas):
            there = ", ".join(f"{at:#x} to {at + most:#x}" for at, most in self._areas)
            raise UnsupportedError(f"VFIO maps only parts of {self.what}: {there}")
        return start, size

    def require_ready(self) -> None:
        """Raise `kIOReturnNotReady` if the device does not decode memory addresses: an access would fault."""
        start = _REGION.unpack_from(_region_info(self.file(), CONFIGURATION))[5]
        with self.file().use() as number:
            command = int.from_bytes(os.pread(number, 2, start + pci.COMMAND), "little")
        if not command & pci.MEMORY_SPACE:
            message = (
                f"{self.what} is disabled: set bit 1 of the command register (IODeviceMemory.ofVFIO(mapper, "
                f"{CONFIGURATION}).writeBytes({pci.COMMAND}, …))"
            )
            raise NotReadyError(message)

    def refusal(self, error: OSError) -> IOReturnError | None:
        """Return the error for an mmap(2) that failed, as `Region.refusal`."""
        return (
            BusyError(f"{self.what} is in use: {error.strerror}", error.errno) if error.errno == errno.EBUSY else None
        )

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Read a range through VFIO, which uses the widest aligned accesses."""
        with memoryview(buffer) as view, view.cast("B") as target, self.file().use() as number:
            self._move(target, lambda done: os.preadv(number, [target[done:]], self._start + offset + done))

    def write(self, offset: int, data: Buffer) -> None:
        """Write a range through VFIO, as `read_into`."""
        if not self._flags & _WRITE:
            raise UnsupportedError(f"{self.what} is read-only")
        with memoryview(data) as view, view.cast("B") as source, self.file().use() as number:
            self._move(source, lambda done: os.pwrite(number, source[done:], self._start + offset + done))

    def _move(self, data: memoryview, move: Callable[[int], int]) -> None:
        """Call a function that moves bytes from an offset on, until all are moved."""
        done = 0
        try:
            while done < len(data) and (moved := move(done)):
                done += moved
        except OSError as error:
            raise limits.from_oserror(error, f"cannot access {self.what}") from None
        if done < len(data):
            raise IOReturnError(IOReturn.kIOReturnIOError, f"{self.what} ends after {done} of {len(data)} bytes")

    def export(self, offset: int, length: int) -> int:
        """Return a dma-buf of a part, as `Region.export` (VFIO_DEVICE_FEATURE_DMA_BUF, Linux 6.19)."""
        flags = os.O_RDWR | os.O_CLOEXEC
        argument = _EXPORT.pack(_EXPORT.size, _GET | _DMA_BUF, self._number, flags, 0, 1, offset, length)
        what = f"{length} bytes at {offset:#x} of {self.what}"
        try:
            return control(self.file(), _FEATURE, bytearray(argument))  # for bytes, ioctl returns no number
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
                message = (
                    f"cannot export {what} as a dma-buf: that requires Linux 6.19 with CONFIG_VFIO_PCI_DMABUF, and a "
                    "device to whose memory other devices have access"
                )
                raise UnsupportedError(message, error.errno) from None
            if error.errno in (errno.EINVAL, errno.ENODEV):
                message = f"cannot export {what}: only whole pages of memory that can be mapped"
                raise BadArgumentError(message, error.errno) from None
            raise limits.from_oserror(error, f"cannot export {what}") from None


def _region_info(file: Fd, number: int) -> bytearray:
    info = bytearray(_REGION.pack(_REGION.size, 0, number, 0, 0, 0))
    control(file, _REGION_INFO, info)
    size = _REGION.unpack_from(info)[0]
    if size > len(info):  # with capabilities
        info = bytearray(_REGION.pack(size, 0, number, 0, 0, 0).ljust(size, b"\0"))
        control(file, _REGION_INFO, info)
    return info


def _areas(info: bytearray, first: int) -> list[tuple[int, int]]:
    """Return the offset and size of each part that can be mapped; empty if all of it can be."""
    at = capabilities(info, first).get(_SPARSE_MMAP)
    if at is None:
        return []
    (count,) = struct.unpack_from("=I", info, at + HEADER.size)
    begin = at + HEADER.size + 8
    return [struct.unpack_from("=QQ", info, begin + 16 * index) for index in range(count)]


def _bus_address(name: str, number: int) -> int | None:
    with contextlib.suppress(OSError):  # not a PCI device, or sysfs is hidden
        ranges = pci.bars(name)
        return ranges[number].start if number < len(ranges) and ranges[number].size else None
    return None


# --- interrupts


class _Kind(NamedTuple):
    """The interrupts of one kind: VFIO_IRQ_INFO_…, and their number."""

    flags: int
    number: int


def _kind_of(file: Fd, name: str | None) -> _Kind:
    if name not in KINDS:
        return _Kind(0, 0)
    info = bytearray(_IRQ.pack(_IRQ.size, 0, KINDS[name], 0))
    try:
        control(file, _IRQ_INFO, info)
    except OSError:  # a kind that this device or kernel lacks
        return _Kind(0, 0)
    _size, flags, _index, number = _IRQ.unpack(info)
    return _Kind(flags, number)


_PREFERRED, _SINGLE = ("msix", "msi", "intx"), ("intx", "error", "request")
_EXCLUSIVE = set(_PREFERRED)


def _require_kind(file: Fd, name: str, kind: str | None, number: int) -> _Kind:
    """Return the interrupts of a kind, or raise `kIOReturnBadArgument` unless the device has this one."""
    found = _kind_of(file, kind)
    if not 0 <= number < found.number:
        there = [f"{one} {other.number}" for one in KINDS if (other := _kind_of(file, one)).number]
        message = f"{name} has no interrupt {number} of kind {kind} (it has: {', '.join(there) or 'none'})"
        raise BadArgumentError(message)
    return found


class _InUse:
    """The interrupts of a device that are in use, by kind and number."""

    def __init__(self) -> None:
        self.guard = Guard()
        self.used: set[tuple[str, int]] = set()

    def kinds(self) -> set[str]:
        """Return the kinds of those interrupts: at most one of `_EXCLUSIVE`."""
        return {kind for kind, _number in self.used}


_in_use: weakref.WeakKeyDictionary[Attached, _InUse] = weakref.WeakKeyDictionary()


class VFIOLine:
    """An interrupt of a device that is attached to VFIO, which signals an eventfd.

    Parameters
    ----------
    device : Attached
        The device, by its `IOMapper`.
    kind : str, optional
        One of `KINDS`; None: the first of "msix", "msi" and "intx" that the device has.
    number : int
        Its vector.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: the device has no such interrupt. `kIOReturnBusy`: interrupts of another kind are
        enabled, or this one has a user. `kIOReturnNoResources`: the host has no vector left.
    """

    def __init__(self, device: Attached, kind: str | None, number: int) -> None:
        self._closed = True
        self._maker = os.getpid()
        device_file = _own(device)
        try:
            if kind is None:
                kind = next((one for one in _PREFERRED if _kind_of(device_file, one).number), None)
            found = _require_kind(device_file, device.name, kind, number)
            self.file = eventfd(f"interrupt {number} of {device.name}")
        except BaseException:
            device_file.close()
            raise
        self.what = f"interrupt {number} ({kind}) of {device.name}"
        self.automatic = bool(found.flags & _AUTOMATIC)
        self._maskable = bool(found.flags & _MASKABLE)
        self._device, self._kind, self._number, self._available = device_file, str(kind), number, found.number
        self._others = _in_use.setdefault(device, _InUse())
        try:
            with self._others.guard:
                self._require_free()
                if self._kind not in _SINGLE and self._kind not in self._others.kinds():
                    self._allocate()
                self._signal(self.file)
                self._others.used.add((self._kind, number))
        except BaseException:
            self.file.close()
            device_file.close()
            raise
        self._closed = False

    def _require_free(self) -> None:
        if (self._kind, self._number) in self._others.used:  # VFIO would replace its eventfd
            raise BusyError(f"{self.what} has a user: close it first")
        others = self._others.kinds() & _EXCLUSIVE - {self._kind}
        if others and self._kind in _EXCLUSIVE:
            raise BusyError(f"interrupts of kind {others.pop()} are enabled: close them before {self.what}")

    def _allocate(self) -> None:
        """Enable as many message interrupts as the device has: VFIO adds none later (before Linux 6.5)."""
        needed = self._number + 1
        for count in sorted({self._available, needed}, reverse=True):
            try:
                self._set(_EVENTFDS | _TRIGGER, 0, struct.pack(f"={count}i", *[-1] * count), count)
            except OSError as error:
                if count == needed:
                    raise limits.from_oserror(error, f"cannot enable {self.what}") from None
            else:
                return

    def _signal(self, file: Fd | None) -> None:
        """Connect it to an eventfd, or to none."""
        try:
            if file is None:
                self._set(_EVENTFDS | _TRIGGER, self._number, struct.pack("=i", -1))
                return
            with file.use() as number:
                self._set(_EVENTFDS | _TRIGGER, self._number, struct.pack("=i", number))
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EINVAL):
                raise BusyError(f"{self.what} has a user: close it first", error.errno) from None
            raise limits.from_oserror(error, f"cannot enable {self.what}") from None

    def _set(self, flags: int, start: int, data: bytes = b"", count: int = 1) -> None:
        header = _SET.pack(_SET.size + len(data), flags, KINDS[self._kind], start, count)
        control(self._device, _SET_IRQS, header + data)

    def read(self) -> int:
        """Return the number of interrupts since the last call, 0 if there were none."""
        try:
            with self.file.use() as number:
                return os.eventfd_read(number)
        except BlockingIOError:
            return 0

    def mask(self, *, masked: bool) -> None:
        """Mask or unmask it. A message interrupt is disconnected instead: VFIO does not mask those."""
        if self._maskable:
            self._set(_NO_DATA | (_MASK if masked else _UNMASK), self._number)
        else:
            self._signal(None if masked else self.file)

    def close(self) -> None:
        """Disable it, and all message interrupts with the last of them. Idempotent; for destructors too.

        A forked child only closes its descriptors: the device, and so the interrupt, is that of its parent as well.
        """
        if not self._closed:
            self._closed = True
            self._others.guard.when_free(self._disable)

    def _disable(self) -> None:
        """Disable it, with the guard held."""
        self._others.used.discard((self._kind, self._number))
        if self._maker == os.getpid():
            with contextlib.suppress(OSError):  # the device may be gone
                if self._kind in self._others.kinds():
                    self._signal(None)
                else:
                    self._set(_NO_DATA | _TRIGGER, 0, count=0)
        self.file.close()
        self._device.close()
