"""Shared memory for processes that cooperate: one calls `share`, the other `attach`, without privileges or ptrace."""

from __future__ import annotations

import contextlib
import copyreg
import fcntl
import os
import stat
import struct
import sys
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, Self, SupportsIndex

from iobmd._internal import process_local
from iobmd._native import mman
from iobmd.backing.mapped import private
from iobmd.backing.shared import SharedBacking
from iobmd.constants import IOOptionBits, IOReturn
from iobmd.descriptors.buffer import IOBufferMemoryDescriptor
from iobmd.descriptors.descriptor import IOMemoryDescriptor
from iobmd.descriptors.options import check_descriptor, check_request
from iobmd.errors import BadArgumentError, IOReturnError, NotOpenError
from iobmd.host import limits
from iobmd.memory import shmem
from iobmd.memory.shmem import Extent, SharedObject
from iobmd.purgeable.shared import TRAILER
from iobmd.task.task import kernel_task
from iobmd.units import PAGE_SIZE, is_power_of_two

if TYPE_CHECKING:
    import socket as sockets
    from types import FrameType

_HEADER = struct.Struct("=6sxxI")  # magic, and the length of the description that follows
_MARK = b"iobmd1"
_LARGEST = 1 << 20  # bytes of a description
_MOST_PIECES = 16 << 10  # each is a mapping, and a process may have at most 65,530 (vm.max_map_count)
_MOST_FDS = 253  # that a message can have (SCM_MAX_FD in linux/net.h)
_LARGEST_ALIGNMENT = 1 << 40
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_SO_PASSCRED, _SCM_CREDENTIALS = 16, 2  # asm-generic/socket.h, linux/socket.h
_PAGEABLE = int(IOOptionBits.kIOMemoryPageable)
_PURGEABLE = int(IOOptionBits.kIOMemoryPurgeable)
_CONTIGUOUS = int(IOOptionBits.kIOMemoryPhysicallyContiguous | IOOptionBits.kIOMemoryHostPhysicallyContiguous)
_NO_UID = 0xFFFFFFFF


class _Description(NamedTuple):
    """The properties of a buffer that are sent along with the file descriptor of its memory."""

    options: int
    capacity: int
    length: int
    extents: list[tuple[int, int]]
    alignment: int

    @classmethod
    def parse(cls, fields: Any) -> _Description:
        """Return the description that was sent; raise ValueError or TypeError if it is invalid."""
        options, capacity, length, extents, alignment = fields
        if len(extents) > _MOST_PIECES:
            raise ValueError(f"it has more than {_MOST_PIECES} pieces")
        pieces = [(offset, size) for offset, size in extents]
        numbers = [options, capacity, length, alignment, *(number for piece in pieces for number in piece)]
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise ValueError("its numbers are not integers of at most 62 bits")
        if not is_power_of_two(alignment) or not PAGE_SIZE <= alignment <= _LARGEST_ALIGNMENT:
            raise ValueError("its alignment is not a power of two of at least a page")
        check_request(kernel_task, options & ~_CONTIGUOUS, capacity, alignment, 0)
        return cls(options, capacity, length, pieces, alignment)

    def shared(self, fd: int) -> SharedObject:
        """Return the object, after checking every number of the untrusted sender against it; raise ValueError."""
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
    """Shared memory in transit to another process: `send` it over a Unix socket, or pass it to multiprocessing.

    Created by `iobmd.share`. Until `close` or the end of a `with` block it retains the memory, but not the buffer,
    which may be freed. Processes started by multiprocessing, or at the other end of its pipes and queues, receive it
    by pickling.
    """

    def __init__(self, fd: int, description: _Description) -> None:
        self._fd = process_local.Fd(fd, "this handle")
        self._description = description

    def send(self, socket: sockets.socket) -> None:
        """Send it over a Unix socket to a process that calls `iobmd.attach`; may be called repeatedly.

        Raises
        ------
        OSError
            The error of the socket.
        """
        import json  # noqa: PLC0415 (with sockets: as long to import as all of iobmd)
        import socket as sockets  # noqa: PLC0415

        description = json.dumps(self._description).encode()
        fd = _own_description(self._fd)
        # The kernel verifies these credentials, so that the receiver sees the sender, not the creator of the socket.
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
        """Receive a handle. Raises `kIOReturnBadArgument` for other data, `kIOReturnNotOpen` if it is closed."""
        import json  # noqa: PLC0415 (as above)

        header, fds, uid = _received(socket)
        try:
            if not header:
                raise NotOpenError("the other end of the socket is closed")
            if not _MARK.startswith(header[: len(_MARK)]):  # a shorter message, whose rest never comes
                raise _not_ours("it was not sent by iobmd")
            at_first = len(fds)  # another process may have sent further bytes, and the descriptors with them
            header += _exactly(socket, _HEADER.size - len(header), fds)
            mark, length = _HEADER.unpack(header)
            if mark != _MARK or length > _LARGEST or at_first != 1:
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
        return self._attach_as(IOBufferMemoryDescriptor(), wired=wired)

    def _attach_as(self, buffer: IOBufferMemoryDescriptor, *, wired: bool | None = None) -> IOBufferMemoryDescriptor:
        """Attach the memory to a buffer that is not initialized, and return it."""
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
        return buffer._attach(backing, options, description.capacity, description.length)

    def close(self) -> None:
        """Release the memory after `send` and `attach` calls of other threads have returned; idempotent."""
        self._fd.close()

    def __enter__(self) -> Self:
        self._fd.fileno()  # raises if it is closed
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> str | tuple[object, ...]:
        if frame := _pickling_frame():
            return _received_handle, _sent(frame, self._fd, self._description)
        raise TypeError(
            "a Handle can only be sent through multiprocessing's pipes, queues and arguments, or by `send`"
        )

    def __repr__(self) -> str:
        state = "closed" if self._fd.closed else f"of {self._description.capacity} bytes"
        return f"<iobmd.Handle {state}>"


