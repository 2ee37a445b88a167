"""Random allocations in threads and forks, against a model of the owners of bytes."""

import itertools
import random
from collections.abc import Callable

from iobmd import IOBufferMemoryDescriptor
from support.child import in_child
from support.threads import run_all


def check_owners(
    seed: int, allocate: Callable[[random.Random], IOBufferMemoryDescriptor], *, turns: int, most: int
) -> None:
    """Allocate and free up to `most` buffers at a time in each of four threads, and occasionally in a forked child.

    No byte has two owners, and none of an earlier owner is seen: each buffer has a unique pattern.
    """
    numbers = itertools.count(1)

    def work(thread: int) -> None:
        chance = random.Random(seed << 8 | thread)
        mine: list[tuple[IOBufferMemoryDescriptor, bytes]] = []
        for turn in range(turns):
            if len(mine) < most and chance.random() < 0.55:
                buffer = allocate(chance)
                size = buffer.getCapacity()
                assert not any(buffer.readBytes(0, size))
                pattern = (next(numbers).to_bytes(8, "little") * (size // 8 + 1))[:size]
                buffer.writeBytes(0, pattern)
                mine.append((buffer, pattern))
            elif mine:
                buffer, pattern = mine.pop(chance.randrange(len(mine)))
                assert buffer.readBytes(0, len(pattern)) == pattern
                buffer.free()
            if thread == 0 and turn % (turns // 4) == turns // 8:
                assert in_child(lambda: all(one.getCapacity() for one in [allocate(chance)])) is True
        for buffer, pattern in mine:
            assert buffer.readBytes(0, len(pattern)) == pattern
            buffer.free()

    run_all(*(lambda thread=thread: work(thread) for thread in range(4)))
