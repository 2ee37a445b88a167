"""Requirements of tests on the host, each with a probe. With IOBMD_REQUIRE=all, a missing one is a failure.

`@pytest.mark.needs("root", "swap")` names them. A test whose requirement is missing is skipped with the reason.
"""

import errno
import functools
import importlib.util
import mmap
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from iobmd.units import HUGE_PAGE_SIZE
from support import lazy, program_32_bit
from support.child import CAP_IPC_LOCK

MAY_BE_MISSING: dict[str, str] = {
    # requirement: why it may be missing with IOBMD_REQUIRE=all
    "go": "a compiler of 200 MB for the program of one test",
    "rustc": "the same; it is used if it is installed",
    "chromium": "a browser of 400 MB for one test; it is used if it is installed",
    "two_processors": "a host may have one",
    "procmap_query": "kernels before 6.11 lack it, and maps is searched",
    "pagemap_scan": "kernels before 6.7 lack it, and pagemap is read",
    "diverted_calls": "kernels for aarch64 lack PR_SET_SYSCALL_USER_DISPATCH",
    "programs_32_bit": "a kernel may be built without them",
    "area_names": "a kernel may be built without CONFIG_ANON_VMA_NAME",
    "guest": "make test-vm runs the tests that need it",
    "edu": "the same, for a device of QEMU",
    "udmabuf": "most hosts have no dma-bufs of memory of processes; guests do",
    "dma_heap": "the same",
    "iommu": "the same",
    "iommufd": "Debian's kernels lack it; one guest of make test-vm has it",
    "nvme": "make test-vm runs the tests that need it",
    "e1000": "the same",
    "vivid": "the same",
    "narrow_edu": "the same",
    "registers": "the same",
    "rdma": "the same, for two guests",
    "rdma_answers": "the same; those with Linux 5.10 lack it",
    "two_nodes": "a host may have one; two are those of make test-vm",
    "promtool": "Prometheus takes 330 MB; it is used if it is installed",
    "torch": "the package index only has builds for CUDA, several GB in total; it is used if it is installed",
    "clone_buffers": "kernels before 6.12 lack it",
    "liburing": "it requires Linux 6.15",
    "aarch64_emulation": "a compiler and an emulator of 80 MB for one file of tests; they are used if installed",
    "disk_files": "the temporary directory may be on a tmpfs, as in guests",
    "direct_io": "tmpfs supports it only since Linux 6.6, and the temporary directory may be on a tmpfs",
}


def _root() -> str | None:
    return None if os.geteuid() == 0 else "needs root"


def _frames() -> str | None:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[0] = 1
    import ctypes

    from support import kernel

    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return None if kernel.entries(address, 1)[0] & (1 << 55) - 1 else "frame numbers are hidden (no CAP_SYS_ADMIN)"


def _swap() -> str | None:
    if _root():
        return "needs root to enable swap"
    if not Path("/sys/block/zram0").exists():
        return "no /sys/block/zram0 (modprobe zram)"
    return None if shutil.which("mkswap") else "no mkswap"


def _hugetlb() -> str | None:
    return _root() or (None if Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() else "no 2 MiB pages")


def _memory_cgroup() -> str | None:
    if _root():
        return "needs root to create a memory cgroup"
    v1, v2 = Path("/sys/fs/cgroup/memory/cgroup.procs"), Path("/sys/fs/cgroup/cgroup.controllers")
    return None if v1.exists() or (v2.exists() and "memory" in v2.read_text()) else "no memory cgroup controller"


