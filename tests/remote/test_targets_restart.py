"""Stopping a program affects none of its system calls: their results and their durations are unchanged."""

import contextlib
import errno
import math
import os
import random
import signal
import time

import pytest
from support import kernel
from support.targets import (
    PATIENCE,
    ProgramResources,
    Stopping,
    Target,
    build,
    check_unchanged,
    exercise,
    in_call,
    on_processors,
    until,
    until_blocked,
)

import iobmd
from iobmd.units import PAGE_SIZE

pytestmark = [pytest.mark.needs("compiler"), pytest.mark.usefixtures("may_trace")]

_FOREVER = {
    # call: its result when it is woken
    "accept": 1,
    "epoll_pwait": 1,
    "epoll_pwait2": 1,
    "epoll_wait": 1,
    "epoll_wait_keeps_registers": 60000,
    "flock": 0,
    "futex": 0,
    "futex_timed": 0,
    "io_uring_enter": 10,  # ten times the completions, and the submissions
    "msgrcv": 1,
    "msgsnd": 0,
    "poll": 1,
    "ppoll": 1,
    "pselect": 1,
    "read": 1,
    "read_socket": 1,
    "recv": 1,
    "recv_timeout": 1,
    "recvmsg_timeout": 1,
    "select": 1,
    "semop": 0,
    "semtimedop": 0,
    "send": 1,
    "setlkw": 0,
    "signalfd": 128,
    "sigtimedwait": 1,
    "sigwaitinfo": 1,
    "wait4": 7,
    "waitid": 7,
    "write": PAGE_SIZE,
}
_INTERRUPTED = ("epoll_pwait_signal", "pause", "ppoll_signal", "sigsuspend")
_EXPIRING = (
    "clock_nanosleep",
    "epoll_pwait_expires",
    "epoll_wait_expires",
    "futex_expires",
    "nanosleep",
    "poll_expires",
    "ppoll_expires",
    "select_expires",
)
SOON_MS = 800  # as in targets_blocked.c


def _result(target: Target, patience: float = PATIENCE) -> tuple[int, int, float, int]:
    code, said = target.end(patience)
    assert code == 0, said
    result, number, elapsed, handled = said.split()
    return int(result), int(number), float(elapsed), int(handled)


@pytest.mark.parametrize("call", _FOREVER)
def test_call_goes_on_until_what_it_waits_for(call: str) -> None:
    with Target([build("blocked"), call]) as target:
        until_blocked(target.pid)
        exercise(target.pid, 4)
        until_blocked(target.pid)
        target.tell()
        result, number, elapsed, handled = _result(target)
    assert (result, errno.errorcode.get(number, number), handled) == (_FOREVER[call], 0, 0)
    assert elapsed > 5, "it did not wait"


@pytest.mark.parametrize("call", _INTERRUPTED)
def test_signal_handler_ends_the_call(call: str) -> None:
    with Target([build("blocked"), call]) as target:
        until_blocked(target.pid)
        exercise(target.pid, 4)
        until_blocked(target.pid)  # if the signal is handled before the call begins again, it does not end the call
        target.tell()
        result, number, _elapsed, handled = _result(target)
    assert (result, errno.errorcode[number], handled) == (-1, "EINTR", 1)


@pytest.mark.parametrize("call", ["epoll_wait_expires", "epoll_pwait_expires"])
@pytest.mark.parametrize(("ours", "theirs"), [(0, -1), (-1, 0)])
def test_timeout_is_kept_on_another_processor(call: str, ours: int, theirs: int) -> None:
    # Each processor has its own clock for the processes that run on it.
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        pytest.skip("needs two processors")
    _check_timeout(call, (processors[ours], processors[theirs]))


@pytest.mark.parametrize("call", _EXPIRING)
def test_timeout_is_kept(call: str) -> None:
    _check_timeout(call)


