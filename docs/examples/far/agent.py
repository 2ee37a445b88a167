"""The agent, on the machine of the task: `python3 -m far.agent DEVICE`. It serves one caller, by standard input."""

import contextlib
import sys
from collections.abc import Iterator

import pyverbs.enums as verbs

import iobmd
import iobmd.rdma

from . import messages
from .queue_pair import QueuePair


def main() -> int:
    """Serve the caller until its input ends, and return 0, or 1 if the first message could not be served."""
    (device,) = sys.argv[1:]
    try:
        with _opened(device) as (snapshot, queue_pair):
            while wanted := messages.receive(sys.stdin):
                _serve(snapshot, queue_pair, int(str(wanted["address"])), int(str(wanted["size"])))
    except iobmd.IOReturnError as failure:
        messages.send(sys.stdout, **messages.error(failure))
        return 1
    return 0


@contextlib.contextmanager
def _opened(device: str) -> Iterator[tuple[iobmd.Snapshot, QueuePair]]:
    """Connect to the caller, and make the snapshot of the task that it names."""
    first = messages.receive(sys.stdin)
    if first is None:
        raise iobmd.NotOpenError("the caller has closed the connection before its first message")
    with (
        QueuePair(device, access=verbs.IBV_ACCESS_REMOTE_READ) as queue_pair,
        iobmd.snapshot(int(str(first["pid"]))) as snapshot,
    ):
        queue_pair.connect(messages.Station(*first["station"]))
        messages.send(sys.stdout, station=queue_pair.here, stopped_ns=snapshot.stopped_ns)
        yield snapshot, queue_pair


def _serve(snapshot: iobmd.Snapshot, queue_pair: QueuePair, address: int, size: int) -> None:
    """Register a copy of a range for the caller, until its next message."""
    try:
        # Pageable: the region pins it, and it counts once against RLIMIT_MEMLOCK.
        with (
            iobmd.copy(snapshot, address, size, wired=False) as copy,
            iobmd.rdma.register(copy, queue_pair.domain, verbs.IBV_ACCESS_REMOTE_READ) as region,
        ):
            messages.send(sys.stdout, address=region.address, key=region.rkey)
            messages.receive(sys.stdin)  # the caller has read it
    except iobmd.IOReturnError as failure:
        messages.send(sys.stdout, **messages.error(failure))


if __name__ == "__main__":
    sys.exit(main())
