"""Which guests there are: what each is made of, and what runs in it."""

from typing import NamedTuple

from .machine import Machine

_PYTEST = "python3 -m pytest -v --assert=plain -p no:cacheprovider"

_KERNEL_TESTS = " ".join(
    f"tests/{name}.py"
    for name in ("kernel/test_pinning", "kernel/test_purgeable", "kernel/test_mapping", "remote/test_elsewhere")
)
# Emulated, Python is 16 times slower: without what makes thousands of buffers, races processes, or fills gigabytes.
_TOO_SLOW = (
    "three_gigabytes or threads or more_buffers or under_readers or compaction or nothing_moves or without_sparse "
    "or maps_come or fork"
)
_OF_PURGEABLE = "loss_is_told or old_state or obsolete or empty_memory or freed_while"
_SELECTED = f"not ({_TOO_SLOW}) and (not purgeable or {_OF_PURGEABLE})"


class Profile(NamedTuple):
    """One kind of guest."""

    machine: Machine
    tests: str
    """Arguments of pytest."""
    timeout: float = 600
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
        "tests/vm/test_dma.py tests/vm/test_numa.py tests/vm/test_masks.py",
    ),
    "small": Profile(
        Machine(memory=640, below_4g=256, edu=8, edu_mask=(1 << 28) - 1),
        "tests/vm/test_masks.py tests/vm/test_swap.py",
    ),
    "iommu": Profile(Machine(edu=3, iommu=True, append="intel_iommu=on"), "tests/vm/test_iommu.py"),
    "nvme": Profile(Machine(), "tests/vm/test_nvme.py", disk=256),
    "table": Profile(Machine(memory=2048, below_4g=1024), "tests/vm/test_capabilities.py"),
    "kernel": Profile(Machine(memory=2048, below_4g=1024), f"{_KERNEL_TESTS} -k '{_SELECTED}'"),
}
"""By name; a full run takes all of them on every kernel."""

CI = {"5.10": ("device", "table"), "newest": ("device", "small", "iommu", "nvme", "table")}
"""What CI runs: the oldest kernel and the newest; 330 s one at a time, less two at a time."""
