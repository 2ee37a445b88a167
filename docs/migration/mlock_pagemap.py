"""mlock and /proc/self/pagemap, by hand: physical addresses of locked memory.

Before:

    memory = mmap.mmap(-1, size)
    libc.mlock(address, size)
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address // 4096 * 8)
        entries = struct.unpack(f"{size // 4096}Q", pagemap.read(size // 4096 * 8))
    addresses = [(entry & (1 << 55) - 1) * 4096 for entry in entries]  # of this moment
"""

import iobmd

SIZE = 1 << 20

with iobmd.allocate(SIZE) as buffer:
    memoryview(buffer)[:5] = b"hello"
    segments = buffer.segments()
    pages = [address + offset for address, length in segments for offset in range(0, length, 4096)]
    buffer.verify()  # no page has moved
    print(f"{len(pages)} pages in {len(segments)} segments, {buffer.wiring.value}")
