"""The kinds of guests: the hardware of each, and the tests that run in it."""

import functools
import shlex
from typing import NamedTuple, Self

from .machine import Machine

# A guest loads only the plugins that are named; each test takes several times as long.
_PYTEST = "python3 -m pytest -v --assert=plain -p no:cacheprovider -p pytest_timeout --timeout=300"

# Under emulation, Python is 16 times slower: tests that create thousands of buffers, race threads or fill gigabytes
# are omitted. Of the tests of purgeable memory, only those run whose results depend on the kernel.
_PURGEABLE = [
    "old_state_is_a_plain_state",
    "obsolete_drops_at_once",
    "empty_memory_that_is_filled_and_swapped_out_has_content",
    *(f"loss_is_told[{lost}-tracked-{page}]" for lost in ("none", "one", "all") for page in ("small", "THP")),
]
_TOO_SLOW = {
    "pinning": (
        *("prepare_in_many_threads", "nothing_moves_a_pinned_page", "fork_moves_nothing", "more_than_one_slot_holds"),
        *("more_buffers_than_one_table_holds", "kernels_without_sparse_tables"),
    ),
    "mapping": ("redirect_under_readers", "maps_come_and_go_in_threads"),
}
_KERNEL_TESTS = [
    *(f"tests/kernel/test_{name}.py" for name in _TOO_SLOW),
    *(f"tests/kernel/test_purgeable.py::test_{name}" for name in _PURGEABLE),
    "tests/interop/test_io_uring.py",
    "tests/remote/test_memory_in_tasks.py",
    "tests/vm/test_many_contiguous.py",
    *(f"--deselect=tests/kernel/test_{file}.py::test_{name}" for file, names in _TOO_SLOW.items() for name in names),
]

# Those that depend on the processor, without those that stop a task thousands of times.
_REMOTE = ("core", "existing", "freeze", "lazy_copies", "snapshot", "unstoppable_tasks", "vector_registers")
_RESTARTED = ("signal_handler_ends_the_call", "timeout_is_kept")
_REMOTE_TESTS = [
    *(f"tests/remote/test_{name}.py" for name in _REMOTE),
    *(f"tests/remote/test_targets_restart.py::test_{name}" for name in _RESTARTED),
    "--deselect=tests/remote/test_unstoppable_tasks.py::test_two_users_at_once",
]

_RDMA = (
    *("python3-pyverbs", "libibverbs1", "ibverbs-providers", "librdmacm1"),
    *("libnl-3-200", "libnl-route-3-200"),
)
# The second guest executes commands that arrive at a port, and serves callers of docs/examples/far at another.
_PEER = """\
modprobe virtio_pci 2>/dev/null
modprobe virtio_net
ip addr add 10.0.0.2/24 dev eth0
ip link set eth0 mtu 4200 up
cd docs/examples || exit
nc -ll -p 7001 -e /bin/sh -c 'exec python3 -m far.agent rxe0 2>/dev/$IOBMD_RESULTS' &
exec nc -ll -p 7000 -e /bin/sh -c 'read -r command; eval "$command"'
"""


def _page(blocks: str) -> str:
    """Return the test that runs blocks of a page of the documentation as written."""
    return shlex.quote(f"tests/unit/test_documentation.py::test_python_blocks_run[{blocks}]")


