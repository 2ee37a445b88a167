"""A target: a program that works, checks its own work, and reports disturbances.

It runs without `iobmd`. System calls that Python would restart are made through ctypes, so that EINTR is visible.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from . import kernel
from .board import MOMENT, PATTERN, SCRATCH_SLICE, SPARSE, THREADS, Board, Target, pattern

if TYPE_CHECKING:
    from collections.abc import Callable

_SYS_NANOSLEEP = {"x86_64": 35, "aarch64": 101}[os.uname().machine]
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
_MADV_DONTNEED = 4
_TICK_NS = 1_000_000

_libc = ctypes.CDLL(None, use_errno=True)


def _address(area: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


def _private(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Program:
    """The common part of all targets: patterns that workers copy, and memory that they may write to."""

    def __init__(self, folder: Path, number: int, kind: str) -> None:
        self.kind = kind
        self.board = Board(folder)
        self.words = self.board.target(number)
        self.expected = pattern(self.words[Target.SEED])
        self.private, self.shared = _private(PATTERN), mmap.mmap(-1, PATTERN)
        self.sparse, self.scratch = mmap.mmap(-1, SPARSE), _private(SCRATCH_SLICE * THREADS)
        for area in (self.private, self.shared):
            area[:] = self.expected
        self.scratch[:] = bytes(len(self.scratch))
        for place, area in (
            (Target.PRIVATE, self.private),
            (Target.SHARED, self.shared),
            (Target.SPARSE, self.sparse),
            (Target.SCRATCH, self.scratch),
        ):
            self.words[place] = _address(area)
        self.words[Target.MOMENT] = self.words[Target.FAULTING] = 0

    def ready(self, generation: int) -> None:
        """Permit workers to use this target."""
        self.words[Target.BEATS] = 0
        self.words[Target.PID] = os.getpid()
        self.words[Target.GENERATION] = generation

    def beat(self) -> None:
        """Count a completed piece of work."""
        self.words[Target.BEATS] += 1

    def disturbed(self, message: str) -> None:
        """Report that this program was disturbed."""
        self.board.report("programs_disturbed", f"target {self.kind}", message)

    def sleep(self, nanoseconds: int = 2_000_000) -> None:
        """Sleep (nanosleep(2)); a sleep that ends early or with EINTR is a disturbance."""
        wanted = struct.pack("=qq", *divmod(nanoseconds, 1_000_000_000))
        began = time.monotonic_ns()
        result = _libc.syscall(_SYS_NANOSLEEP, wanted, None)
        slept = time.monotonic_ns() - began
        if result or slept < nanoseconds:
            self.disturbed(f"nanosleep: {errno.errorcode.get(ctypes.get_errno(), '?')} after {slept} ns")

    def check_patterns(self) -> None:
        """Compare this program's memory with the pattern that it wrote there."""
        if self.private[:] != self.expected or self.shared[:] != self.expected:
            self.disturbed("its memory was changed")


def sleeping(program: Program) -> Callable[[], None]:
    """Sleep, and check the memory periodically."""

    def work() -> None:
        for _ in range(50):
            program.sleep()
            program.beat()
        program.check_patterns()

    return work


def computing(program: Program) -> Callable[[], None]:
    """Compute checksums, and number pages one after another: at any moment no two numbers differ by more than 1."""
    pages = _private(MOMENT)
    pages[:] = bytes(MOMENT)
    program.words[Target.MOMENT] = _address(pages)
    checksum = zlib.crc32(program.expected)
    words = memoryview(pages).cast("Q")
    step = kernel.PAGE // 8
    number = 0

    def work() -> None:
        nonlocal number
        for _ in range(20):
            number += 1
            for page in range(0, len(words), step):
                words[page] = number
        if zlib.crc32(program.private) != checksum:
            program.disturbed("a checksum of its memory is wrong")
        program.beat()
        program.sleep(5_000_000)  # leaves the processors to the workers most of the time

    return work


def threaded(program: Program) -> Callable[[], None]:
    """Pass a byte between threads through pipes, while another thread computes."""
    pipes = [os.pipe() for _ in range(3)]
    byte = ctypes.create_string_buffer(3)

    def pass_on(number: int) -> None:
        own = ctypes.create_string_buffer(1)
        while True:
            done = _libc.read(pipes[number][0], own, 1)
            if done != 1:
                program.disturbed(f"read: {done}, {errno.errorcode.get(ctypes.get_errno(), '?')}")
            _libc.write(pipes[number + 1][1], own, 1)

    def compute() -> None:
        checksum = zlib.crc32(program.expected)
        while True:
            if zlib.crc32(program.shared) != checksum:
                program.disturbed("a checksum of its shared memory is wrong")
            time.sleep(0.05)

    for number in range(2):
        threading.Thread(target=pass_on, args=(number,), daemon=True).start()
    threading.Thread(target=compute, daemon=True).start()

    def work() -> None:
        os.write(pipes[0][1], b"x")
        done = _libc.read(pipes[2][0], byte, 1)
        if done != 1 or byte.raw[:1] != b"x":
            program.disturbed(f"read: {done}, {errno.errorcode.get(ctypes.get_errno(), '?')}, {byte.raw!r}")
        program.beat()
        program.sleep(1_000_000)

    return work


