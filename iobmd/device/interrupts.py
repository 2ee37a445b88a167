"""`IOInterruptEventSource`: the interrupts of a device, as a file that becomes readable."""

from __future__ import annotations

import math
import os
import select
import time
from typing import TYPE_CHECKING, Protocol, Self

from iobmd._internal import with_block
from iobmd._internal.arguments import check_numbers, check_type, integers
from iobmd._internal.uncopyable import Uncopyable
from iobmd.constants import IOReturn, kIOReturnSuccess
from iobmd.device.uio import UIOLine
from iobmd.device.vfio import VFIOLine, eventfd
from iobmd.errors import BadArgumentError, NotOpenError

if TYPE_CHECKING:
    from iobmd._internal.process_local import Fd
    from iobmd.device.vfio import Attached

_LONGEST = 3600.0
"""Seconds of one poll(2), whose timeout is limited."""


class _Line(Protocol):
    """An interrupt line or message."""

    what: str
    file: Fd
    automatic: bool

    def read(self) -> int:
        """Return the number of interrupts since the last call, 0 if there were none."""

    def mask(self, *, masked: bool) -> None:
        """Mask or unmask it."""

    def close(self) -> None:
        """End its use."""


class IOInterruptEventSource(Uncopyable):
    """The interrupts of a device that a process drives: waited for, counted, masked and unmasked.

    Created by `ofUIO` or `ofVFIO`. It has a `fileno()`, which is readable while interrupts have not been read:
    `select.poll`, and asyncio's `loop.add_reader(source, handler)`, accept the source itself. Use it in a `with`
    block, or `close` it, after `loop.remove_reader(source)`.

    Notes
    -----
    A process has no interrupt context. The kernel therefore masks a line (INTx) with each interrupt
    (`getAutoDisable`), and `enable` unmasks it, after the process has served the device, which no longer asserts the
    line. Message interrupts (MSI, MSI-X) are not masked.

    One thread at a time should read; the other methods may be called from any thread: `close` ends a `wait` with
    `kIOReturnNotOpen`. Forked children share the interrupts: `disable` disables them for all, but `close` only in the
    process that created the source. Source: IOInterruptEventSource.h of IOKit, whose work loop is the caller's event
    loop.
    """

    def __init__(self, line: _Line, provider: object, number: int) -> None:
        try:
            self._closing = eventfd("this IOInterruptEventSource")
        except BaseException:
            line.close()
            raise
        self._line: _Line | None = line
        self._provider, self._number = provider, number
        self._maker = os.getpid()
        self._enabled = True
        self.count = 0
        """Interrupts that were read since the source was created."""

    @classmethod
    def ofUIO(cls, device: str) -> Self:
        """Return the interrupts of a UIO device, which are enabled.

        Parameters
        ----------
        device : str
            Its name, "uio0", or the address of the PCI device to which a UIO driver is bound, "0000:00:04.0".

        Raises
        ------
        IOReturnError
            `kIOReturnNoDevice`: no such device; the message names the commands that bind a PCI device to
            uio_pci_generic. `kIOReturnNotPrivileged`: /dev/uioN may not be opened. `kIOReturnNoResources`: no file
            descriptor is free.

        Notes
        -----
        Source: Documentation/driver-api/uio-howto.rst. uio_pci_generic masks the line of a PCI device by its command
        register, and leaves unmasking to the process: `enable` therefore requires write access to the device's
        `config` in sysfs.
        """
        check_type(str, device=device)
        source = cls(UIOLine(device), device, 0)
        source.enable()
        return source

    @classmethod
    def ofVFIO(cls, mapper: Attached, index: int = 0, *, kind: str | None = None) -> Self:
        """Return interrupts of a device that is attached to VFIO, which are enabled.

        Parameters
        ----------
        mapper : IOMapper
            The mapper of the device. It may be closed before the source; the device is released with the last of
            them.
        index : int
            The number of the message (vector).
        kind : str, optional
            "msix", "msi" or "intx"; None: the first of these that the device has. "request": the kernel requests that
            the device be released, before it is unplugged. "error": an uncorrected PCI Express error (AER).

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: the device has no such interrupt. `kIOReturnBusy`: it has a user, or interrupts of
            another kind are enabled. `kIOReturnNoResources`: no file descriptor, or no vector of the host, is free.

        Notes
        -----
        The first message interrupt enables as many vectors as the device has, because VFIO could not add any later
        (before Linux 6.5). Source: linux/vfio.h.
        """
        (index,) = integers(index=index)
        return cls(VFIOLine(mapper, kind, index), mapper, index)

    def fileno(self) -> int:
        """Return the descriptor that is readable while interrupts have not been read. Do not read it directly."""
        return self._open().file.fileno()

    def read(self) -> int:
        """Return how many interrupts have occurred since the last `read` or `wait`, 0 if none, without waiting."""
        found = self._open().read()
        self.count += found
        return found

    def wait(self, timeout: float | None = None) -> int:
        """Wait for an interrupt, and return how many have occurred since the last `read` or `wait`.

        Parameters
        ----------
        timeout : float, optional
            Seconds, after which it returns 0; None: no limit.

        Raises
        ------
        IOReturnError
            `kIOReturnNotOpen`: it is closed, or another thread has closed it; `kIOReturnBadArgument`: no number.
        """
        end = math.inf if timeout is None else time.monotonic() + _seconds(timeout)
        with self._closing.use() as closing, self._open().file.use() as interrupts:
            poll = select.poll()  # select(2) accepts no descriptor above 1023
            poll.register(interrupts, select.POLLIN)
            if self._maker == os.getpid():  # it becomes readable in all processes
                poll.register(closing, select.POLLIN)
            while not (found := self.read()):
                left = end - time.monotonic()
                if left <= 0:
                    return 0
                poll.poll(math.ceil(min(left, _LONGEST) * 1000))
        return found

    def enable(self) -> IOReturn:
        """Unmask the interrupts. Idempotent.

        A line that masked itself with an interrupt is unmasked too; if the device still asserts it, another interrupt
        follows.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: the UIO driver does not mask interrupts; `kIOReturnNotPrivileged`.
        """
        self._open().mask(masked=False)
        self._enabled = True
        return kIOReturnSuccess

    def disable(self) -> IOReturn:
        """Mask the interrupts until `enable`. Idempotent.

        A line that the device asserts during that time causes an interrupt when it is unmasked. Message interrupts
        that the device sends during that time may be lost.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            As `enable`.
        """
        self._open().mask(masked=True)
        self._enabled = False
        return kIOReturnSuccess

    def isEnabled(self) -> bool:
        """Return whether `disable` has not been called since the last `enable`."""
        return self._enabled

    def getAutoDisable(self) -> bool:
        """Return whether each interrupt masks itself, so that `enable` must follow it."""
        return self._open().automatic

    def getProvider(self) -> object:
        """Return the device that was passed at its creation."""
        return self._provider

    def getIntIndex(self) -> int:
        """Return the number of the interrupt."""
        return self._number

    def close(self) -> None:
        """Disable the interrupts and close the descriptor. Idempotent, as is leaving a `with` block."""
        line, self._line = self._line, None
        if line:
            if self._maker == os.getpid():
                with self._closing.use() as closing:
                    os.eventfd_write(closing, 1)
            self._closing.close()
            line.close()

    def _open(self) -> _Line:
        line = self._line  # read once: another thread may close it
        if line is None:
            raise NotOpenError("this IOInterruptEventSource is closed")
        return line

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        with_block.leave(self.close, error)

    def __del__(self) -> None:
        if line := getattr(self, "_line", None):
            line.close()

    def __repr__(self) -> str:
        line = self._line
        return (
            f"<IOInterruptEventSource of {line.what}, count {self.count}>"
            if line
            else "<IOInterruptEventSource closed>"
        )


def _seconds(timeout: float) -> float:
    """Return a timeout as Python's number: sums of NumPy's narrow ones are imprecise or infinite."""
    check_numbers(timeout=timeout)
    if math.isnan(seconds := float(timeout)):
        raise BadArgumentError("the timeout is not a number")
    return seconds
