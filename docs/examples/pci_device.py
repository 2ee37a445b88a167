"""A PCI device that a program drives: its registers, bus mastering, and interrupts, with uio_pci_generic."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from iobmd import IODeviceMemory, IOInterruptEventSource

MEMORY_SPACE, BUS_MASTER, INTX_DISABLE = 0x2, 0x4, 0x400  # bits of the command register
_COMMAND = 4  # its offset in the configuration space
_NEUTRAL = "uio_pci_generic"  # a driver that only passes interrupts on


class Device:
    """A device without a driver, or bound to uio_pci_generic, which passes its interrupts on.

    Parameters
    ----------
    name : str
        The PCI address with its domain, such as "0000:01:00.0".
    kind : int
        The class code that the device must have.

    Attributes
    ----------
    registers : IOMemoryMap
        Its region 0.
    interrupts : IOInterruptEventSource or None
        None: without a driver, it must be polled.

    Raises
    ------
    OSError
        A kernel driver is bound to the device, or it is of another kind.
    """

    def __init__(self, name: str, kind: int) -> None:
        self._folder = Path("/sys/bus/pci/devices", name)
        if int((self._folder / "class").read_text(), 16) != kind:
            raise OSError(f"{name} is not of class {kind:#08x}")
        driver = (self._folder / "driver").readlink().name if (self._folder / "driver").exists() else None
        if driver not in (None, _NEUTRAL):
            raise OSError(f"{name} is bound to the driver {driver}: echo {name} > {self._folder}/driver/unbind")
        with ExitStack() as undo:  # also if a later step fails
            if driver is None:
                (self._folder / "enable").write_text("1")
                undo.callback((self._folder / "enable").write_text, "0")
            undo.callback(self._command, clear_bits=BUS_MASTER, set_bits=INTX_DISABLE)
            self._command(set_bits=MEMORY_SPACE | BUS_MASTER)
            self.registers = undo.enter_context(IODeviceMemory.ofPCI(name, 0).map())
            self.interrupts = undo.enter_context(IOInterruptEventSource.ofUIO(name)) if driver else None
            self._opened = undo.pop_all()

    def wait(self, seconds: float) -> None:
        """Wait for an interrupt, if there are any, otherwise let other threads run."""
        if self.interrupts:
            self.interrupts.enable()  # the last one masked itself; if the device still asserts it, it occurs again
            self.interrupts.wait(seconds)
        else:
            os.sched_yield()

    def close(self) -> None:
        """Disable DMA of the device and unmap its registers."""
        self._opened.close()

    def _command(self, set_bits: int = 0, clear_bits: int = 0) -> None:
        with (self._folder / "config").open("r+b", buffering=0) as config:
            now = int.from_bytes(os.pread(config.fileno(), 2, _COMMAND), "little")
            os.pwrite(config.fileno(), (now & ~clear_bits | set_bits).to_bytes(2, "little"), _COMMAND)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