def _result_under_stops(
    call: str, most: float = math.inf, processors: tuple[int, int] | None = None
) -> tuple[int, int, float]:
    """Return the result, the error number and the duration of a call during which there were up to `most` stops."""
    for _ in range(10):  # on a busy machine, the call may end before the first stop
        with Target([build("blocked"), call]) as target, contextlib.ExitStack() as stack:
            until_blocked(target.pid)
            if processors:
                stack.enter_context(on_processors(*processors, target.pid))
            with Stopping(target.pid, 0.02) as stopping:
                until(lambda: stopping.count >= most or target.process.poll() is not None)
            result, number, elapsed, _handled = _result(target)
        print(f"{call}: {elapsed:.1f} ms, {stopping.count} stops")
        if stopping.count > 1:  # under emulation, a stop takes 100 ms
            return result, number, elapsed
    raise AssertionError("there were no stops")


def _check_timeout(call: str, processors: tuple[int, int] | None = None) -> None:
    result, number, elapsed = _result_under_stops(call, processors=processors)
    if call.startswith("futex"):
        assert (result, errno.errorcode[number]) == (-1, "ETIMEDOUT")
    else:
        assert (result, number) == (0, 0)
    # A timeout that started again with each stop would not end under stops. The kernel rounds some timeouts to
    # milliseconds, which adds one for each stop, and the program may have to wait for a processor.
    assert SOON_MS - 1 <= elapsed < SOON_MS + 10_000


@pytest.mark.parametrize(
    ("call", "due", "expected"),
    [
        ("recv_expires", 1000, (-1, "EAGAIN")),
        ("semtimedop_expires", 1500, (-1, "EAGAIN")),
        ("sigtimedwait_expires", 1500, (-1, "EAGAIN")),
        ("epoll_pwait2_expires", 1500, (0, 0)),
    ],
)
def test_timeout_begins_again_but_comes(call: str, due: int, expected: tuple[int, object]) -> None:
    # The kernel does not record the rest of these timeouts: they start again with each stop, and are never shortened.
    result, number, elapsed = _result_under_stops(call, most=16)
    assert (result, errno.errorcode.get(number, number)) == expected
    assert elapsed >= due - 1


@pytest.mark.parametrize(
    ("call", "number", "part", "whole"),
    [
        ("io_uring_submit_and_wait", "426", 1, 11),  # one submitted; and one completed
        ("recv_waitall", "45", 1, 2),
        ("write_large", "1", 1 << 16, 1 << 20),
    ],
)
def test_call_that_has_done_a_part_says_so(call: str, number: str, part: int, whole: int) -> None:
    # The kernel ends the call for a stop as for a signal, without a way to distinguish them, so that it cannot be
    # restarted. The partial result that it returns is correct.
    with Target([build("blocked"), call]) as target:
        until_blocked(target.pid)
        with Stopping(target.pid, 0.01) as stopping:
            until(lambda: stopping.count > 4 or in_call(target.pid) != number, 2)
        with contextlib.suppress(BrokenPipeError):
            target.tell()
        result, error, _elapsed, _handled = _result(target)
    assert (result, error) in ((part, 0), (whole, 0))


@pytest.mark.parametrize("call", ["pause", "sigsuspend", "epoll_wait", "epoll_pwait", "ppoll"])
def test_signals_during_stops_are_handled_once_each(call: str) -> None:
    number_of = {"pause": "34", "sigsuspend": "130", "epoll_wait": "232", "epoll_pwait": "281", "ppoll": "271"}
    count = 300
    with Target([build("blocked"), "signals", call, str(count)]) as target:
        with Stopping(target.pid) as stopping:
            for sent in range(1, count + 1):
                # It is in its call, or stopped in it; an earlier signal would be handled before the call.
                assert until(lambda: in_call(target.pid) == number_of[call]), target.state()
                time.sleep(random.random() * 0.003)  # so that it arrives at any moment of a stop
                assert until(lambda: in_call(target.pid) == number_of[call]), target.state()
                os.kill(target.pid, signal.SIGRTMIN)
                assert target.line() == f"-1 {errno.EINTR} {sent}"
            code, said = target.end()
        print(f"{call}: {count} signals, {stopping.count} stops")
        assert stopping.count > 20
    assert (code, said) == (0, f"done {count} {count}\n")


