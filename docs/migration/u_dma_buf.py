"""u-dma-buf: a contiguous DMA buffer of a kernel module.

Before, after `insmod u-dma-buf.ko udmabuf0=1048576`:

    with open("/sys/class/u-dma-buf/udmabuf0/phys_addr") as file:
        address = int(file.read(), 16)
    memory = mmap.mmap(os.open("/dev/udmabuf0", os.O_RDWR), 1 << 20)
    memory[:4] = b"ping"
    Path("/sys/class/u-dma-buf/udmabuf0/sync_for_device").write_text("1")
"""

import iobmd
from iobmd import kIOMemoryIncoherentIOFlush, kIOMemoryIncoherentIOStore

with iobmd.allocate(1 << 20, contiguous=True) as memory:
    address = memory.getPhysicalAddress()
    memory.writeBytes(0, b"ping")
    memory.performOperation(kIOMemoryIncoherentIOStore, 0, 4)  # sync_for_device
    # … the device reads and writes the memory at `address` …
    memory.performOperation(kIOMemoryIncoherentIOFlush, 0, 4)  # sync_for_cpu
    assert memory.readBytes(0, 4) == b"ping"
    print(f"{len(memory) >> 10} KiB at {address:#x}")
