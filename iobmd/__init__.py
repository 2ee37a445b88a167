"""Wired memory with known physical addresses on Linux, from Python, under IOKit's names.

>>> import iobmd
>>> with iobmd.allocate(65536) as buf:
...     buf.writeBytes(0, b"hello"), buf.wiring
(5, <Wiring.PINNED: 'pinned'>)
"""

import sys
from typing import TYPE_CHECKING

from iobmd import constants
from iobmd._version import __version__
from iobmd.constants import *  # noqa: F403

# The whole library is imported now, not when a name is first used: at that time there may be other threads, the
# process may have been forked, or no file descriptor may be free. None of this applies to the command.
if TYPE_CHECKING or "iobmd_command" not in sys.modules:
    from iobmd import dmabuf, rdma  # noqa: F401 (as iobmd.dmabuf)
    from iobmd._native.pagemap import PhysicalSegment
    from iobmd.api import allocate, copy, snapshot
    from iobmd.cache import CacheItem, CacheStatistics, PurgeableCache
    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor
    from iobmd.descriptors.composite import (
        IOInterleavedMemoryDescriptor,
        IOMultiMemoryDescriptor,
        IOSubMemoryDescriptor,
    )
    from iobmd.descriptors.descriptor import IOMemoryDescriptor
    from iobmd.descriptors.device_memory import IODeviceMemory
    from iobmd.descriptors.guard_pages import IOGuardPageMemoryDescriptor
    from iobmd.descriptors.memory_map import IOMemoryMap
    from iobmd.descriptors.usage import Statistics, Usage, statistics, trim
    from iobmd.device.interrupts import IOInterruptEventSource
    from iobmd.dma import (
        IOBigMemoryCursor,
        IODMACommand,
        IOLittleMemoryCursor,
        IOMemoryCursor,
        IONaturalMemoryCursor,
        kIODMACommandOutputBig32,
        kIODMACommandOutputBig64,
        kIODMACommandOutputHost32,
        kIODMACommandOutputHost64,
        kIODMACommandOutputLittle32,
        kIODMACommandOutputLittle64,
    )
    from iobmd.errors import (
        BadArgumentError,
        BusyError,
        CannotWireError,
        IOReturnError,
        NoMemoryError,
        NoResourcesError,
        NotFoundError,
        NotOpenError,
        NotPermittedError,
        NotPrivilegedError,
        NotReadyError,
        TaskTimeoutError,
        UnsupportedError,
        VMError,
    )
    from iobmd.iommu import IOMapper
    from iobmd.memory.mlock import Wiring
    from iobmd.physical.layout import Layout
    from iobmd.physical.policy import policy
    from iobmd.purgeable.purger import purge
    from iobmd.remote.core_summary import CoreSummary
    from iobmd.remote.task_snapshot import Missing, Snapshot
    from iobmd.sharing import Handle, attach, share
    from iobmd.task.task import Task, current_task, get_task_map, kernel_task

    __all__ = [
        "BadArgumentError",
        "BusyError",
        "CacheItem",
        "CacheStatistics",
        "CoreSummary",
        "CannotWireError",
        "Handle",
        "IOBigMemoryCursor",
        "IOBufferMemoryDescriptor",
        "IODMACommand",
        "IODeviceMemory",
        "IOGuardPageMemoryDescriptor",
        "IOInterleavedMemoryDescriptor",
        "IOInterruptEventSource",
        "IOLittleMemoryCursor",
        "IOMapper",
        "IOMemoryCursor",
        "IOMemoryDescriptor",
        "IOMemoryMap",
        "IOMultiMemoryDescriptor",
        "IONaturalMemoryCursor",
        "IOReturnError",
        "IOSubMemoryDescriptor",
        "Layout",
        "Missing",
        "NoMemoryError",
        "NoResourcesError",
        "NotFoundError",
        "NotOpenError",
        "NotPermittedError",
        "NotPrivilegedError",
        "NotReadyError",
        "PhysicalSegment",
        "PurgeableCache",
        "Snapshot",
        "Statistics",
        "Task",
        "TaskTimeoutError",
        "UnsupportedError",
        "Usage",
        "VMError",
        "Wiring",
        "__version__",
        "allocate",
        "attach",
        "copy",
        "current_task",
        "get_task_map",
        "kIODMACommandOutputBig32",
        "kIODMACommandOutputBig64",
        "kIODMACommandOutputHost32",
        "kIODMACommandOutputHost64",
        "kIODMACommandOutputLittle32",
        "kIODMACommandOutputLittle64",
        "kernel_task",
        "policy",
        "purge",
        "share",
        "snapshot",
        "statistics",
        "trim",
    ]
    __all__ += constants.__all__

    _MODULES = ("dmabuf", "host", "iommu", "pagemap", "rdma", "tools")

    def __dir__() -> list[str]:
        """Return the documented names, including those of documented modules that are loaded."""
        return sorted([*__all__, *(name for name in _MODULES if name in globals())])
