"""A userspace driver of NVMe disks: what `iobmd` is for, in three small files.

`pci` reaches the controller's registers, `queues` holds the memory that driver and controller share, `controller` is
the driver. Only `iobmd` tells the controller where that memory lies: at physical addresses that cannot change.

Numbers are those of the NVM Express Base Specification 1.4 and the NVM Command Set.
"""

from .controller import Controller

__all__ = ["Controller"]
