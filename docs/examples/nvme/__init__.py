"""A userspace driver for NVMe disks in three small files, as an example of the use of `iobmd`.

`pci` maps the controller's registers, `queues` allocates the memory that driver and controller share, and
`controller` is the driver. `iobmd` provides the physical addresses of that memory, and ensures that they cannot
change.

Numbers are those of the NVM Express Base Specification 1.4 and the NVM Command Set.
"""

from .controller import Controller

__all__ = ["Controller"]
