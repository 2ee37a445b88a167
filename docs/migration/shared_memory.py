"""multiprocessing.shared_memory: an array that several processes work on.

Before:

    block = shared_memory.SharedMemory(create=True, size=1 << 20)  # a file in /dev/shm
    pool.map(work, [(block.name, part) for part in range(2)])  # each attaches by name
    block.close()
    block.unlink()  # left in /dev/shm if the program is killed before this
"""

import multiprocessing

import iobmd

SIZE, PARTS = 1 << 20, 2


def work(block: iobmd.IOBufferMemoryDescriptor, part: int) -> None:
    """Fill a part of the memory, in another process."""
    with block:
        block.writeBytes(part * SIZE // PARTS, bytes([part + 1]) * (SIZE // PARTS))


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with iobmd.allocate(SIZE, shared=True, wired=False) as block:
        processes = [context.Process(target=work, args=(block, part)) for part in range(PARTS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        print([block.readBytes(part * SIZE // PARTS, 1)[0] for part in range(PARTS)])
