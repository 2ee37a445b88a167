"""Passing file descriptors and data of this process to a guest in another task.

They are sent through a socket pair that the guest creates. This process fetches one end of the pair (pidfd_getfd(2),
Linux 5.6), so that the namespaces and the root directory of the task do not matter. The guest has its own descriptor
table: no thread of the task can copy, replace or redirect a descriptor in it. The task can overwrite the memory that
these calls use, data included; nothing is read back from it. To write data to absent pages of the task, this process
would need a child that can be killed if the page faults are not served (`iobmd.task.attempt`), and a millisecond.

A process that may trace the task can nevertheless copy the descriptor from the guest (pidfd_getfd). Memory that is
mapped read-only there is therefore sent by `read_only`, other memory by `separate`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from typing import TYPE_CHECKING

from iobmd.errors import NotPermittedError, UnsupportedError
from iobmd.memory import shmem
from iobmd.remote.guest import Result, call, map_scratch
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.remote.guest import Call, Guest

_MSG_CMSG_CLOEXEC = 0x40000000

# Offsets in the scratch memory: the ends of the socket pair, a struct msghdr with the objects it points to, data.
_ENDS, _MESSAGE, _VECTOR, _BYTE, _CONTROL, _DATA = 0, 64, 128, 192, 256, 512
_CONTROL_SIZE = 64

# Descriptor numbers of the guest, whose table was empty: the lowest free number is allocated first.
_NEAR, _FAR, RECEIVED = 0, 1, 2


class Channel:
    """A socket pair of a guest, by which it receives descriptors as number `RECEIVED`, one at a time, and data.

    Parameters
    ----------
    guest : Guest
        The guest, which can have one channel.
    room : int
        Bytes that the guest can receive as data.

    Attributes
    ----------
    guest : Guest
    data : int
        The address in the task at which the guest receives data.
    """

    def __init__(self, guest: Guest, room: int = 0) -> None:
        self.guest = guest
        self._scratch = guest.run(
            map_scratch(round_up(_DATA + room, PAGE_SIZE)),
            call("socketpair", socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC, 0, Result(0, _ENDS)),
        )[0]
        self.data = self._scratch + _DATA

    def send(self, fd: int) -> None:
        """Send the message header for recvmsg(2) to the guest, and then a descriptor. Raises OSError."""
        # A process that has copied an end may fill or empty the pair: neither makes this process wait.
        with socket.socket(fileno=self._near_end()) as near:
            near.send(self._header(), socket.MSG_DONTWAIT)
            socket.send_fds(near, [b"."], [fd], socket.MSG_DONTWAIT)

    def receiving(self) -> tuple[Call, ...]:
        """Return the calls by which the guest receives the descriptor that was sent."""
        at, size = self._scratch + _MESSAGE, len(self._header())
        return (
            call("recvfrom", _FAR, at, size, socket.MSG_DONTWAIT, 0, 0),
            call("recvmsg", _FAR, at, _MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT),
        )

    def placing(self, data: bytes) -> Call:
        """Send data to the guest; return the call by which it writes them to `data`. Raises OSError."""
        with socket.socket(fileno=self.guest.fetch(_NEAR)) as near:
            near.send(data, socket.MSG_DONTWAIT)
        return call("recvfrom", _FAR, self.data, len(data), socket.MSG_DONTWAIT, 0, 0)

    def _near_end(self) -> int:
        guest = self.guest
        try:
            return guest.fetch(_NEAR)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
                raise
            message = (
                f"cannot fetch a descriptor of task {guest.task.pid} ({error}): pidfd_getfd needs Linux 5.6, and a "
                "seccomp filter of this process may forbid it; `iobmd doctor` reports that"
            )
            refusal = NotPermittedError if error.errno == errno.EPERM else UnsupportedError
            raise refusal(message, error.errno or 0) from None

    def _header(self) -> bytes:
        """Return a struct msghdr for one byte and one descriptor, with its iovec, to be placed at `_MESSAGE`."""
        scratch, image = self._scratch, bytearray(_CONTROL + _CONTROL_SIZE - _MESSAGE)
        vector, byte, control = scratch + _VECTOR, scratch + _BYTE, scratch + _CONTROL
        struct.pack_into("=QIIQQQQI", image, 0, 0, 0, 0, vector, 1, control, _CONTROL_SIZE, 0)
        struct.pack_into("=QQ", image, _VECTOR - _MESSAGE, byte, 1)
        return bytes(image)


@contextlib.contextmanager
def separate(fd: int) -> Iterator[int]:
    """Open the object of a descriptor again, if possible.

    Flags of a descriptor and record locks belong to its open file description: with a copy of the one of this
    process, O_APPEND would redirect its writes, and F_UNLCK would release its locks.
    """
    opened = fd
    with contextlib.suppress(OSError):  # /proc is not mounted, its owner is another user, or no descriptor is free
        opened = shmem.reopen(fd)
    try:
        yield opened
    finally:
        if opened != fd:
            os.close(opened)


@contextlib.contextmanager
def read_only(fd: int) -> Iterator[int]:
    """Open the object of a descriptor for reading, so that only its owner can open it for writing again."""
    with contextlib.suppress(PermissionError):  # its owner is another user
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & (stat.S_IRWXG | stat.S_IRWXO) & ~(stat.S_IXGRP | stat.S_IXOTH):
            os.fchmod(fd, mode & (stat.S_IRWXU | stat.S_IXGRP | stat.S_IXOTH))  # F_SEAL_EXEC: execute bits stay
    opened = os.open(f"/proc/thread-self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)