def share(buffer: IOBufferMemoryDescriptor, socket: sockets.socket | None = None) -> Handle:
    """Return a handle with which another process can attach shared memory.

    Parameters
    ----------
    buffer : IOBufferMemoryDescriptor
        Shared memory (`shared=True`, `kIOMemoryKernelUserShared`), of any task.
    socket : socket.socket, optional
        Also send the handle over this Unix socket.

    Returns
    -------
    Handle
        To be sent over Unix sockets (`send`), or passed to multiprocessing.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: private memory. `kIOReturnNoResources`: no file descriptor is free.

    Notes
    -----
    The memory is passed as a file descriptor (unix(7), SCM_RIGHTS). A memfd is sealed, so that it cannot be
    truncated. tmpfs memory in huge pages cannot be sealed (as root: 2 MiB and more, and contiguous or masked memory
    above a page): pass it only to processes that you trust. `attach` refuses such memory from users other than root
    and its own.
    """
    check_descriptor(buffer=buffer)
    if socket is not None:
        _check_socket(socket=socket)
    shared = buffer._memory().require_backing().shared
    if shared is None:
        raise private()
    description = _described(buffer, shared)
    with shared.fd.use() as number:
        handle = Handle(_duplicate(number), description)
    if socket is not None:
        handle.send(socket)
    return handle


def _described(buffer: IOBufferMemoryDescriptor, shared: SharedObject) -> _Description:
    extents = [(offset, size) for offset, size in shared.extents]
    capacity, length, options = buffer.getCapacity(), buffer.getLength(), int(buffer.getFlags())
    return _Description(options, capacity, length, extents, shared.alignment)


def attach(source: Handle | sockets.socket, *, wired: bool | None = None) -> IOBufferMemoryDescriptor:
    """Map memory that another process has shared and return it as a buffer of the same pages.

    Parameters
    ----------
    source : Handle or socket.socket
        The handle returned by `share`, received through multiprocessing; or a Unix socket over which it was sent.
    wired : bool, optional
        Whether to wire the memory, charged to this process. Default: wired if it was allocated as wired memory.

    Returns
    -------
    IOBufferMemoryDescriptor
        A buffer with the length, options and purgeable state of the one that was shared. The memory is freed when the
        last process has released it.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: the message is not a buffer. `kIOReturnNotOpen`: the socket or the handle is closed.
        `kIOReturnCannotWire` at RLIMIT_MEMLOCK. `kIOReturnNoMemory`, `kIOReturnNoResources`.
    """
    if isinstance(source, Handle):
        return source.attach(wired=wired)
    _check_socket(source=source)
    with Handle.receive(source) as handle:
        return handle.attach(wired=wired)


def _check_socket(**values: object) -> None:
    """Raise TypeError for a value without the methods of a socket, because importing sockets takes long."""
    for name, value in values.items():
        if not hasattr(value, "sendmsg"):
            raise TypeError(f"{name} must be a Unix socket, not {value!r}")


