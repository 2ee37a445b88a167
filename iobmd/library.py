"""All that `import iobmd` promises, loaded in one step when the first of its names is used."""

from iobmd._native.runs import PhysicalSegment
from iobmd.budget import policy
from iobmd.buffer import IOBufferMemoryDescriptor
from iobmd.cache import CacheItem, CacheStatistics, PurgeableCache
from iobmd.descriptor import IOMemoryDescriptor
from iobmd.dma import IODMACommand
from iobmd.errors import IOReturnError
from iobmd.facade import allocate, copy
from iobmd.family import IOMultiMemoryDescriptor, IOSubMemoryDescriptor
from iobmd.handover import Handle, attach, share
from iobmd.mapping import IOMemoryMap
from iobmd.physical import Layout
from iobmd.purgeable.purger import purge
from iobmd.task import Task, current_task, get_task_map, kernel_task
from iobmd.wiring import Wiring

__all__ = [
    "CacheItem",
    "CacheStatistics",
    "Handle",
    "IOBufferMemoryDescriptor",
    "IODMACommand",
    "IOMemoryDescriptor",
    "IOMemoryMap",
    "IOMultiMemoryDescriptor",
    "IOReturnError",
    "IOSubMemoryDescriptor",
    "Layout",
    "PhysicalSegment",
    "PurgeableCache",
    "Task",
    "Wiring",
    "allocate",
    "attach",
    "copy",
    "current_task",
    "get_task_map",
    "kernel_task",
    "policy",
    "purge",
    "share",
]
