"""A process that received shared memory, and attacks the process that shared it."""

import contextlib
import fcntl
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support.child import NOBODY, in_child
from support.kernel import PAGE, smaps
from support.rawmemory import memfd
from support.targets import Target, need_ptrace

import iobmd
from iobmd import IOPurgeable, IOReturn, IOReturnError, host
from iobmd.errors import BadArgumentError, NotPermittedError
from iobmd.physical import hugetlb

MIB = 1 << 20
F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE = 1033, 0x2, 0x4, 0x8, 0x10
SHARED_PAGEABLE_PURGEABLE, SCM_CREDENTIALS = 0x10060, 2
UNIQUE, READ_ONLY = 0x04000000, 0x1000
KEEP, NON_VOLATILE, VOLATILE, EMPTY = (
    IOPurgeable.kIOMemoryPurgeableKeepCurrent,
    IOPurgeable.kIOMemoryPurgeableNonVolatile,
    IOPurgeable.kIOMemoryPurgeableVolatile,
    IOPurgeable.kIOMemoryPurgeableEmpty,
)


@contextlib.contextmanager
def given(buffer: iobmd.IOBufferMemoryDescriptor) -> Iterator[int]:
    """Return the descriptor of a buffer's memory that a peer receives."""
    here, there = socket.socketpair()
    with here, there:
        iobmd.share(buffer, here).close()
        _data, fds, _flags, _address = socket.recv_fds(there, PAGE, 1)
        yield fds[0]
        os.close(fds[0])


@contextlib.contextmanager
def attached(fd: int, size: int) -> Iterator[iobmd.IOBufferMemoryDescriptor]:
    """Purgeable memory of a peer of the same user, which is trusted: nothing need be sealed."""
    text = json.dumps([SHARED_PAGEABLE_PURGEABLE, size, size, [[0, size]], PAGE]).encode()
    here, there = socket.socketpair()
    with here, there:
        header = struct.pack("=6sxxI", b"iobmd1", len(text))
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd)
        sender = struct.pack("=iII", os.getpid(), os.geteuid(), os.getegid())
        here.sendmsg([header], [rights, (socket.SOL_SOCKET, SCM_CREDENTIALS, sender)])
        here.sendall(text)
        with iobmd.attach(there) as buffer:
            yield buffer


@pytest.mark.parametrize("seal", [F_SEAL_FUTURE_WRITE, F_SEAL_WRITE, F_SEAL_SHRINK, F_SEAL_GROW])
@pytest.mark.parametrize("size", [PAGE, 64 << 10, 4 * MIB])
def test_a_recipient_cannot_seal_the_memory(size: int, seal: int) -> None:
    """F_SEAL_FUTURE_WRITE once prevented the owner from mapping its memory again."""
    with iobmd.allocate(size, wired=False, shared=True) as buffer, given(buffer) as fd:
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, F_ADD_SEALS, seal)
        with buffer.map(0x04000000) as further, memoryview(further) as view:
            view[:3] = b"own"
        assert buffer.readBytes(0, 3) == b"own"


@pytest.mark.needs("collapse")
@pytest.mark.parametrize("contiguous", [False, True], ids=["wired", "contiguous"])
@pytest.mark.parametrize("user", [None, NOBODY], ids=["caller", "nobody"])
def test_a_recipient_cannot_truncate_huge_pages(user: int | None, contiguous: bool) -> None:
    """Wired memory is in a memfd, for which huge pages are requested; usually some are available."""

    def check() -> int:
        with iobmd.allocate(2 * MIB, shared=True, contiguous=contiguous) as buffer, given(buffer) as fd:
            for seal in (F_SEAL_FUTURE_WRITE, F_SEAL_SHRINK):
                with pytest.raises(PermissionError):
                    fcntl.fcntl(fd, F_ADD_SEALS, seal)
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
            return smaps(buffer.getBytesNoCopy())["ShmemPmdMapped"]

    assert any(in_child(check, uid=user) for _ in range(10))


@pytest.mark.parametrize("seal", [F_SEAL_FUTURE_WRITE, F_SEAL_WRITE])
def test_memory_that_its_sender_has_sealed_is_refused(seal: int) -> None:
    with (
        memfd(2 * PAGE) as fd,
        pytest.raises(BadArgumentError, match="sealed against writing"),
        contextlib.ExitStack() as stack,
    ):
        fcntl.fcntl(fd, F_ADD_SEALS, seal)
        stack.enter_context(attached(fd, PAGE))


