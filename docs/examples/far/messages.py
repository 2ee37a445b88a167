"""The messages of caller and agent, one line of JSON each, through the agent's standard input and output.

They contain what each side must know about the other to use RDMA. The caller sends its `Station` and the pid, and
then the ranges that it wants. The agent sends its `Station`, and then address and key of each range, or the error.
"""

import json
from typing import IO, NamedTuple

from iobmd import IOReturn, IOReturnError


class Station(NamedTuple):
    """One side of a connection, as the other must know it (struct ibv_qp_attr)."""

    gid: str
    lid: int
    queue_pair: int
    first_packet: int
    mtu: int


def send(file: IO[str], **message: object) -> None:
    """Send a message."""
    file.write(json.dumps(message) + "\n")
    file.flush()


def receive(file: IO[str]) -> dict[str, object] | None:
    """Return the next message, None at the end. Raises the error that it contains."""
    line = file.readline()
    if not line.endswith("\n"):
        return None
    message: dict[str, object] = json.loads(line)
    if "error" in message:
        raise IOReturnError(IOReturn[str(message["code"])], str(message["error"]))
    return message


def error(failure: IOReturnError) -> dict[str, object]:
    """Return the contents of a message with an error."""
    return {"error": failure.strerror, "code": IOReturn(failure.code).name}