def forking(program: Program) -> Callable[[], None]:
    """Fork, and wait for any child: it must be the one that was forked, with the intended status."""

    def work() -> None:
        child = os.fork()
        if not child:
            os._exit(7)
        status = ctypes.c_int()
        found = _libc.waitpid(-1, ctypes.byref(status), 0)
        if found != child or status.value != 7 << 8:
            message = f"waitpid: {found} of child {child}, status {status.value:#x}, errno {ctypes.get_errno()}"
            program.disturbed(message)
        program.beat()
        program.sleep(20_000_000)

    return work


def ticking(program: Program) -> Callable[[], None]:
    """Count a timer's ticks, and compare their number with the clock."""
    timer = _libc.timerfd_create(time.CLOCK_MONOTONIC, 0)
    each = struct.pack("=4q", 0, _TICK_NS, 0, _TICK_NS)
    before = time.monotonic_ns()
    _libc.timerfd_settime(timer, 0, each, None)
    after = time.monotonic_ns()  # on a busy machine, this process may have waited in between
    expired = ctypes.create_string_buffer(8)
    ticks = 0

    def work() -> None:
        nonlocal ticks
        for _ in range(20):
            done = _libc.read(timer, expired, 8)
            if done != 8:
                program.disturbed(f"read of a timerfd: {done}, {errno.errorcode.get(ctypes.get_errno(), '?')}")
                continue
            earliest = (time.monotonic_ns() - before) // _TICK_NS
            ticks += struct.unpack("=Q", expired.raw)[0]
            if ticks > earliest + 1:
                program.disturbed(f"{ticks} ticks of {earliest} that were due")
            program.beat()
        due = (time.monotonic_ns() - after) // _TICK_NS
        if ticks < due - 1 and not select.select([timer], [], [], 0)[0]:
            program.disturbed(f"lost ticks: {ticks} of {due} arrived")

    return work


def signalled(program: Program) -> Callable[[], None]:
    """Send queued signals to this process, with a timer's signals in between; none of the queued ones may be lost."""
    queued, counted, alarms = signal.SIGRTMIN + 1, 0, 0

    def count(_number: int, _frame: object) -> None:
        nonlocal alarms
        alarms += 1

    signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    signal.pthread_sigmask(signal.SIG_BLOCK, {queued})

    def work() -> None:
        nonlocal counted
        for _ in range(5):
            os.kill(os.getpid(), queued)
        before = alarms
        counted = sum(signal.sigtimedwait({queued}, 1) is not None for _ in range(5))
        if counted != 5:
            program.disturbed(f"{counted} of 5 queued signals arrived")
        time.sleep(0.02)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        if mask != {queued} or signal.getsignal(signal.SIGALRM) is not count:
            program.disturbed(f"its signal mask or handlers were changed: {mask}")
        deadline = time.monotonic() + 10
        while alarms == before and time.monotonic() < deadline:
            time.sleep(0.002)
        if alarms == before:
            program.disturbed("the signals of its timer stopped")
        program.beat()

    return work


def faulting(program: Program) -> Callable[[], None]:
    """Serve its own page faults (userfaultfd(2)) in a thread, and drop the pages again."""
    base, origin = kernel.map_private(PATTERN), _address(program.private)
    descriptor = kernel.userfaultfd()
    fcntl.ioctl(descriptor, _UFFDIO_API, bytearray(struct.pack("=QQQ", 0xAA, 0, 0)))
    fcntl.ioctl(descriptor, _UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", base, PATTERN, 1, 0)))
    program.words[Target.FAULTING] = base
    seen = ctypes.create_string_buffer(kernel.PAGE)

    def serve() -> None:
        while True:
            message = os.read(descriptor, 32)
            offset = (struct.unpack_from("=Q", message, 16)[0] & -kernel.PAGE) - base
            request = struct.pack("=QQQQq", base + offset, origin + offset, kernel.PAGE, 0, 0)
            try:
                fcntl.ioctl(descriptor, _UFFDIO_COPY, bytearray(request))
            except OSError as error:
                if error.errno != errno.EEXIST:  # two threads may fault on the same page
                    raise

    threading.Thread(target=serve, daemon=True).start()

    def work() -> None:
        for _ in range(20):
            program.sleep()
            program.beat()
        _libc.madvise(ctypes.c_void_p(base), ctypes.c_size_t(PATTERN), _MADV_DONTNEED)
        # Read by a call that releases the GIL, because the thread that serves the fault needs it.
        _libc.memcpy(seen, ctypes.c_void_p(base), ctypes.c_size_t(kernel.PAGE))
        if seen.raw != program.expected[: kernel.PAGE]:
            program.disturbed("memory whose faults it serves was changed")

    return work


KINDS: dict[str, Callable[[Program], Callable[[], None]]] = {
    "sleeping": sleeping,
    "computing": computing,
    "threaded": threaded,
    "forking": forking,
    "ticking": ticking,
    "signalled": signalled,
    "faulting": faulting,
}


def main() -> None:
    """Run the target `KIND` in place `NUMBER` of the board in the directory `FOLDER`."""
    folder, number, kind, generation, parent = sys.argv[1:]
    kernel.die_with_parent(int(parent))
    kernel.allow_any_tracer()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl-C
    program = Program(Path(folder), int(number), kind)
    work = KINDS[kind](program)
    work()  # for all that is mapped or opened at first use
    program.ready(int(generation))
    while True:
        work()
