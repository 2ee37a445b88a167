"""The hardware of a guest, and QEMU's options for it."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from .architecture import Architecture
from .kernels import Kernel

MIB = 1 << 20
_BITS_32 = 1 << 32


class Link(NamedTuple):
    """A network card that is connected to that of another guest."""

    socket: int
    """The descriptor of one end of a socket pair; QEMU inherits it."""
    station: int
    """The last byte of its MAC address."""


class Machine(NamedTuple):
    """A guest's hardware."""

    memory: int = 1024
    """MiB."""
    below_4g: int = 0
    """MiB of it below 4 GiB, with the rest above; 0: as many as fit, also where the machine cannot limit them."""
    nodes: int = 1
    """NUMA nodes, 1 or 2: memory and the two processors are divided among them evenly."""
    edu: int = 0
    """Educational devices, which do DMA of up to 4 KiB at a time in either direction (QEMU, docs/specs/edu)."""
    edu_narrow: bool = False
    """Whether the edu devices address only the memory below 4 GiB, whose size must be a power of two: they truncate
    other addresses, and silently read a wrong frame. There is memory above in any case."""
    ivshmem: int = 0
    """MiB of memory of an ivshmem-plain device, whose region 2 is prefetchable (docs/specs/ivshmem-spec); 0: none."""
    rtl8139: bool = False
    """A network card whose registers have 8, 16 and 32 bits; it is connected to nothing."""
    e1000: bool = False
    """A network card (82540EM), connected to QEMU's user mode network: the gateway 10.0.2.2 answers ARP and ping."""
    nvme: bool = False
    """An NVMe controller with four message interrupts (MSI-X), without a disk."""
    link: Link | None = None
    """A virtio network card, connected to another guest."""
    iommu: bool = False
    """An IOMMU, through which all devices go."""
    disk: Path | None = None
    """The image of an NVMe disk."""
    trace: Path | None = None
    """The file in which QEMU records each access to memory regions of devices."""
    append: str = ""
    """Additional parameters of the kernel's command line."""

    def with_all_of(self, other: "Machine") -> "Machine":
        """Return a machine with the maximum of both; neither may have an IOMMU or narrow devices."""
        return self._replace(
            memory=max(self.memory, other.memory),
            below_4g=max(self.below_4g, other.below_4g),
            nodes=max(self.nodes, other.nodes),
            edu=max(self.edu, other.edu),
            ivshmem=max(self.ivshmem, other.ivshmem),
            rtl8139=self.rtl8139 or other.rtl8139,
            e1000=self.e1000 or other.e1000,
            nvme=self.nvme or other.nvme,
        )

    def command(self, kernel: Kernel, initramfs: Path, log: Path) -> list[str]:
        """Return QEMU's command line; results are written to its standard output, the kernel's messages to `log`."""
        architecture = kernel.architecture
        return [
            *(architecture.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "tcg", "-cpu", architecture.cpu, "-smp", f"2,sockets={self.nodes}"),
            *("-machine", self._machine(architecture), "-kernel", str(kernel.image), "-initrd", str(initramfs)),
            *("-append", self._parameters(architecture)),
            *("-serial", f"file:{log}", "-chardev", "stdio,id=results,signal=off", *architecture.results),
            *self._memory(architecture),
            *self._devices(architecture),
            *self._tracing(),
        ]

    def _machine(self, architecture: Architecture) -> str:
        words = [architecture.machine]
        if self.below_4g and architecture.limits_low_memory:
            words.append(f"max-ram-below-4g={self.below_4g}M")
        if self.iommu and architecture.iommu:
            words.append(architecture.iommu)
        return ",".join(words)

    def _parameters(self, architecture: Architecture) -> str:
        """Return the kernel's command line. Parameters that it does not know are variables of the first process."""
        words = [f"console={architecture.console}", "panic=-1", "oops=panic", "mitigations=off", "loglevel=5"]
        words += [architecture.parameters, architecture.iommu_parameters if self.iommu else "", self.append]
        words += [f"IOBMD_RESULTS={architecture.terminal}"]
        if self.edu_narrow:
            words += [f"IOBMD_EDU_MASK={self._edu_mask(architecture):#x}"]
        return " ".join(filter(None, words))

    def _edu_mask(self, architecture: Architecture) -> int:
        """Return the address bits of the edu devices."""
        if not self.edu_narrow:
            return (1 << 64) - 1
        return (self.below_4g * MIB if architecture.limits_low_memory else _BITS_32) - 1

    def _size(self, architecture: Architecture) -> int:
        """Return the MiB of memory, larger where there must be some above 4 GiB, and that below cannot be limited."""
        if not self.edu_narrow or architecture.limits_low_memory:
            return self.memory
        return (_BITS_32 - architecture.memory) // MIB + self.memory - self.below_4g

    def _memory(self, architecture: Architecture) -> list[str]:
        size = self._size(architecture)
        words = ["-m", str(size)]
        for node in range(self.nodes if self.nodes > 1 else 0):
            words += ["-object", f"memory-backend-ram,id=memory{node},size={size // self.nodes}M"]
            words += ["-numa", f"node,nodeid={node},cpus={node},memdev=memory{node}"]
        return words

    def _devices(self, architecture: Architecture) -> list[str]:
        words = ["-device", architecture.iommu_device] if self.iommu and architecture.iommu_device else []
        words += ["-device", f"edu,dma_mask={self._edu_mask(architecture):#x}"] * self.edu
        if self.ivshmem:
            words += ["-object", f"memory-backend-ram,id=ivshmem,size={self.ivshmem}M,share=on"]
            words += ["-device", "ivshmem-plain,memdev=ivshmem"]
        if self.rtl8139:
            words += ["-device", "rtl8139,romfile="]  # no boot program, which would access the registers
        if self.e1000:
            words += ["-netdev", "user,id=network,restrict=on", "-device", "e1000,netdev=network,romfile="]
        if self.nvme:
            words += ["-device", "nvme,serial=vectors,max_ioqpairs=3,msix_qsize=4"]
        if self.link:
            words += ["-netdev", f"socket,id=link,fd={self.link.socket}"]
            words += ["-device", f"virtio-net-pci,netdev=link,mac=52:54:00:00:00:{self.link.station:02x},romfile="]
        if self.disk:
            words += ["-drive", f"file={self.disk},format=raw,if=none,id=disk,cache=unsafe"]
            words += ["-device", "nvme,serial=iobmd,drive=disk"]
        return words

    def _tracing(self) -> list[str]:
        if not self.trace:
            return []
        return ["-D", str(self.trace), "-d", "trace:memory_region_ops_read,trace:memory_region_ops_write"]


def missing(architecture: Architecture) -> str:
    """Return which programs for running guests are missing, "" if none."""
    paths = f"{os.environ.get('PATH', os.defpath)}:/sbin:/usr/sbin"
    needed = [architecture.qemu, "busybox", "dpkg-deb", "apt-get", "ldd", "zstd", "setpriv"]
    if architecture.foreign:
        needed.append(architecture.compiler)
    return " ".join(program for program in needed if not shutil.which(program, path=paths))
