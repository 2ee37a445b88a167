"""Inherited state of a process, set to the values that the tests expect before the first test runs.

`nohup` ignores SIGHUP, a shell that runs a job in the background ignores SIGINT and SIGQUIT, service managers block
signals, and execve(2) passes all of that on to every program that a test starts. The environment is inherited too:
colors or a width requested by the caller would change the output that tests read. The state is set once, in the
process of pytest, and thus for every child, however a test starts it.
"""

import contextlib
import os
import resource
import signal
from pathlib import Path

_KEPT_IGNORED = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
"""Python itself ignores the first two, and restores them in programs (subprocess, restore_signals=True). A handler
for the others would repeatedly stop the output of a background job."""
_REMOVED = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE",
            "TTY_INTERACTIVE", "PYTHONBREAKPOINT", "PYTHONDEVMODE", "PYTHONDONTWRITEBYTECODE", "PYTHONINSPECT",
            "PYTHONIOENCODING", "PYTHONOPTIMIZE", "PYTHONSTARTUP", "PYTHONTRACEMALLOC", "PYTHONUNBUFFERED",
            "PYTHONUTF8", "PYTHONVERBOSE", "PYTHONWARNINGS", "PYTHONSAFEPATH")  # fmt: skip
"""Without cached bytecode, which the first program writes, importing iobmd takes 0.16 s instead of 0.05 s."""
DESCRIPTORS = 4096
"""RLIMIT_NOFILE: tests open several hundred files; with a million, as in containers, programs close each number."""


def set_to_expected() -> None:
    """Set the inherited signals, limits, umask and environment of this process and its future children."""
    _set_signals()
    _set_limits()
    os.umask(0o022)
    _set_environment()


def _set_signals() -> None:
    """Restore the default action of every signal in future children; this process still survives ignored signals.

    A handler that does nothing ignores a signal here as well, but execve(2) resets it to the default action.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals() - _KEPT_IGNORED:
        if signal.getsignal(number) is signal.SIG_IGN:
            # SIGCHLD has no effect by default either, but if it is ignored, the exit status of children is discarded.
            signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else _ignore)
    os.register_at_fork(after_in_child=_restore_in_fork)


def _ignore(_number: int, _frame: object) -> None:
    pass


def _restore_in_fork() -> None:
    """Set the same default actions in a fork that does not call execve(2), and remove pytest's time limit."""
    with contextlib.suppress(ValueError):  # not in the main thread: no handler can be set, and none is needed
        for number in signal.valid_signals():
            if signal.getsignal(number) is _ignore:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _set_limits() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for limit, wanted in (
        (resource.RLIMIT_NOFILE, DESCRIPTORS),
        (resource.RLIMIT_NPROC, resource.RLIM_INFINITY),
        (resource.RLIMIT_FSIZE, resource.RLIM_INFINITY),
        (resource.RLIMIT_AS, resource.RLIM_INFINITY),
        (resource.RLIMIT_DATA, resource.RLIM_INFINITY),
        (resource.RLIMIT_CPU, resource.RLIM_INFINITY),
    ):
        _, most = resource.getrlimit(limit)
        # Root may exceed the hard limit; others get as much as it permits.
        for hard in (most if _covers(most, wanted) else wanted, most):
            with contextlib.suppress(ValueError):
                resource.setrlimit(limit, (wanted if _covers(hard, wanted) else hard, hard))
                break
    badness = Path("/proc/self/oom_score_adj")
    if int(badness.read_text()) < 0:  # the OOM killer spares some services, and would spare the tests' children too
        badness.write_text("0")


def _covers(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or (wanted != resource.RLIM_INFINITY and limit >= wanted)


def _set_environment() -> None:
    for name in [name for name in os.environ if name in _REMOVED or name.startswith("LC_")]:
        del os.environ[name]
    os.environ.update(LANG="C.UTF-8", TERM="dumb")
    os.environ.pop("LANGUAGE", None)
