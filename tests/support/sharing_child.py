"""What runs in processes of multiprocessing, which import it."""

from multiprocessing.connection import Connection

import iobmd


def look(handle: iobmd.Handle, answer: "Connection[object, object]") -> None:
    """Tell what is there, and leave something."""
    with iobmd.attach(handle, wired=False) as buffer:
        answer.send((buffer.readBytes(0, 5), len(buffer), buffer.getCapacity()))
        buffer.writeBytes(100, b"from there")
