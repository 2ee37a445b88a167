"""`python -m nvme ADDRESS` prints a disk's properties; with `BLOCK COUNT > file` it reads blocks. It never writes."""

import sys

import iobmd

from . import Controller
from .queues import PAGE


def main() -> int:
    """Run the command and return 0; errors are exceptions."""
    name, *numbers = sys.argv[1:]
    with Controller(name) as disk:
        if not numbers:
            print(disk.identity)
            return 0
        block, count = map(int, numbers)
        size = count * disk.identity.block_size
        with iobmd.allocate(-(-size // PAGE) * PAGE, direction="in") as buffer:
            disk.read(block, buffer)
            sys.stdout.buffer.write(buffer.readBytes(0, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
