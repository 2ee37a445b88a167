"""A userspace driver for Intel's 82540EM Ethernet controller, which QEMU calls e1000.

It is the second example of a driver, and the subject of docs/porting.md, which shows it next to its IOKit form:
registers, an interrupt, two rings of descriptors, and frames that are gathered from several pieces of memory.

Numbers are those of Intel's "PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual".
"""

from .card import Card

__all__ = ["Card"]