class Profile(NamedTuple):
    """One kind of guest."""

    machine: Machine
    tests: str
    """Arguments of pytest."""
    timeout: float = 600
    """Limit in seconds: several times the usual duration, because other processes use the processor too."""
    disk: int = 0
    """MiB of its NVMe disk, which is compared with the data that the guest must write."""
    packages: frozenset[str] = frozenset()
    """Python packages that only its tests need."""
    debian: tuple[str, ...] = ()
    """Packages of Debian that only its tests need; their dependencies are not added."""
    peer: str = ""
    """The script of a second guest of the same hardware, to whose network card that of the first is connected."""
    trace: bool = False
    """Whether the accesses to registers that the guest reports are compared with those that its devices counted."""

    @property
    def command(self) -> str:
        """The script that runs the tests."""
        return f"{_PYTEST} {self.tests}\n"

    def with_all_of(self, other: Self) -> Self:
        """Return a profile that runs the tests of both in one guest."""
        machine = self.machine.with_all_of(other.machine)
        tests = f"{self.tests} {other.tests}"
        timeout, size = max(self.timeout, other.timeout), max(self.disk, other.disk)
        packages, trace = self.packages | other.packages, self.trace or other.trace
        return type(self)(machine, tests, timeout, size, packages, trace=trace)


PROFILES = {
    "device": Profile(
        Machine(memory=2048, below_4g=1024, nodes=2, edu=16),
        "tests/vm/test_capabilities.py tests/vm/test_dma.py tests/vm/test_numa.py tests/vm/test_masks.py",
    ),
    "nvme": Profile(Machine(), "tests/vm/test_nvme.py", disk=256),
    "network": Profile(Machine(e1000=True), "tests/vm/test_e1000.py"),
    "registers": Profile(Machine(edu=1, ivshmem=1, rtl8139=True), "tests/vm/test_registers.py", trace=True),
    "kernel": Profile(Machine(memory=2048, below_4g=1024), shlex.join(_KERNEL_TESTS)),
    "remote": Profile(Machine(memory=2048), shlex.join(_REMOTE_TESTS), timeout=1200),
    "small": Profile(
        Machine(memory=640, below_4g=256, edu=8, edu_narrow=True), "tests/vm/test_masks.py tests/vm/test_swap.py"
    ),
    "dmabuf": Profile(Machine(), f"tests/vm/test_dmabuf.py {_page('dmabuf.md-dma_heap-udmabuf')}"),
    "video": Profile(Machine(), "tests/vm/test_video.py", packages=frozenset({"linuxpy", "numpy"})),
    "rdma": Profile(
        Machine(memory=2560),
        "tests/vm/test_rdma.py tests/vm/test_far.py tests/vm/test_rdma_machines.py",
        timeout=1800,
        debian=_RDMA,
        peer=_PEER,
    ),
    "iommu": Profile(
        Machine(edu=3, ivshmem=1, nvme=True, iommu=True),
        "tests/vm/test_iommu.py tests/vm/test_iommu_interfaces.py tests/vm/test_vfio.py "
        "tests/vm/test_message_interrupts.py",
    ),
}
"""Profiles by name. Profiles joined by + run in one guest, which starts only once; the start is a third of the time
of a short guest."""

ALONE = {"video", "small", "iommu", "registers", "rdma"}  # video: no memory above 4 GiB
"""Profiles whose machine cannot run the tests of the others."""

_FULL = ("device+nvme+network+dmabuf+kernel", "video", "small", "iommu", "registers", "rdma")
FULL = {"x86_64": _FULL, "aarch64": (*_FULL, "remote")}
"""The profiles of a full run on every kernel, by architecture: the suite runs those of `remote` on x86-64 hosts."""

PARTLY: dict[str, dict[str, set[str]]] = {"x86_64": {"6.12-iommufd": {"iommu"}}, "aarch64": {}}
"""Kernels that differ from the others of their series only for some profiles, which a full run runs on them."""

CI: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"5.10": ("device",), "newest": ("device+nvme+network+dmabuf", "video", "small", "iommu", "registers")},
    "aarch64": {"6.12": ("iommu",), "6.12-16k": ("small",)},
}
"""The runs of CI by architecture: the oldest kernel and the newest, and for aarch64 the two page sizes."""


def profile(names: str) -> Profile:
    """Return the profile of one guest from its name, or from several names joined by +."""
    first, *others = names.split("+")
    return functools.reduce(Profile.with_all_of, [PROFILES[name] for name in others], PROFILES[first])
