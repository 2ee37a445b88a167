"""`share` and `attach`: the same frames in processes that cooperate, over sockets and multiprocessing."""

import contextlib
import json
import multiprocessing
import os
import pickle
import socket
import struct
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
from support import kernel
from support.child import in_child
from support.errors import code_of
from support.kernel import frames
from support.purging import EMPTY, KEEP_CURRENT, NON_VOLATILE, VOLATILE
from support.sharing_child import look
from support.targets import until
from support.threads import running

import iobmd
from iobmd import IOReturn
from iobmd.units import PAGE_SIZE

MIB = 1 << 20


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("size", [5000, 4 * MIB + 5000], ids=["small", "huge"])
def test_over_a_socket(size: int) -> None:
    with iobmd.allocate(size, shared=True, wired=False) as buffer:
        buffer.writeBytes(0, b"hello")
        buffer.setLength(PAGE_SIZE)
        here, there = pair()

        def receive() -> tuple[object, ...]:
            with iobmd.attach(there) as attached:
                seen = attached.readBytes(0, 5), len(attached), attached.getCapacity()
                attached.writeBytes(4000, b"back")
                return *seen, frames(attached.getBytesNoCopy(), 1)

        with here, there:
            iobmd.share(buffer, here).close()
            seen = in_child(receive)
        assert seen == (b"hello", PAGE_SIZE, size, frames(buffer.getBytesNoCopy(), 1))
        assert buffer.readBytes(4000, 4) == b"back"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_by_multiprocessing(method: str) -> None:
    context = multiprocessing.get_context(method)
    with iobmd.allocate(MIB, shared=True, wired=False) as buffer, iobmd.share(buffer) as handle:
        buffer.writeBytes(0, b"hello")
        near, far = context.Pipe()
        process = context.Process(target=look, args=(handle, far))
        process.start()
        assert near.poll(30), "the child does not answer"
        assert near.recv() == (b"hello", MIB, MIB)
        process.join(30)
        assert process.exitcode == 0
        assert buffer.readBytes(100, 10) == b"from there"
        near.close()
        far.close()
        process.close()


@pytest.mark.parametrize("data", [b"hello", b"{}"], ids=repr)
def test_a_short_message_of_another_program(data: bytes) -> None:
    """It is refused at once: the rest, for which a blocking socket would wait, never comes."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near, far:
        far.settimeout(30)
        near.sendall(data)
        with pytest.raises(iobmd.BadArgumentError, match="not sent by iobmd"):
            iobmd.attach(far)


@pytest.mark.usefixtures("nothing_left")
def test_memory_outlives_who_made_it() -> None:
    buffer = iobmd.allocate(8192, shared=True, wired=False)
    buffer.writeBytes(0, b"still here")
    handle = iobmd.share(buffer)
    buffer.free()
    with handle, iobmd.attach(handle, wired=False) as attached, iobmd.attach(handle, wired=False) as again:
        assert attached.readBytes(0, 10) == b"still here"
        again.writeBytes(0, b"S")
        assert attached.readBytes(0, 10) == b"Still here"
        assert attached.getBytesNoCopy() != again.getBytesNoCopy()
    assert code_of(lambda: iobmd.attach(handle)) == IOReturn.kIOReturnNotOpen
    assert repr(handle) == "<iobmd.Handle closed>"


@pytest.mark.needs("frames", "memlock")
@pytest.mark.usefixtures("nothing_left")
def test_wired_stays_wired() -> None:
    """A process that attaches has its own pins: the frames remain when the first process has exited."""
    buffer = iobmd.allocate(64 << 10, shared=True)
    was = [segment.address for segment in buffer.segments()]
    with iobmd.share(buffer) as handle, iobmd.attach(handle) as attached:
        assert attached.wiring is iobmd.Wiring.PINNED
        buffer.free()
        assert [segment.address for segment in attached.segments()] == was
        attached.verify()


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_contiguous_memory_stays_in_order() -> None:
    """Its pieces may be anywhere in the object, and are mapped in the order of their addresses in both processes."""
    with iobmd.allocate(4 * MIB, shared=True, contiguous=True) as buffer:
        for offset in range(0, 4 * MIB, MIB // 4):
            buffer.writeBytes(offset, struct.pack("=Q", offset))
        here, there = pair()

        def receive() -> tuple[object, ...]:
            with iobmd.attach(there) as attached:
                values = [attached.readBytes(offset, 8) for offset in range(0, 4 * MIB, MIB // 4)]
                return values, attached.getPhysicalSegment(0)

        with here, there:
            iobmd.share(buffer, here).close()
            values, segment = in_child(receive)
        assert values == [struct.pack("=Q", offset) for offset in range(0, 4 * MIB, MIB // 4)]
        assert segment == buffer.getPhysicalSegment(0) == (buffer.getPhysicalAddress(), 4 * MIB)


@pytest.mark.usefixtures("nothing_left")
def test_purgeable_state_is_common() -> None:
    """Two users in one process have separate locks, and closing one does not release the other's."""
    with iobmd.allocate(MIB, shared=True, wired=False, purgeable=True) as buffer, iobmd.share(buffer) as handle:
        buffer.writeBytes(0, b"x" * 100)
        first, second = iobmd.attach(handle), iobmd.attach(handle)
        assert buffer.setPurgeable(VOLATILE) == NON_VOLATILE
        assert first.setPurgeable(KEEP_CURRENT) == VOLATILE
        assert first.setPurgeable(NON_VOLATILE) == VOLATILE
        first.prepare()
        second.free()  # closes a descriptor of the object in this process
        assert code_of(lambda: buffer.setPurgeable(VOLATILE)) == IOReturn.kIOReturnBusy
        first.complete()
        assert buffer.setPurgeable(EMPTY) == NON_VOLATILE
        assert first.setPurgeable(KEEP_CURRENT) == EMPTY
        assert not any(first.readBytes(0, 100))
        first.free()


