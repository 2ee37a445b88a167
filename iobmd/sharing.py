"""Handing shared memory to a process that cooperates: `share` it here, `attach` it there; no privilege, no ptrace."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, SupportsIndex

from iobmd._internal import process_local
from iobmd._native import mman
from iobmd.backing.mapped import private
from iobmd.backing.shared import SharedBacking
from iobmd.constants import IOOptionBits, IOReturn
from iobmd.descriptors.buffer import IOBufferMemoryDescriptor
from iobmd.descriptors.options import check_request
from iobmd.errors import BadArgumentError, IOReturnError, NotOpenError
from iobmd.host import limits
from iobmd.memory import shmem
from iobmd.memory.shmem import Extent, SharedObject
from iobmd.purgeable.shared import TRAILER
from iobmd.task.task import kernel_task
from iobmd.units import PAGE_SIZE, is_power_of_two

if TYPE_CHECKING:
    import socket as sockets

_HEADER = struct.Struct("=6sxxI")  # a mark, and the length of the description behind it; the descriptor goes with it
_MARK = b"iobmd1"
_LARGEST = 1 << 20  # bytes of a description
_MOST_PIECES = 16 << 10  # each is a mapping, of which a process may have 65,530 (vm.max_map_count)
_MOST_FDS = 253  # that a message can have (SCM_MAX_FD in linux/net.h)
_LARGEST_ALIGNMENT = 1 << 40
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_SO_PASSCRED, _SCM_CREDENTIALS = 16, 2  # asm-generic/socket.h, linux/socket.h
_PAGEABLE = int(IOOptionBits.kIOMemoryPageable)
_PURGEABLE = int(IOOptionBits.kIOMemoryPurgeable)
_CONTIGUOUS = int(IOOptionBits.kIOMemoryPhysicallyContiguous | IOOptionBits.kIOMemoryHostPhysicallyContiguous)
_NO_UID = 0xFFFFFFFF


class _Description(NamedTuple):
    """What a process has to know of a buffer besides the descriptor of its memory."""

    options: int
    capacity: int
    length: int
    extents: list[tuple[int, int]]
    alignment: int

    @classmethod
    def parse(cls, fields: Any) -> _Description:
        """Return what was sent. Raises ValueError or TypeError."""
        options, capacity, length, extents, alignment = fields
        if len(extents) > _MOST_PIECES:
            raise ValueError(f"it has more than {_MOST_PIECES} pieces")
        pieces = [(offset, size) for offset, size in extents]
        numbers = [options, capacity, length, alignment, *(number for piece in pieces for number in piece)]
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise ValueError("its numbers are none")
        if not is_power_of_two(alignment) or not PAGE_SIZE <= alignment <= _LARGEST_ALIGNMENT:
            raise ValueError("its alignment is not a power of two from a page on")
        check_request(kernel_task, options & ~_CONTIGUOUS, capacity, alignment, 0)
        return cls(options, capacity, length, pieces, alignment)

    def shared(self, fd: int) -> SharedObject:
        """Return the object once every number fits it; its sender is not to be trusted. Raises ValueError."""
        hugetlb = mman.hugetlb_page(fd)
        end = os.fstat(fd).st_size - (TRAILER if self.options & _PURGEABLE else 0)
        extents = [Extent(offset, length) for offset, length in self.extents]
        page = hugetlb or PAGE_SIZE
        reached = 0
        for extent in sorted(extents):
            if extent.offset % page or extent.length % page or not extent.length:
                raise ValueError("its pieces are not whole pages")
            if extent.offset < reached:
                raise ValueError("its pieces overlap")
            reached = extent.offset + extent.length
        if reached > end:
            raise ValueError("its pieces are not inside its memory")
        if not 0 < self.capacity <= sum(extent.length for extent in extents) or self.length > self.capacity:
            raise ValueError("it is longer than its memory")
        return SharedObject(fd, extents, alignment=self.alignment, page=page, immovable=bool(hugetlb))


class Handle:
    """Shared memory on its way to another process: `send` it over a Unix socket, or give it to multiprocessing.

    Made by `iobmd.share`. It holds the memory, but not the buffer, which may be freed meanwhile, until `close` or the
    end of `with`. A process that multiprocessing starts, or that is at the other end of its pipes and queues, gets it
    by pickling.
    """

    def __init__(self, fd: int, description: _Description) -> None:
        self._fd = process_local.Fd(fd, "this handle")
        self._description = description
        _teach_multiprocessing()

    def send(self, socket: sockets.socket) -> None:
        """Send it over a Unix socket, to a process that calls `iobmd.attach` with its end; may be done repeatedly.

        Raises
        ------
        OSError
            As the socket has it.
        """
        import json  # noqa: PLC0415 (with sockets: as long to import as all of iobmd)
        import socket as sockets  # noqa: PLC0415

        description = json.dumps(self._description).encode()
        fd = _own_description(self._fd)
        # The kernel checks these numbers, so that the other side learns who sends, and not who made the socket.
        sender = _CREDENTIALS.pack(os.getpid(), os.geteuid(), os.getegid())
        try:
            socket.sendmsg(
                [_HEADER.pack(_MARK, len(description))],
                [
                    (sockets.SOL_SOCKET, sockets.SCM_RIGHTS, struct.pack("=i", fd)),
                    (sockets.SOL_SOCKET, _SCM_CREDENTIALS, sender),
                ],
            )
        finally:
            os.close(fd)
        socket.sendall(description)

    @classmethod
    def receive(cls, socket: sockets.socket) -> Handle:
        """Return what was sent. Raises `kIOReturnBadArgument`: that is no buffer; `kIOReturnNotOpen`: at the end."""
        import json  # noqa: PLC0415 (as above)

        header, fds, uid = _received(socket)
        try:
            if not header:
                raise NotOpenError("the other end of the socket is closed")
            header += _exactly(socket, _HEADER.size - len(header), fds)
            mark, length = _HEADER.unpack(header)
            if mark != _MARK or length > _LARGEST or len(fds) != 1:
                raise _not_ours("it was not sent by iobmd")
            text = _exactly(socket, length, fds)
            if len(fds) != 1:
                raise _not_ours("further descriptors came with it")
            description = _Description.parse(json.loads(text))
            _check_memory(fds[0], trusted=uid in (0, os.geteuid()))
            return cls(fds.pop(), description)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            ours = isinstance(error, IOReturnError) and error.code != IOReturn.kIOReturnUnsupported
            raise error if ours else _not_ours(str(error)) from None
        finally:
            _discard(fds)

    def attach(self, *, wired: bool | None = None) -> IOBufferMemoryDescriptor:
        """As `iobmd.attach`."""
        description = self._description
        options = description.options
        if wired is not None:
            options = options & ~_PAGEABLE if wired else options | _PAGEABLE
        if options & _PURGEABLE and not options & _PAGEABLE:
            raise BadArgumentError("purgeable memory cannot be wired")
        fd = _own_description(self._fd)
        try:
            shared = description.shared(fd)
        except (ValueError, OSError) as error:
            os.close(fd)
            raise _not_ours(str(error)) from None
        backing = SharedBacking(shared, wired=not options & _PAGEABLE, purgeable=bool(options & _PURGEABLE))
        return IOBufferMemoryDescriptor()._attach(backing, options, description.capacity, description.length)

    def close(self) -> None:
        """Let go of the memory, once `send` and `attach` of other threads have ended; idempotent."""
        self._fd.close()

    def __enter__(self) -> Self:
        self._fd.fileno()  # refuses when it is closed
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a Handle goes through multiprocessing's pipes, queues and arguments, or `send`, and nothing else"
        )

    def __repr__(self) -> str:
        state = "closed" if self._fd.closed else f"of {self._description.capacity} bytes"
        return f"<iobmd.Handle {state}>"


def share(buffer: IOBufferMemoryDescriptor, socket: sockets.socket | None = None) -> Handle:
    """Make shared memory ready to be handed to another process that cooperates.

    Parameters
    ----------
    buffer : IOBufferMemoryDescriptor
        Shared memory (`shared=True`, `kIOMemoryKernelUserShared`), in whatever task.
    socket : socket.socket, optional
        Send it over this Unix socket at once.

    Returns
    -------
    Handle
        To `send` over Unix sockets, or to be given to multiprocessing.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: private memory. `kIOReturnNoResources`: no descriptor is free.

    Notes
    -----
    By a descriptor (unix(7), SCM_RIGHTS). Memory of a memfd is sealed, so that nobody can cut it away. Memory in huge
    pages of a tmpfs is not (as root: 2 MiB and more, and contiguous or masked memory above a page): hand it to
    processes that you trust. `attach` refuses such memory from other users than root and its own.
    """
    shared = buffer._memory().require_backing().shared
    if shared is None:
        raise private()
    extents = [(offset, size) for offset, size in shared.extents]
    capacity, length, options = buffer.getCapacity(), buffer.getLength(), int(buffer.getFlags())
    description = _Description(options, capacity, length, extents, shared.alignment)
    with shared.fd.use() as number:
        handle = Handle(_duplicate(number), description)
    if socket is not None:
        handle.send(socket)
    return handle


def attach(source: Handle | sockets.socket, *, wired: bool | None = None) -> IOBufferMemoryDescriptor:
    """Return a buffer of memory that another process has shared: the same pages, mapped here.

    Parameters
    ----------
    source : Handle or socket.socket
        What `share` returned, as multiprocessing brought it; or a Unix socket that it was sent over.
    wired : bool, optional
        Keep it resident, and pinned where the kernel lets us, on this process's account; default: as it was made.

    Returns
    -------
    IOBufferMemoryDescriptor
        Its length, options and purgeable state are those of the buffer that was shared; its memory lives as long as
        anybody has it.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: what came is no buffer. `kIOReturnNotOpen`: the socket or the handle is closed.
        `kIOReturnCannotWire` at RLIMIT_MEMLOCK. `kIOReturnNoMemory`, `kIOReturnNoResources`.
    """
    if isinstance(source, Handle):
        return source.attach(wired=wired)
    with Handle.receive(source) as handle:
        return handle.attach(wired=wired)


def _received(socket: sockets.socket) -> tuple[bytes, list[int], int]:
    """Receive the beginning of a message: its bytes, its descriptors, and the uid of the process that sent it.

    The uid is that of the message (unix(7), SO_PASSCRED). SO_PEERCRED would name who made the socket: of a socketpair
    that is this process or its parent, whoever holds the other end by now.
    """
    import socket as sockets  # noqa: PLC0415 (as above)

    before = socket.getsockopt(sockets.SOL_SOCKET, _SO_PASSCRED)
    socket.setsockopt(sockets.SOL_SOCKET, _SO_PASSCRED, 1)
    try:
        return _receive(socket, _HEADER.size)
    finally:
        socket.setsockopt(sockets.SOL_SOCKET, _SO_PASSCRED, before)


def _receive(socket: sockets.socket, size: int) -> tuple[bytes, list[int], int]:
    """Receive up to `size` bytes, and all descriptors that were sent with them, to be closed by `_discard`.

    The kernel closes those that do not fit, in this thread, and the last close(2) of a TCP socket waits for as long
    as its sender has set (SO_LINGER in socket(7)).
    """
    import array  # noqa: PLC0415 (as above)
    import socket as sockets  # noqa: PLC0415

    room = sockets.CMSG_SPACE(_MOST_FDS * 4) + sockets.CMSG_SPACE(_CREDENTIALS.size)
    data, ancillary, _flags, _address = socket.recvmsg(size, room, sockets.MSG_CMSG_CLOEXEC)
    fds, uid = array.array("i"), _NO_UID
    for level, kind, content in ancillary:
        if level == sockets.SOL_SOCKET and kind == sockets.SCM_RIGHTS:
            fds.frombytes(content[: len(content) // 4 * 4])
        elif level == sockets.SOL_SOCKET and kind == _SCM_CREDENTIALS:
            _pid, uid, _gid = _CREDENTIALS.unpack(content)
    return data, list(fds), uid


def _check_memory(fd: int, *, trusted: bool) -> None:
    """Raise ValueError unless a descriptor is of memory that may be written to, and cannot be taken away from us.

    The processes of root and of this user could harm this one anyway.
    """
    if not trusted and shmem.seals(fd) is None:  # before all else: a server may never answer (FUSE)
        raise ValueError("its sender is another user, who could truncate it: it is no memfd")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR or not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ValueError("its descriptor may not be written to")  # and reopening it would ignore that
    if seal := shmem.read_only_seal(fd):
        raise ValueError(f"its memory is sealed against writing ({seal})")
    if not trusted and (why := shmem.why_unsafe(fd)):
        raise ValueError(f"its sender is another user, who could {why}")


def _discard(fds: list[int]) -> None:
    """Close descriptors that were sent here.

    close(2) of a FUSE file waits for its server without a limit, that of a TCP socket as long as its sender likes.
    """
    others = []
    for fd in fds:
        if shmem.seals(fd) is None:
            others.append(fd)
        else:
            os.close(fd)
    if not others:
        return
    import threading  # noqa: PLC0415 (where it is needed only)

    def close() -> None:
        for fd in others:
            with contextlib.suppress(OSError):  # the server's error
                os.close(fd)

    try:
        threading.Thread(target=close, daemon=True).start()
    except RuntimeError:  # no thread can be started
        close()


def _own_description(fd: process_local.Fd) -> int:
    """Return another descriptor of the same object, with an open file description of its own where /proc is."""
    with fd.use() as number:
        with contextlib.suppress(OSError):
            return shmem.reopen(number)
        return _duplicate(number)


def _duplicate(fd: int) -> int:
    try:
        return os.dup(fd)
    except OSError as error:
        raise limits.from_oserror(error, "cannot share memory") from None


def _exactly(socket: sockets.socket, size: int, fds: list[int]) -> bytes:
    """Receive `size` bytes, and add the descriptors that come with them to `fds`."""
    data = bytearray()
    while len(data) < size:
        more, further, _uid = _receive(socket, size - len(data))
        fds += further
        if len(fds) > _MOST_FDS:
            raise _not_ours("too many descriptors came with it")
        if not more:
            raise _not_ours("the other end was closed in the middle of it")
        data += more
    return bytes(data)


def _not_ours(why: str) -> BadArgumentError:
    return BadArgumentError(f"what came is no shared buffer: {why}")


def _rebuild(fd: Any, description: tuple[Any, ...]) -> Handle:
    return Handle(fd.detach(), _Description(*description))


def _reduce(handle: Handle) -> tuple[Any, ...]:
    from multiprocessing import reduction  # noqa: PLC0415 (see _teach_multiprocessing)

    with handle._fd.use() as number:
        return _rebuild, (reduction.DupFd(number), tuple(handle._description))


def _teach_multiprocessing() -> None:
    """Have multiprocessing's pickler know handles; the ordinary one could not take a descriptor with it."""
    from multiprocessing import reduction  # noqa: PLC0415 (as above)

    reduction.register(Handle, _reduce)
