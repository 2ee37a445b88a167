"""Buffers used by Python's standard library."""

import asyncio
import hashlib
import os
import socket
import struct
import threading
from pathlib import Path

import pytest

import iobmd
from iobmd.units import PAGE_SIZE

SIZE = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.mark.needs("direct_io")
def test_direct_io(file: Path) -> None:
    """O_DIRECT requires aligned memory, pins it during the transfer, and bypasses the page cache."""
    with iobmd.allocate(SIZE) as buffer, iobmd.allocate(SIZE, wired=False, alignment=PAGE_SIZE) as pageable:
        fd = os.open(file, os.O_RDWR | os.O_DIRECT)
        try:
            half = SIZE // 2
            views = memoryview(buffer)[:half], memoryview(pageable)[:half]
            assert os.preadv(fd, views, 0) == SIZE
            assert buffer[:half] + pageable[:half] == file.read_bytes()
            views[0][:] = bytes(half)
            assert os.pwritev(fd, views[:1], half) == half
            with pytest.raises(OSError, match="Invalid argument"):
                os.preadv(fd, [memoryview(buffer)[1 : half + 1]], 0)
        finally:
            os.close(fd)
    assert file.read_bytes()[half:] == bytes(half)


def test_files_sockets_and_others(file: Path) -> None:
    with iobmd.allocate(SIZE, wired=False) as buffer:
        with file.open("rb") as opened:
            assert opened.readinto(buffer) == SIZE
        assert hashlib.sha256(buffer).digest() == hashlib.sha256(file.read_bytes()).digest()
        assert struct.unpack_from("<I", buffer, 4)[0] == 0x07060504
        struct.pack_into(">Q", buffer, 16, 0x0102030405060708)
        assert buffer[16:24] == bytes(range(1, 9))
        near, far = socket.socketpair()
        with near, far:
            near.sendall(memoryview(buffer)[:1000])
            assert far.recv_into(memoryview(buffer)[2000:3000], 1000, socket.MSG_WAITALL) == 1000
        assert buffer[2000:3000] == buffer[:1000]
        assert bytes(buffer) == buffer[:] == b"".join([buffer])
        assert int.from_bytes(buffer[:2], "little") == buffer[0] | buffer[1] << 8


def test_asyncio() -> None:
    """`to_thread` runs a long copy while other tasks continue; each has its own policy."""

    async def main() -> tuple[bytes, int]:
        turns = 0
        with iobmd.allocate(64 << 20, wired=False) as source:
            source.writeBytes(0, b"copied in a thread")
            copying = asyncio.create_task(
                asyncio.to_thread(iobmd.copy, os.getpid(), source.getBytesNoCopy(), 64 << 20, wired=False)
            )
            while not copying.done():
                turns += 1
                await asyncio.sleep(0)
            with await copying as copied:
                return copied.readBytes(0, 18), turns

    for _ in range(20):  # on a busy machine, this thread may not run during the copy
        contents, turns = asyncio.run(main())
        assert contents == b"copied in a thread"
        if turns > 100:
            break
    assert turns > 100


def test_threads_use_one_buffer() -> None:
    with iobmd.allocate(SIZE, wired=False) as buffer:
        view = memoryview(buffer)

        def fill(part: int) -> None:
            view[part * 1000 : part * 1000 + 1000] = bytes([part]) * 1000

        threads = [threading.Thread(target=fill, args=(part,)) for part in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert buffer[:10000] == b"".join(bytes([part]) * 1000 for part in range(10))