def _collapse() -> str | None:
    """MADV_COLLAPSE, Linux 6.1."""
    with mmap.mmap(-1, 2 * HUGE_PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area[:] = b"\1" * len(area)
        try:
            area.madvise(25, 0, len(area))
        except OSError as error:
            return None if error.errno != errno.EINVAL else "no MADV_COLLAPSE (before Linux 6.1)"
    return None


def _compiler() -> str | None:
    return None if shutil.which("cc") else "needs a C compiler"


def _big_memory() -> str | None:
    """Require free memory, because searches take no page cache; where everything is required, drop clean caches."""
    if not _has_free(8 << 30) and os.environ.get("IOBMD_REQUIRE") == "all" and not _root():
        Path("/proc/sys/vm/drop_caches").write_text("1")
    return None if _has_free(8 << 30) else "needs 8 GiB of free memory"


def _has_free(size: int) -> bool:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE") > size


def may_lock(size: int) -> bool:
    """Return whether this number of bytes may be locked, and also pinned."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    capabilities = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
    return bool(int(capabilities, 16) & CAP_IPC_LOCK) or limit == resource.RLIM_INFINITY or size < limit


def _memlock() -> str | None:
    return None if may_lock(1 << 30) else "may not lock a GiB (RLIMIT_MEMLOCK, CAP_IPC_LOCK)"


def _own_footprint() -> str | None:
    mapped = Path("/proc/self/maps").read_text()
    return "the sanitizer maps memory itself, and retains some" if re.search("lib[at]san", mapped) else None


def _children_in_memory() -> str | None:
    sanitizer = "libtsan" in Path("/proc/self/maps").read_text()
    return "the thread sanitizer mistakes a child with shared memory for its parent" if sanitizer else None


def _area_names() -> str | None:
    import ctypes

    page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    arguments = [ctypes.c_ulong(number) for number in (0, address, mmap.PAGESIZE)]  # PR_SET_VMA_ANON_NAME
    named = ctypes.CDLL(None).prctl(0x53564D41, *arguments, b"iobmd-test") == 0
    return None if named else "this kernel does not name anonymous memory (CONFIG_ANON_VMA_NAME)"


def _diverted_calls() -> str | None:
    import ctypes

    off = [ctypes.c_ulong(0)] * 4
    permitted = ctypes.CDLL(None).prctl(59, *off) == 0  # PR_SET_SYSCALL_USER_DISPATCH
    return None if permitted else "this kernel does not divert system calls (PR_SET_SYSCALL_USER_DISPATCH)"


def _procmap_query() -> str | None:
    import fcntl

    with Path("/proc/self/maps").open("rb") as file:
        try:
            fcntl.ioctl(file, 0xC0686611, bytes(104))  # PROCMAP_QUERY
        except OSError as error:
            return "no ioctl(PROCMAP_QUERY) (before Linux 6.11)" if error.errno == errno.ENOTTY else None
    return None


def _pagemap_scan() -> str | None:
    import fcntl

    with Path("/proc/self/pagemap").open("rb") as file:
        try:
            fcntl.ioctl(file, 0xC0606610, bytes(96))  # PAGEMAP_SCAN with a structure whose size field is 0
        except OSError as error:
            return "no ioctl(PAGEMAP_SCAN) (before Linux 6.7)" if error.errno == errno.ENOTTY else None
    return None


@functools.cache
def _lazy_copies() -> str | None:
    return lazy.why_not()


def _guest() -> str | None:
    return None if "IOBMD_GUEST" in os.environ else "not a guest (make test-vm runs it in guests)"


def _device(vendor: int, device: int) -> str | None:
    """A device of QEMU, only in a guest: the tests must not access the devices of a host in this way."""
    from support import pci

    return _guest() or (None if pci.find(vendor, device) else f"no PCI device {vendor:04x}:{device:04x}")


def _iommu() -> str | None:
    groups = Path("/sys/kernel/iommu_groups")
    return None if groups.exists() and any(groups.iterdir()) else "no IOMMU translates for a device"


def _access(path: str) -> str | None:
    return None if os.access(path, os.R_OK | os.W_OK) else f"no access to {path}"


def _two_nodes() -> str | None:
    return None if Path("/sys/devices/system/node/node1").exists() else "one NUMA node"


def _vivid() -> str | None:
    """In guests: the test driver of V4L2, with the library of the tests."""
    module = Path("/lib/modules", os.uname().release, "vivid.ko")
    return _guest() or (None if module.exists() else f"no {module}") or _library("linuxpy", "numpy")


def _narrow_edu() -> str | None:
    """In guests of the profile "small", the devices address the memory below 4 GiB (tools/vm/profiles.py)."""
    return None if os.environ.get("IOBMD_GUEST") == "small" else "not a guest whose devices address a part of memory"


def _registers() -> str | None:
    """In guests whose devices count accesses: no other test accesses their registers."""
    return None if os.environ.get("IOBMD_GUEST") == "registers" else "not a guest whose devices count accesses"


def _library(name: str, *needs: str, install: str = "iobmd[interop]") -> str | None:
    """Probe libraries that may be missing; `install` is what pip installs them by, by default an extra of iobmd."""
    lacking = [one for one in (name, *needs) if importlib.util.find_spec(one) is None]
    return f"{', '.join(lacking)} is not installed (pip install {install})" if lacking else None


def _rdma() -> str | None:
    """In guests that are connected to another one (tools/vm/profiles.py)."""
    if os.environ.get("IOBMD_GUEST") != "rdma":
        return "not a guest that is connected to another one"
    return None if importlib.util.find_spec("pyverbs") else "pyverbs is not installed for this Python"


def _rdma_answers() -> str | None:
    if _is_before(6, 1):
        return f"rdma_rxe of Linux {os.uname().release} leaves refused requests and distant atomics unanswered"
    return _rdma()


@functools.cache
def _mpi() -> str | None:
    if reason := _library("mpi4py"):
        return reason
    program = "from mpi4py import MPI; print(MPI.COMM_SELF.Get_size())"
    tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    return None if tried.stdout == "1\n" else f"MPI does not start: {tried.stderr.strip().splitlines()[-1:]}"


def _launcher(implementation: str) -> str | None:
    from iobmd.tools.bench import mpi

    return None if implementation in mpi.launchers() else f"no mpiexec of {implementation}, or no mpi4py"


def _clone_buffers() -> str | None:
    import ctypes

    from support.ring import Ring

    page = ctypes.create_string_buffer(1)
    try:
        with Ring() as one, Ring() as other:
            one.register([(ctypes.addressof(page), 1)])
            other.clone(one)
    except OSError as error:
        return f"no IORING_REGISTER_CLONE_BUFFERS (before Linux 6.12): {error.strerror}"
    return None


def _liburing() -> str | None:
    if _is_before(6, 15):
        return f"Linux {os.uname().release} lacks IORING_OP_READV_FIXED (before Linux 6.15)"
    return _library("liburing")


def _is_before(major: int, minor: int) -> bool:
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (major, minor)


def _direct_io() -> str | None:
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            return f"no O_DIRECT in {tempfile.gettempdir()}: {error.strerror}"
    return None


def _disk_files() -> str | None:
    """Files whose file system tracks dirty pages: the kernel permits no long-term pins of them."""
    folder = tempfile.gettempdir()
    kind = subprocess.check_output(["stat", "-f", "-c", "%T", folder], text=True).strip()
    return f"{folder} is on a {kind}" if kind in ("tmpfs", "ramfs") else None


def _aarch64_emulation() -> str | None:
    needed = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-objdump", "qemu-aarch64-static")
    missing = [program for program in needed if not shutil.which(program)]
    if not (Path(__file__).parents[2] / "cython_ext").exists():
        missing.append("source of the extensions")
    return f"no {', '.join(missing)}" if missing else None


PROBES: dict[str, Callable[[], str | None]] = {
    "root": _root,
    "frames": _frames,
    "swap": _swap,
    "hugetlb": _hugetlb,
    "memlock": _memlock,
    "memory_cgroup": _memory_cgroup,
    "compiler": _compiler,
    "collapse": _collapse,
    "big_memory": _big_memory,
    "own_footprint": _own_footprint,
    "children_in_memory": _children_in_memory,
    "area_names": _area_names,
    "procmap_query": _procmap_query,
    "pagemap_scan": _pagemap_scan,
    "lazy_copies": _lazy_copies,
    "diverted_calls": _diverted_calls,
    "programs_32_bit": functools.cache(program_32_bit.why_not),
    "guest": _guest,
    "edu": lambda: _device(0x1234, 0x11E8),
    "udmabuf": lambda: _access("/dev/udmabuf"),
    "dma_heap": lambda: _access("/dev/dma_heap/system"),
    "iommu": _iommu,
    "iommufd": lambda: _iommu() or _access("/dev/iommu"),
    "nvme": lambda: _device(0x1B36, 0x0010),
    "e1000": lambda: _device(0x8086, 0x100E),
    "vivid": _vivid,
    "narrow_edu": _narrow_edu,
    "registers": _registers,
    "rdma": _rdma,
    "rdma_answers": _rdma_answers,
    "two_nodes": _two_nodes,
    "numpy": lambda: _library("numpy"),
    "pyarrow": lambda: _library("pyarrow"),
    "torch": lambda: _library("torch", install="torch --index-url https://download.pytorch.org/whl/cpu"),
    "mpi4py": _mpi,
    "mpich": lambda: _launcher("MPICH"),
    "openmpi": lambda: _launcher("Open MPI"),
    "clone_buffers": _clone_buffers,
    "liburing": _liburing,
    "disk_files": _disk_files,
    "direct_io": _direct_io,
    "aarch64_emulation": _aarch64_emulation,
    "promtool": lambda: None if shutil.which("promtool") else "promtool of Prometheus is not installed",
    "prometheus_client": lambda: (
        None if importlib.util.find_spec("prometheus_client") else "prometheus_client is not installed (iobmd[test])"
    ),
}


def missing(name: str) -> str | None:
    """Return why the requirement `name` is not met, None if it is."""
    return PROBES[name]()