@pytest.mark.parametrize("call", ["sigsuspend", "epoll_pwait", "ppoll"])
def test_many_signals_at_once_during_stops(call: str) -> None:
    stops = 0
    for _ in range(10):  # on a busy machine, one run may have few stops
        stops += _stopped_during_signals(call, 2000)
        if stops > 10:
            break
    assert stops > 10


def _stopped_during_signals(call: str, count: int) -> int:
    """Send many signals to a target while it is stopped, and return how many stops there were."""
    with Target([build("blocked"), "signals", call, str(count)]) as target:
        with Stopping(target.pid) as stopping:
            for sent in range(20, count + 1, 20):  # never as many as may be queued
                for _ in range(20):
                    os.kill(target.pid, signal.SIGRTMIN)
                    time.sleep(0.00002)
                _read_until(target, sent)
            code, said = target.end()
        print(f"{call}: {count} signals, {stopping.count} stops")
    assert code == 0
    assert said.split()[-1] == str(count)
    return stopping.count


def _read_until(target: Target, handled: int) -> None:
    """Read its lines until it has handled `count` signals; each line describes a call that a signal ended."""
    so_far = 0
    while so_far < handled:
        result, number, now = map(int, target.line().split())
        assert (result, number) == (-1, errno.EINTR)
        assert so_far < now <= handled
        so_far = now


# --- a tick each millisecond


@pytest.mark.parametrize("kind", ["timerfd", "sleep", "signal"])
def test_no_tick_of_a_millisecond_timer_is_lost(kind: str) -> None:
    with Target([build("busy"), kind]) as target:
        exercise(target.pid, 10, pause=0.01)
        target.tell()
        code, said = target.end()
    print(f"{kind}: {said.strip()}")
    fields = dict(zip(said.split()[::2], map(int, said.split()[1::2]), strict=True))
    assert code == 0
    assert fields["ticks"] > 100
    assert (fields["lost"], fields["errors"]) == (0, 0)


# --- threads that compute


def _said(*command: str) -> str:
    with Target([build("busy"), *command]) as target:
        code, said = target.end(60)
    assert code == 0
    return said


def test_threads_compute_the_same() -> None:
    alone = _said("compute", "30000")
    stops = 0
    for _ in range(10):  # on a busy machine, one run may have few stops
        with Target([build("busy"), "compute", "30000"]) as target, Stopping(target.pid) as stopping:
            code, said = target.end(60)
        assert (code, said) == (0, alone)
        stops += stopping.count
        if stops > 20:
            break
    print(f"{stops} stops")
    assert stops > 20


def test_restartable_sequences_are_restarted() -> None:
    with Target([build("busy"), "rseq", "100000"], ready="") as target:
        if target.line() == "none":
            pytest.skip("the C library registers no restartable sequences")
        with Stopping(target.pid, 0.001) as stopping:
            code, said = target.end(60)
        print(f"{stopping.count} stops, the longest {stopping.longest_ns / 1e3:.0f} µs")
        assert stopping.count > 30
    assert (code, said) == (0, "counted 200000\n")


def test_resources_are_really_compared() -> None:
    """The checks of this directory fail if anything remains in the target."""
    with Target([build("busy"), "wait"]) as target:
        until_blocked(target.pid)
        before = ProgramResources.of(target.pid)
        with iobmd.allocate(kernel.PAGE, task=target.pid), pytest.raises(AssertionError):
            check_unchanged(target.pid, before, exact=False, patience=0)
        check_unchanged(target.pid, before)
        target.tell()
        assert target.end() == (5, "woken\n")