@pytest.mark.usefixtures("nothing_left")
def test_states_changed_from_many_sides() -> None:
    """Threads with one user each, and processes, change the state: all results are valid, and no thread hangs."""
    with iobmd.allocate(64 << 10, shared=True, wired=False, purgeable=True) as buffer, iobmd.share(buffer) as handle:
        found: set[int] = set()

        def change() -> None:
            with iobmd.attach(handle) as own:
                for _ in range(200):
                    found.add(int(own.setPurgeable(VOLATILE)))
                    found.add(int(own.setPurgeable(NON_VOLATILE)))

        with running(*[change] * 4):
            in_child(change)
        assert found == {2, 3}
        assert buffer.setPurgeable(KEEP_CURRENT) == NON_VOLATILE


@pytest.mark.usefixtures("nothing_left")
def test_refused() -> None:
    with iobmd.allocate(PAGE_SIZE, wired=False) as private:
        assert code_of(lambda: iobmd.share(private)) == IOReturn.kIOReturnUnsupported
    with iobmd.allocate(PAGE_SIZE, wired=False, shared=True) as buffer, iobmd.share(buffer) as handle:
        with pytest.raises(TypeError, match="multiprocessing"):
            pickle.dumps(handle)
        with pytest.raises(TypeError):
            pickle.dumps(buffer)
        with (
            iobmd.allocate(PAGE_SIZE, wired=False, shared=True, purgeable=True) as purgeable,
            iobmd.share(purgeable) as other,
        ):
            assert code_of(lambda: iobmd.attach(other, wired=True)) == IOReturn.kIOReturnBadArgument
        limited = in_child(lambda: code_of(lambda: iobmd.attach(handle, wired=True)), uid=65534, memlock=0)
        assert limited == IOReturn.kIOReturnCannotWire


