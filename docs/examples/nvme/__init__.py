"""A userspace driver for NVMe disks in two small modules, as an example of the use of `iobmd`.

`queues` allocates the memory that driver and controller share, and `controller` is the driver. `iobmd` maps the
controller's registers, receives its interrupts, provides the physical addresses of that memory, and ensures that they
cannot change. `pci_device`, next to this package, enables the device.

Numbers are those of the NVM Express Base Specification 1.4 and the NVM Command Set.
"""

from .controller import Controller

__all__ = ["Controller"]
