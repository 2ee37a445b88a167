"""Two guests whose network cards are connected: the tests run in the first, and use the second as another machine."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .guest import BOOT, EndedError, Guests, Outcome, oops
from .kernels import Kernel
from .machine import Link, Machine


def boot(
    guests: Guests,
    kernel: Kernel,
    machine: Machine,
    initramfs: Path,
    peer: Path,
    timeout: float,
    see: Callable[[str], None],
) -> Outcome:
    """Boot two guests of the same hardware, and end the second with the first.

    Parameters
    ----------
    initramfs, peer : Path
        What each of them boots, in separate directories.
    guests, kernel, machine, timeout, see
        As `Guests.boot`.

    Returns
    -------
    Outcome
        That of the first guest, which has failed if the kernel of the second reported an error; that of the second
        if it did not start, or ended too early.
    """
    here, there = socket.socketpair()
    with here, there:
        with ThreadPoolExecutor(1) as pool, Guests() as others:
            linked = machine._replace(link=Link(there.fileno(), 2))
            other = pool.submit(others.boot, kernel, linked, peer, timeout + BOOT, lambda line: see(f"peer: {line}"))
            outcome = guests.boot(kernel, machine._replace(link=Link(here.fileno(), 1)), initramfs, timeout, see)
        try:
            return other.result()._replace(seconds=outcome.seconds)
        except EndedError:  # it was still running, as it should
            failed = oops(peer.with_name("kernel.log").read_text(errors="replace"))
            return (
                outcome if outcome.failure or not failed else outcome._replace(failure=f"the other guest: {failed}")
            )