def _received(socket: sockets.socket) -> tuple[bytes, list[int], int]:
    """Receive the start of a message: its bytes, its descriptors, and the uid of the sender.

    The uid is that of the message (unix(7), SO_PASSCRED). SO_PEERCRED would name the creator of the socket: for a
    socketpair this process or its parent, whichever process now holds the other end.
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
    """Raise ValueError unless a descriptor refers to writable memory that the sender cannot free.

    Processes of root and of this user are trusted: they could harm this process anyway.
    """
    if not trusted and shmem.seals(fd) is None:  # first: a FUSE server may never answer other calls
        raise ValueError("it is not a memfd, so that its sender, another user, could truncate it")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR or not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ValueError("its descriptor is not writable")  # reopening it would circumvent that
    if seal := shmem.read_only_seal(fd):
        raise ValueError(f"its memory is sealed against writing ({seal})")
    if not trusted and (why := shmem.why_unsafe(fd)):
        raise ValueError(f"its sender, another user, could {why}")


def _discard(fds: list[int]) -> None:
    """Close descriptors that were sent here.

    close(2) of a FUSE file waits for its server without a limit, and that of a TCP socket for as long as its sender
    has set.
    """
    others = []
    for fd in fds:
        if shmem.seals(fd) is None:
            others.append(fd)
        else:
            os.close(fd)
    if not others:
        return
    import threading  # noqa: PLC0415 (rarely needed)

    def close() -> None:
        for fd in others:
            with contextlib.suppress(OSError):  # an error of the server
                os.close(fd)

    try:
        threading.Thread(target=close, name="iobmd-close", daemon=True).start()
    except RuntimeError:  # no thread can be started
        close()


def _own_description(fd: process_local.Fd) -> int:
    """Return another descriptor of the same object, with a separate open file description if /proc is mounted."""
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
            raise _not_ours("the other end was closed during the message")
        data += more
    return bytes(data)


def _not_ours(why: str) -> BadArgumentError:
    return BadArgumentError(f"the message is not a shared buffer: {why}")


# --- multiprocessing


def _pickling_frame() -> FrameType | None:
    """Return the frame of multiprocessing's pickler in this thread, the only one that transfers file descriptors.

    Its table of types (`ForkingPickler.register`) does not suffice: each pickler copies it when it begins, and one of
    the objects to be pickled may be the first to call `share`. Filling it beforehand would require importing
    multiprocessing, which takes as long as importing all of iobmd.
    """
    reduction = sys.modules.get("multiprocessing.reduction")
    if reduction is None:
        return None
    codes = {reduction.dump.__code__, reduction.ForkingPickler.dumps.__func__.__code__}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame


def _sent(frame: FrameType, fd: process_local.Fd, description: _Description) -> tuple[object, tuple[object, ...]]:
    """Return the arguments of `_received_handle`: the file descriptor in transit, and the description."""
    from multiprocessing import context, reduction  # noqa: PLC0415 (loaded, see _pickling_frame)

    with fd.use() as number:
        if (child := context.get_spawning_popen()) is None:
            return reduction.DupFd(number), tuple(description)
        transit = process_local.Fd(_duplicate(number), "a buffer in transit")
    # The new process inherits the descriptor after everything is pickled, when the object sent may already be garbage
    # or released. Process.start() holds the file of the pickle until then; the child's Popen exists much longer.
    finalizer = weakref.finalize(frame.f_locals.get("file", child), transit.close)
    finalizer.atexit = False
    return reduction.DupFd(transit.fileno()), tuple(description)


def _received_handle(fd: Any, description: tuple[Any, ...]) -> Handle:
    return Handle(fd.detach(), _Description(*description))


def _attach_received(
    fd: Any, description: tuple[Any, ...], kind: type[IOBufferMemoryDescriptor]
) -> IOBufferMemoryDescriptor:
    buffer = kind.__new__(kind)
    IOBufferMemoryDescriptor.__init__(buffer)  # the arguments of a subclass's constructor are unknown
    with _received_handle(fd, description) as handle:
        return handle._attach_as(buffer)


def _reduce_buffer(buffer: IOBufferMemoryDescriptor) -> str | tuple[Any, ...]:
    """Pickle a shared buffer for multiprocessing, whose receiver attaches it; refuse other buffers."""
    if frame := _pickling_frame():
        shared = buffer._memory().require_backing().shared
        if shared is not None:
            arguments = (*_sent(frame, shared.fd, _described(buffer, shared)), type(buffer))
            return _attach_received, arguments, _state_of_subclass(buffer)
    return IOMemoryDescriptor.__reduce_ex__(buffer, 2)


def _state_of_subclass(buffer: IOBufferMemoryDescriptor) -> object:
    """Return what a subclass adds to a buffer, as object.__getstate__ does; None if it adds nothing."""
    if type(buffer).__getstate__ is not object.__getstate__:
        return buffer.__getstate__()
    state = object.__getstate__(buffer)
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    own = vars(IOBufferMemoryDescriptor())
    added = {
        name: value
        for name, value in attributes.items()
        if name not in own and not hasattr(IOBufferMemoryDescriptor, name)
    }
    return (added, slots) if slots else added or None


copyreg.pickle(IOBufferMemoryDescriptor, _reduce_buffer)
