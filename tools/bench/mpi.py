"""`iobmd bench mpi`: messages, collectives and windows over iobmd memory, and over memory that MPI allocates.

Two ranks on this host (`ranks`), under MPICH and under Open MPI. A missing one has a row with the command that
installs it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from iobmd.cli.child import python
from iobmd.units import format_size

from .result import Result, at_least

DIRECT = "`Win.Allocate`"
"""Memory that MPI knows to be shared by the ranks of a host; other memory is copied in more steps."""
SAMPLES, BYTES = 8, 8 << 20
"""Samples for each round, because one takes milliseconds, and the bytes that each moves at least."""
_INSTALL = {
    "MPICH": "pip install mpi4py mpich",
    "Open MPI": "apt-get install openmpi-bin, and pip install mpi4py",
}


class Launcher(NamedTuple):
    """How the ranks of a program are started under one MPI."""

    command: list[str]
    """mpiexec with its options; the number of ranks and the program follow."""
    environment: dict[str, str]

    def run(self, ranks: int, *program: str, seconds: float | None = None) -> str:
        """Run a program of Python and return its output. An exception in one rank ends all of them (mpi4py.run).

        Raises
        ------
        subprocess.CalledProcessError
            A rank failed; its reason is in `stderr`, and in a note.
        subprocess.TimeoutExpired
            The ranks did not end within `seconds`, and were ended.
        """
        command = [*self.command, "-n", str(ranks), *python("-m", "mpi4py", *program)]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, env=os.environ | self.environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        ) as process:
            try:
                output, errors = process.communicate(timeout=seconds)
            finally:
                process.terminate()  # not kill: it ends its ranks first
        if process.returncode:
            error = subprocess.CalledProcessError(process.returncode, command, output, errors)
            error.add_note(errors)
            raise error
        return output


def launchers() -> dict[str, Launcher]:
    """Return the launcher of each MPI that is installed and that mpi4py can load."""
    found: dict[str, Launcher] = {}
    if not importlib.util.find_spec("mpi4py"):
        return found
    # The package `mpich` has the library and its mpiexec; mpi4py loads the library of another MPI only on request.
    ours, library = Path(sys.executable).with_name("mpiexec"), Path(sys.prefix, "lib", "libmpi.so.12")
    if ours.exists() and library.exists():
        found["MPICH"] = Launcher([str(ours)], {"MPI4PY_LIBMPI": str(library)})
    elif theirs := shutil.which("mpiexec.mpich"):  # of Debian
        found["MPICH"] = Launcher([theirs], {"MPI4PY_LIBMPI": "libmpich.so.12"})
    if theirs := shutil.which("mpiexec.openmpi"):
        # Isolated: ranks on this host only. Otherwise mpiexec ends if there is no ssh.
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        command = [theirs, *root, "--oversubscribe", "--mca", "plm", "isolated"]
        found["Open MPI"] = Launcher(command, {"MPI4PY_LIBMPI": "libmpi.so.40"})
    return found


def run(_size: int, rounds: int) -> list[Result]:
    """Measure; the sizes are those of `ranks`."""
    found = launchers()
    rows = []
    for name, how in _INSTALL.items():
        if name in found:
            rows += _rows(name, found[name], rounds)
        else:
            rows.append(Result(name, "not installed", how, 0.0, "reported", True))
    return rows


def _rows(name: str, launcher: Launcher, rounds: int) -> list[Result]:
    try:
        printed = launcher.run(2, "-m", "iobmd.tools.bench.ranks", str(rounds * SAMPLES), str(BYTES))
    except subprocess.CalledProcessError as error:  # RLIMIT_MEMLOCK, or an MPI that does not start
        reason = re.search(r"^[\w.]+Error: (.*)$", error.stderr, re.MULTILINE)
        return [Result(name, "failed", reason[1] if reason else error.stderr.strip(), 0.0, "reported", False)]
    return [_row(name, **one) for one in json.loads(printed)]


def _row(name: str, what: str, size: int, against: str, theirs: float, ours: dict[str, float]) -> Result:
    """Compare the slowest kind of iobmd memory with MPI's; times in seconds."""
    kind = max(ours, key=lambda one: ours[one])
    ratio = theirs / ours[kind]
    title = f"{name}: {what}, {format_size(size)}"
    figure = f"{size / ours[kind] / 1e9:.2f} GB/s ({kind})"
    floor = f"{against}: {size / theirs / 1e9:.2f} GB/s"
    if against == DIRECT:
        return Result(title, figure, floor, ratio, "reported", True)
    return at_least(title, figure, floor, ratio, 1.0)
