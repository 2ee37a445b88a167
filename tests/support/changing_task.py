"""A task whose memory changes with each line that it reads; it prints its pid, the address, and a checksum.

`python3 -m support.changing_task SIZE`
"""

import ctypes
import mmap
import os
import sys
import zlib

_BLOCK = 1 << 16


def main() -> None:
    """Run until the input ends."""
    size = int(sys.argv[1])
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    while True:
        block = os.urandom(_BLOCK)
        for number, offset in enumerate(range(0, size, _BLOCK)):
            part = (block[number % _BLOCK :] + block[: number % _BLOCK])[: size - offset]
            memory[offset : offset + len(part)] = part
        print(os.getpid(), address, zlib.crc32(memory), flush=True)
        if not sys.stdin.readline():
            break


if __name__ == "__main__":
    main()
