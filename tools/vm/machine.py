"""The hardware of a guest, and QEMU's options for it."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

QEMU = "qemu-system-x86_64"


class Machine(NamedTuple):
    """A guest's hardware."""

    memory: int = 1024
    """MiB."""
    below_4g: int = 0
    """MiB of it below 4 GiB, with the rest above; 0: as many as fit."""
    nodes: int = 1
    """NUMA nodes, 1 or 2: memory and the two processors are divided among them evenly."""
    edu: int = 0
    """Educational devices, which do DMA of up to 4 KiB at a time in either direction (QEMU, docs/specs/edu)."""
    edu_mask: int = (1 << 64) - 1
    """Number of address bits of an edu device, which truncates other addresses and silently reads a wrong frame."""
    ivshmem: int = 0
    """MiB of memory of an ivshmem-plain device, whose region 2 is prefetchable (docs/specs/ivshmem-spec); 0: none."""
    rtl8139: bool = False
    """A network card whose registers have 8, 16 and 32 bits; it is connected to nothing."""
    e1000: bool = False
    """A network card (82540EM), connected to QEMU's user mode network: the gateway 10.0.2.2 answers ARP and ping."""
    iommu: bool = False
    """An Intel IOMMU, through which all devices go."""
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
        )

    def command(self, kernel: Path, initramfs: Path, log: Path) -> list[str]:
        """Return QEMU's command line; results are written to its standard output, the kernel's messages to `log`."""
        return [
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "tcg", "-cpu", "max", "-smp", f"2,sockets={self.nodes}", "-m", str(self.memory)),
            *("-machine", self._chipset(), "-kernel", str(kernel), "-initrd", str(initramfs)),
            *(
                "-append",
                f"console=ttyS0 panic=-1 oops=panic no_timer_check mitigations=off loglevel=5 {self.append}",
            ),
            *("-serial", f"file:{log}", "-chardev", "stdio,id=results,signal=off", "-serial", "chardev:results"),
            *self._memory(),
            *self._devices(),
            *self._tracing(),
        ]

    def _chipset(self) -> str:
        return "q35" + (f",max-ram-below-4g={self.below_4g}M" if self.below_4g else "")

    def _memory(self) -> list[str]:
        words: list[str] = []
        for node in range(self.nodes if self.nodes > 1 else 0):
            words += ["-object", f"memory-backend-ram,id=memory{node},size={self.memory // self.nodes}M"]
            words += ["-numa", f"node,nodeid={node},cpus={node},memdev=memory{node}"]
        return words

    def _devices(self) -> list[str]:
        words = ["-device", "intel-iommu,intremap=on"] if self.iommu else []
        words += ["-device", f"edu,dma_mask={self.edu_mask:#x}"] * self.edu
        if self.ivshmem:
            words += ["-object", f"memory-backend-ram,id=ivshmem,size={self.ivshmem}M,share=on"]
            words += ["-device", "ivshmem-plain,memdev=ivshmem"]
        if self.rtl8139:
            words += ["-device", "rtl8139,romfile="]  # no boot program, which would access the registers
        if self.e1000:
            words += ["-netdev", "user,id=network,restrict=on", "-device", "e1000,netdev=network,romfile="]
        if self.disk:
            words += ["-drive", f"file={self.disk},format=raw,if=none,id=disk,cache=unsafe"]
            words += ["-device", "nvme,serial=iobmd,drive=disk"]
        return words

    def _tracing(self) -> list[str]:
        if not self.trace:
            return []
        return ["-D", str(self.trace), "-d", "trace:memory_region_ops_read,trace:memory_region_ops_write"]


def missing() -> str:
    """Return which programs for running guests are missing, "" if none."""
    paths = f"{os.environ.get('PATH', os.defpath)}:/sbin:/usr/sbin"
    needed = (QEMU, "busybox", "dpkg-deb", "apt-get", "ldd", "zstd", "setpriv")
    return " ".join(program for program in needed if not shutil.which(program, path=paths))
