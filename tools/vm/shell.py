"""A shell in a guest, on the terminal."""

import subprocess
import tempfile
from pathlib import Path

from . import disk, image
from .kernels import Kernel
from .machine import Machine

_DISK = 512  # MiB
_COMMAND = "stty sane\necho 'iobmd is in /iobmd; poweroff -f ends this'\nexec sh -i\n"


def open_in(kernel: Kernel, machine: Machine) -> int:
    """Boot a guest, with a disk, whose shell is on the terminal; return QEMU's exit status."""
    with tempfile.TemporaryDirectory(prefix="iobmd-vm.") as folder:
        payload, initramfs = Path(folder, "payload.cpio"), Path(folder, "initramfs")
        image.payload(payload, kernel.architecture)
        image.initramfs(initramfs, _COMMAND, payload, kernel.modules, image.base(kernel.architecture))
        machine = machine._replace(
            disk=disk.make(Path(folder, "disk"), _DISK), append=f"{machine.append} IOBMD_GUEST=shell"
        )
        command = machine.command(kernel, initramfs, Path(folder, "kernel.log"))
        return subprocess.run(command, check=False).returncode