def message(extents: object, *, capacity: object = PAGE_SIZE, mark: bytes = b"iobmd1", **other: object) -> bytes:
    fields = {
        "options": 0x23,
        "capacity": capacity,
        "length": PAGE_SIZE,
        "extents": extents,
        "alignment": PAGE_SIZE,
    } | other
    text = json.dumps(list(fields.values())).encode()
    return struct.pack("=6sxxI", mark, len(text)) + text


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        message([[0, PAGE_SIZE]])[:20],
        message([[0, PAGE_SIZE]], mark=b"iobmd9"),
        message([[0, 1 << 40]], capacity=1 << 40),
        message([[PAGE_SIZE, PAGE_SIZE]]),
        message([[-PAGE_SIZE, PAGE_SIZE]]),
        message([[1, PAGE_SIZE]]),
        message([[0, PAGE_SIZE]], capacity=4097),
        message([[0, PAGE_SIZE]], capacity=0),
        message([[0, PAGE_SIZE]], capacity=4096.0),
        message([[0, PAGE_SIZE]], capacity=True),
        message([[0, PAGE_SIZE]], length=-1),
        message([[0, PAGE_SIZE]], alignment=1 << 70),
        message([[0, PAGE_SIZE]], alignment=3),
        message([[0, PAGE_SIZE]], alignment="a"),
        message([[0, PAGE_SIZE]], options="x"),
        message([[0, PAGE_SIZE]], options=1 << 40),
        message([[0, PAGE_SIZE]], more=1),
        message("nonsense"),
        message([["a", "b"]]),
        struct.pack("=6sxxI", b"iobmd1", 200_000) + b"[" * 200_000,
        struct.pack("=6sxxI", b"iobmd1", 5) + b"{bad}",
        struct.pack("=6sxxI", b"iobmd1", 1 << 31),
    ],
)
def test_what_a_stranger_sends(wrong: bytes) -> None:
    """No page beyond the end of the object is mapped, because touching it would raise SIGBUS."""
    here, there = pair()

    def send_the_rest() -> None:
        with here, contextlib.suppress(OSError):  # refused before the whole message was read
            here.sendall(wrong[12:])

    with here, there:
        if wrong:
            descriptor = os.memfd_create("strange")
            os.ftruncate(descriptor, PAGE_SIZE)
            socket.send_fds(here, [wrong[:12]], [descriptor])
            os.close(descriptor)
        # In a thread, because the socket may not accept the whole message before it is read.
        rest = threading.Thread(target=send_the_rest)
        rest.start()
        expected = IOReturn.kIOReturnBadArgument if wrong else IOReturn.kIOReturnNotOpen
        assert code_of(lambda: iobmd.attach(there)) == expected
        there.close()
        rest.join(30)
        assert not rest.is_alive()


@pytest.mark.usefixtures("nothing_left")
def test_no_descriptor_of_the_message_stays() -> None:
    """A peer may send more than is requested."""
    here, there = pair()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with here, there:
        socket.send_fds(here, [message([[0, PAGE_SIZE]])], [0, 1, 2])
        assert code_of(lambda: iobmd.attach(there)) == IOReturn.kIOReturnBadArgument
        # A descriptor that is not memory is closed by a thread, because its server could block close(2).
        assert until(lambda: len(list(Path("/proc/self/fd").iterdir())) == before)
    assert kernel.status("VmLck") == 0


def send(descriptor: int, here: socket.socket) -> None:
    socket.send_fds(here, [message([[0, PAGE_SIZE]])], [descriptor])
    os.close(descriptor)


@pytest.mark.usefixtures("nothing_left")
def test_a_file_that_may_only_be_read(tmp_path: Path) -> None:
    """A service of root must not write, on behalf of other users, to files to which they may not write."""
    file = tmp_path / "precious"
    file.write_bytes(b"x" * PAGE_SIZE)
    memory = os.memfd_create("precious")
    os.ftruncate(memory, PAGE_SIZE)

    def received(descriptor: int) -> IOReturn:
        here, there = pair()
        with here, there:
            send(descriptor, here)
            return code_of(lambda: iobmd.attach(there))

    assert received(os.open(file, os.O_RDONLY)) == IOReturn.kIOReturnBadArgument
    assert received(os.open(file, os.O_RDWR)) == IOReturn.kIOReturnBadArgument
    assert received(os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)) == IOReturn.kIOReturnBadArgument
    os.close(memory)
    assert file.read_bytes() == b"x" * PAGE_SIZE


@pytest.mark.needs("root")
def test_memory_of_another_user_must_be_sealed() -> None:
    """A process that can truncate the memory could end this process with SIGBUS."""

    def serve(path: str, sealed: bool) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            if sealed:
                with iobmd.allocate(PAGE_SIZE, shared=True, wired=False) as buffer:
                    iobmd.share(buffer, client).close()
            else:
                memory = os.memfd_create("unsealed")
                os.ftruncate(memory, PAGE_SIZE)
                send(memory, client)

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        Path(folder).chmod(0o777)
        path = f"{folder}/socket"
        server.bind(path)
        Path(path).chmod(0o777)
        server.listen()
        for sealed in (True, False):
            in_child(partial(serve, path, sealed), uid=65534)
            with server.accept()[0] as peer:
                if sealed:
                    iobmd.attach(peer, wired=False).free()
                else:
                    assert code_of(partial(iobmd.attach, peer)) == IOReturn.kIOReturnBadArgument