def test_a_peer_that_seals_what_was_attached() -> None:
    """Each later mapping fails with the seal's name, and the memory is unchanged: volatile, with its bytes."""
    size = 4 * PAGE
    with (
        memfd(size + PAGE) as fd,
        attached(fd, size) as buffer,
        iobmd.allocate(size, wired=False, shared=True) as other,
        other.map(UNIQUE) as window,
        iobmd.share(buffer) as handle,
    ):
        buffer.writeBytes(0, b"theirs")
        other.writeBytes(0, b"ours")
        buffer.setPurgeable(VOLATILE)
        before = os.pread(fd, size + PAGE, 0)
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        actions: list[Callable[[], object]] = [
            lambda: buffer.map(UNIQUE), lambda: window.redirect(buffer, 0), handle.attach,
            lambda: buffer.setPurgeable(NON_VOLATILE), lambda: buffer.setPurgeable(EMPTY),
        ]  # fmt: skip
        for action in actions:
            with pytest.raises(NotPermittedError, match="F_SEAL_FUTURE_WRITE"):
                action()
        iobmd.purge()
        with memoryview(window) as view:
            assert view[:4] == b"ours"
        with buffer.map(UNIQUE | READ_ONLY) as mapped, memoryview(mapped) as view:
            assert view[:6] == b"theirs"
        assert os.pread(fd, size + PAGE, 0) == before


@pytest.mark.needs("root")
def test_sealed_memory_is_not_mapped_in_a_target() -> None:
    """The error once named a security module."""
    need_ptrace()
    with (
        memfd(5 * PAGE) as fd,
        attached(fd, 4 * PAGE) as buffer,
        Target([sys.executable, "-c", "print('ready', flush=True); input()"]) as target,
    ):
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        areas = Path(f"/proc/{target.pid}/maps").read_text()
        with pytest.raises(NotPermittedError, match="F_SEAL_FUTURE_WRITE"):
            buffer.createMappingInTask(target.pid, 0, 1)
        assert Path(f"/proc/{target.pid}/maps").read_text() == areas
        with buffer.createMappingInTask(target.pid, 0, 1 | READ_ONLY) as mapped:
            assert iobmd.Task(target.pid).read(mapped.getAddress(), PAGE) == bytes(PAGE)


@pytest.mark.parametrize("word", [*range(0x20), (1 << 64) - 1, 0xFFF0, 1 << 63])
def test_every_state_word(word: int) -> None:
    """A peer may write any state; 7 and 15 once raised KeyError."""
    size = 4 * PAGE
    with memfd(size + PAGE) as fd, attached(fd, size) as buffer:
        buffer.writeBytes(0, b"content")
        os.pwrite(fd, struct.pack("=Q", word), size)
        state = word & 0xF
        expected = EMPTY if word & 0x10 else state if state in (VOLATILE, EMPTY) else NON_VOLATILE
        assert buffer.setPurgeable(KEEP) == expected
        iobmd.purge()
        assert buffer.setPurgeable(NON_VOLATILE) in (NON_VOLATILE, EMPTY)
        assert buffer.setPurgeable(KEEP) is NON_VOLATILE
        buffer.writeBytes(0, b"content")
        assert buffer.readBytes(0, 7) == b"content"


def test_truncated_memory_keeps_no_other_from_being_taken() -> None:
    """The thread that purges memory under pressure once died of a struct.error."""
    size = 16 * PAGE
    with (
        memfd(size + PAGE) as fd,
        attached(fd, size) as buffer,
        iobmd.allocate(MIB, wired=False, shared=True, purgeable=True) as other,
    ):
        buffer.setPurgeable(VOLATILE)
        os.ftruncate(fd, 0)
        other.writeBytes(0, b"x" * MIB)
        with given(other) as seen:
            allocated = os.fstat(seen).st_blocks * 512
            other.setPurgeable(VOLATILE)
            time.sleep(0.6)  # two checks of the thread
            assert any(thread.name == "iobmd-purger" for thread in threading.enumerate())
            iobmd.purge()
            assert os.fstat(seen).st_blocks * 512 <= allocated - MIB
        change = buffer.setPurgeable
        for action in (partial(change, NON_VOLATILE), partial(change, KEEP), buffer.prepare):
            with pytest.raises(IOReturnError) as caught:
                action()
            assert caught.value.code == IOReturn.kIOReturnVMError
            assert "truncated" in str(caught.value)


@pytest.mark.needs("hugetlb")
def test_the_lock_of_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user may lock the setting, and `policy(reserve=True)` once waited for it without a limit."""
    monkeypatch.setattr(hugetlb, "_PATIENCE", 0.3)
    pool = host.hugetlb_pools()[0]
    setting = Path(pool.directory) / "nr_hugepages"
    locked, lock = os.pipe()
    released, release = os.pipe()

    def hold() -> None:
        with setting.open() as opened:
            fcntl.flock(opened, fcntl.LOCK_SH)
            os.write(lock, str(os.getpid()).encode())
            os.set_blocking(released, False)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    os.read(released, 1)
                    break
                time.sleep(0.01)

    holder = threading.Thread(target=partial(in_child, hold, uid=NOBODY))
    holder.start()
    try:
        pid = os.read(locked, 20).decode()
        with contextlib.closing(hugetlb.PoolBlocks(pool, reserve=True)) as blocks:
            before = time.monotonic()
            with pytest.raises(IOReturnError, match=rf"process {pid}\b.*nr_hugepages") as caught:
                blocks.more(1, pool.size)
        assert caught.value.code == IOReturn.kIOReturnBusy
        assert time.monotonic() - before < 3
    finally:
        os.write(release, b".")
        holder.join()
        for end in (locked, lock, released, release):
            os.close(end)
