"""Functions for processes of multiprocessing, which import this module."""

from multiprocessing.connection import Connection

import iobmd


def look(handle: iobmd.Handle, answer: "Connection[object, object]") -> None:
    """Send the contents of the memory, and write to it."""
    with iobmd.attach(handle, wired=False) as buffer:
        answer.send((buffer.readBytes(0, 5), len(buffer), buffer.getCapacity()))
        buffer.writeBytes(100, b"from there")


class Holder:
    """An object of a user that holds buffers."""

    def __init__(self, *buffers: iobmd.IOBufferMemoryDescriptor) -> None:
        self.named = {"buffers": buffers}


class LateHolder(Holder):
    """One that calls `share` while it is pickled, as the first of its process."""

    def __getstate__(self) -> dict[str, object]:
        return {"handles": [iobmd.share(buffer) for buffer in self.named["buffers"]]}

    def __setstate__(self, state: dict[str, list[iobmd.Handle]]) -> None:
        self.named = {"buffers": tuple(iobmd.attach(handle) for handle in state["handles"])}
        for handle in state["handles"]:
            handle.close()


class NamedBuffer(iobmd.IOBufferMemoryDescriptor):
    """A subclass of a user, whose constructor has an argument."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def answer_in(holder: Holder, answer: "Connection[object, object]") -> None:
    """Report the contents of its buffers, and write a reply into each."""
    answer.send([(buffer.readBytes(0, 5), len(buffer), buffer.wiring.name) for buffer in holder.named["buffers"]])
    for buffer in holder.named["buffers"]:
        buffer.writeBytes(100, b"reply")
        buffer.free()


def increment(buffer: iobmd.IOBufferMemoryDescriptor) -> int:
    """Add one to the first byte, and return it."""
    with buffer:
        buffer[0] += 1
        return buffer[0]
