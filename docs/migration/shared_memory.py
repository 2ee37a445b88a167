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


def work(handle: iobmd.Handle, part: int) -> None:
    """Fill a part of the memory, in another process."""
    with handle, iobmd.attach(handle) as block, memoryview(block) as view:
        length = SIZE // PARTS
        view[part * length : (part + 1) * length] = bytes([part + 1]) * length


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    block = iobmd.allocate(SIZE, shared=True, wired=False)
    with block, iobmd.share(block) as handle:
        processes = [context.Process(target=work, args=(handle, part)) for part in range(PARTS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        print([block.readBytes(part * SIZE // PARTS, 1)[0] for part in range(PARTS)])
