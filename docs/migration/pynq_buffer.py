"""PYNQ's allocate(): a NumPy array with a physical address.

Before:

    buffer = pynq.allocate(shape=(1024,), dtype=numpy.uint32)
    buffer[:] = range(1024)
    buffer.flush()
    accelerator.write(SOURCE, buffer.physical_address)
    buffer.freebuffer()
"""

import numpy

import iobmd
from iobmd import kIOMemoryIncoherentIOStore


class Buffer:
    """Contiguous pinned memory as an array."""

    def __init__(self, shape: tuple[int, ...], dtype: type) -> None:
        size = int(numpy.prod(shape)) * numpy.dtype(dtype).itemsize
        self.memory = iobmd.allocate(size, contiguous=True)
        self.array = self.memory.array(dtype, shape)
        self.physical_address = self.memory.getPhysicalAddress()

    def flush(self) -> None:
        """Write cache lines back; for accelerators that are not cache-coherent."""
        self.memory.performOperation(kIOMemoryIncoherentIOStore, 0, len(self.memory))

    def freebuffer(self) -> None:
        """Free the memory; the array must not be referenced elsewhere."""
        del self.array
        self.memory.free()


buffer = Buffer((1024,), numpy.uint32)
buffer.array[:] = range(1024)
buffer.flush()
print(f"{buffer.array.sum()} at {buffer.physical_address:#x}")
buffer.freebuffer()
