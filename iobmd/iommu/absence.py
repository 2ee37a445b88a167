"""Why no IOMMU translates for a device, and how to change that."""

from __future__ import annotations

import os
import re
from pathlib import Path

ALL_IOMMUS = Path("/sys/class/iommu")
"""The active IOMMUs of the host."""

_CPUINFO = Path("/proc/cpuinfo")
_INTEL = "boot with intel_iommu=on, and enable VT-d in the firmware"
_AMD = "enable AMD-Vi (IOMMU) in the firmware; the kernel needs no parameter"
_ARM = (
    "the kernel uses an SMMU if the firmware describes it, in the device tree (iommu-map at the PCI host bridge) or "
    "in ACPI's table IORT; enable it in the firmware's setup"
)
_UNKNOWN = "enable it in the firmware, and in the kernel's parameters"
_BY_VENDOR = {"GenuineIntel": _INTEL, "AuthenticAMD": _AMD, "HygonGenuine": _AMD}
_BY_MACHINE = {"aarch64": _ARM}


def reason(name: str, bind_commands: str) -> str:
    """Return why a PCI device is in no IOMMU group, with the remedy for this host."""
    active = _active()
    if active:
        # SMMUs, unlike VT-d and AMD-Vi, add a device to a group when a driver is bound to it (of_iommu_configure).
        return (
            f"{name} is in no group of this host's IOMMUs ({', '.join(active)}): with an SMMU, a device without a "
            f"driver is in none, so bind it, as root: {bind_commands}; otherwise it is not behind an IOMMU"
        )
    return f"no IOMMU translates for {name}: {_remedy()}; virtual machines need an emulated one"


def _active() -> list[str]:
    try:
        return sorted(path.name for path in ALL_IOMMUS.iterdir())
    except OSError:
        return []


def _remedy() -> str:
    if by_machine := _BY_MACHINE.get(os.uname().machine):
        return by_machine
    try:
        vendor = re.search(r"^vendor_id\s*:\s*(\S+)", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        vendor = None
    return _BY_VENDOR.get(vendor[1], _UNKNOWN) if vendor else _UNKNOWN
