"""Buffers as windows of MPI and in its collectives, by MPICH and Open MPI, on 2 and 4 ranks of this host."""

import subprocess
from pathlib import Path

import pytest
from iobmd.tools.bench import mpi
from support import requirements
from support.namespaces import WITH_OWN_SHM

TESTS = Path(__file__).parents[1]
EXAMPLE = TESTS.parent / "docs" / "examples" / "mpi_neighbours.py"
IMPLEMENTATIONS = [
    pytest.param("MPICH", marks=pytest.mark.needs("mpi4py", "mpich")),
    pytest.param("Open MPI", marks=pytest.mark.needs("mpi4py", "openmpi")),
]
SECONDS = 90
FAILING = """
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    raise ValueError("of one rank")
MPI.COMM_WORLD.Barrier()
"""


@pytest.mark.needs("numpy")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_windows_and_collectives(implementation: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents of each rank, and the frames of its buffers before and after; `free` is refused under a window."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    size, kinds = 128 << 10, ["pinned", "shared", "pageable", "shared-pageable"]
    if not requirements.missing("frames"):
        size, kinds = 4 << 20, [*kinds, "contiguous", "shared-contiguous"]
    program = ["-m", "support.mpi_ranks", str(size), *kinds]
    printed = mpi.launchers()[implementation].run(ranks, *program, seconds=SECONDS)
    assert printed.splitlines() == kinds


@pytest.mark.needs("memlock")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_buffer_for_all_ranks(implementation: str, ranks: int) -> None:
    printed = mpi.launchers()[implementation].run(ranks, str(EXAMPLE), seconds=SECONDS).splitlines()
    everyone = list(range(1, ranks + 1))
    assert printed == [
        f"Win.Allocate_shared: {everyone}, pinned between prepare and complete",
        f"iobmd.share:         {everyone}, {', '.join(['pinned'] * ranks)}",
    ]


@pytest.mark.needs("root")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_exception_of_one_rank_ends_all(implementation: str) -> None:
    """The other rank waits at a barrier, and would wait forever."""
    launcher = mpi.launchers()[implementation]
    launcher = launcher._replace(command=[*WITH_OWN_SHM, *launcher.command])
    with pytest.raises(subprocess.CalledProcessError) as caught:
        launcher.run(2, "-c", FAILING, seconds=SECONDS)
    assert "ValueError: of one rank" in caught.value.__notes__[0]
