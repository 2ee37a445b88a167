"""Running guests, several at a time, and reporting their results."""

import functools
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from . import accesses, disk, guest, image, pair
from .architecture import Architecture
from .kernels import Kernel
from .profiles import Profile, profile

_BOOTS = 3  # emulated processors sometimes crash in code that the kernel patches while it boots
_LOG_TAIL = 30  # number of kernel messages that are shown if the guest failed
_LOOK = 0.5  # seconds after which a wait begins again
_speaking = threading.Lock()


class Run(NamedTuple):
    """A guest to be run, and its result."""

    kernel: Kernel
    profile: str
    outcome: guest.Outcome

    def __str__(self) -> str:
        result = f"FAILED: {self.outcome.failure}" if self.outcome.failure else self.outcome.summary
        return f"{self.kernel.release:28} {self.profile:18} {self.outcome.seconds:5.0f} s  {result}"


def run_all(
    architecture: Architecture, pairs: Iterable[tuple[Kernel, str]], tests: str, jobs: int, verbose: bool
) -> list[Run]:
    """Run a guest for each kernel and profile, `jobs` at a time. An interrupt ends them and removes their files.

    `tests` are arguments of pytest, "" for the tests of each profile.
    """
    with (
        tempfile.TemporaryDirectory(prefix="iobmd-vm.") as folder,
        ThreadPoolExecutor(jobs) as pool,
        guest.Guests() as guests,
    ):
        payload = Path(folder, "payload.cpio")
        image.payload(payload, architecture)
        common = (payload, image.base(architecture))
        running = [pool.submit(run, guests, kernel, _wanted(name, tests), common, verbose) for kernel, name in pairs]
        try:
            return [_result(each) for each in running]
        finally:
            for each in running:
                each.cancel()


def _result(running: Future[Run]) -> Run:
    """Wait for a run. A signal that arrives directly before a wait without a time limit would not end that wait."""
    while not wait([running], _LOOK).done:
        pass
    return running.result()


def _wanted(name: str, tests: str) -> tuple[str, Profile]:
    chosen = profile(name)
    return name, chosen._replace(tests=tests) if tests else chosen


def run(
    guests: guest.Guests, kernel: Kernel, named: tuple[str, Profile], common: Iterable[Path], verbose: bool
) -> Run:
    """Run one guest, whose initramfs contains the archives `common`.

    Its output is shown as it arrives, or only if it fails.
    """
    name, wanted = named
    tag = f"{kernel.release} {name}"
    see = functools.partial(_show, tag) if verbose else _pass_over
    with tempfile.TemporaryDirectory(prefix="iobmd-vm.") as folder:
        machine = wanted.machine._replace(append=f"{wanted.machine.append} IOBMD_GUEST={name}")
        if wanted.disk:
            machine = machine._replace(disk=disk.make(Path(folder, "disk"), wanted.disk))
        if wanted.trace:
            machine = machine._replace(trace=Path(folder, "trace"))
        initramfs = Path(folder, "initramfs")
        parts = [kernel.modules, image.packages(kernel.architecture, wanted.packages), *common]
        if wanted.debian:
            parts.append(image.debian_packages(kernel.architecture, wanted.debian))
        image.initramfs(initramfs, wanted.command, *parts)
        boot = functools.partial(guests.boot, kernel, machine, initramfs, wanted.timeout, see)
        if wanted.peer:
            peer = Path(folder, "peer", "initramfs")
            peer.parent.mkdir()
            image.initramfs(peer, wanted.peer, *parts)
            boot = functools.partial(pair.boot, guests, kernel, machine, initramfs, peer, wanted.timeout, see)
        outcome = boot()
        for _ in range(_BOOTS - 1):
            if outcome.came_up:
                break
            print(f"{tag} did not start ({outcome.failure}): trying again", flush=True)
            outcome = boot()
        if machine.disk and not outcome.failure:
            outcome = outcome._replace(failure=disk.compare(machine.disk))
        if machine.trace and not outcome.failure:
            outcome = outcome._replace(failure=accesses.compare(outcome.output, machine.trace))
    done = Run(kernel, name, outcome)
    with _speaking:
        if outcome.failure:
            lines = [*([] if verbose else outcome.output.splitlines()), *outcome.log.splitlines()[-_LOG_TAIL:]]
            print(*(f"{tag} | {line}" for line in lines), sep="\n")
        print(done, flush=True)
    return done


def _show(tag: str, line: str) -> None:
    with _speaking:
        print(f"{tag} | {line}", flush=True)


def _pass_over(_line: str) -> None:
    pass
