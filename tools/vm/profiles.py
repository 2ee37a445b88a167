"""Which guests there are: what each is made of, and what runs in it."""

from typing import NamedTuple

from .machine import Machine

_PYTEST = "python3 -m pytest -v --assert=plain -p no:cacheprovider -p no:randomly"


class Profile(NamedTuple):
    """One kind of guest."""

    machine: Machine
    tests: str
    """Arguments of pytest."""
    timeout: float = 240
    """Seconds; several times what it takes, for others use the processor too."""
    disk: int = 0
    """MiB of the NVMe disk that it gets, which is compared with what it was to write there."""

    @property
    def command(self) -> str:
        """The script that runs the tests."""
        return f"{_PYTEST} {self.tests}\n"


PROFILES = {
    "device": Profile(
        Machine(memory=2048, below_4g=1024, nodes=2, edu=16),
        "tests/vm/test_dma.py tests/vm/test_numa.py",
    ),
    "iommu": Profile(Machine(edu=3, iommu=True, append="intel_iommu=on"), "tests/vm/test_iommu.py"),
    "nvme": Profile(Machine(), "tests/vm/test_nvme.py", disk=256),
    "kernel": Profile(Machine(memory=2048), "tests/unit/test_errors.py"),
}
"""By name; a full run takes all of them on every kernel."""

CI = {"5.10": tuple(PROFILES), "newest": tuple(PROFILES)}
"""What CI runs: the oldest kernel and the newest, within its time."""
