"""The common properties of guests of one architecture: QEMU's machine, Debian's kernels, and the compiler."""

import platform
from collections.abc import Callable
from typing import NamedTuple

from . import vmlinux


class Architecture(NamedTuple):
    """One architecture. Another one is another value in `ARCHITECTURES`."""

    name: str
    """Its name according to uname(2), and in the names of QEMU's programs."""
    debian: str
    """Debian's name, which is also the flavor of its kernels with pages of the default size."""
    compiler: str
    """The C compiler that builds programs for it on any host."""
    machine: str
    """QEMU's machine."""
    cpu: str
    """QEMU's processor."""
    console: str
    """The terminal of the kernel's messages, which is the first serial port."""
    results: tuple[str, ...]
    """QEMU's options for a serial port that is connected to `chardev=results`."""
    terminal: str
    """The name of that port in the guest."""
    memory: int
    """Physical address at which memory begins."""
    limits_low_memory: bool
    """Whether the machine can have part of its memory below 4 GiB, and the rest above."""
    iommu: str
    """QEMU's option of the machine for an IOMMU, "" if it is a device."""
    iommu_device: str
    """QEMU's device for an IOMMU, "" if it is part of the machine."""
    parameters: str
    """Parameters of the kernel's command line."""
    iommu_parameters: str
    """The same, of guests with an IOMMU."""
    kernel: Callable[[bytes], bytes]
    """Return the file that QEMU boots, from that in Debian's package."""
    series: tuple[str, ...]
    """The kernels of a full run."""

    @property
    def qemu(self) -> str:
        """The name of the emulator."""
        return f"qemu-system-{self.name}"

    @property
    def foreign(self) -> bool:
        """Whether the programs of this host cannot run in its guests."""
        return self.name != platform.machine()


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture(
            name="x86_64",
            debian="amd64",
            compiler="x86_64-linux-gnu-gcc",
            machine="q35",
            cpu="max",
            console="ttyS0",
            results=("-serial", "chardev:results"),
            terminal="ttyS1",
            memory=0,
            limits_low_memory=True,
            iommu="",
            iommu_device="intel-iommu,intremap=on",
            parameters="no_timer_check",
            iommu_parameters="intel_iommu=on",
            kernel=vmlinux.extract,
            # Every long-term series since io_uring's pins are usable, and the newest kernel.
            series=("5.10", "6.1", "6.12", "6.18", "newest"),
        ),
        Architecture(
            name="aarch64",
            debian="arm64",
            compiler="aarch64-linux-gnu-gcc",
            machine="virt,gic-version=3",
            # With QEMU's own algorithm of pointer authentication a guest starts in 3 s, otherwise in 8. Processors
            # that lack 16 KiB pages, such as cortex-a72, do not start such kernels.
            cpu="max,pauth-impdef=on",
            console="ttyAMA0",
            results=("-device", "pci-serial,chardev=results"),  # the machine has one serial port
            terminal="ttyS0",
            memory=1 << 30,
            limits_low_memory=False,
            iommu="iommu=smmuv3",
            iommu_device="",
            parameters="",
            iommu_parameters="",
            kernel=bytes,  # an uncompressed image
            # Pages of 4 and of 16 KiB. Debian has no kernel with 64 KiB, and none of 6.1 with 16 KiB.
            series=("6.1", "6.12", "6.12-16k", "newest", "newest-16k"),
        ),
    )
}


def of_host() -> Architecture:
    """Return the architecture of this machine, for which nothing has to be compiled."""
    return ARCHITECTURES[platform.machine()]
