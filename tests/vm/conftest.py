"""Helpers of the tests in guests: devices that do DMA, and a kernel that continuously moves memory."""

import contextlib
import gc
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import edu, pci, registers, rxe
from support.edu import Devices
from support.proof import PAGE, Proof

import iobmd
from iobmd.iommu import IOMapper


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the results that the tests recorded, for the harness (tools/vm/table.py)."""
    # Teardown reports contain all recorded results; those that passed are in the category with the empty name.
    reports = [report for report in terminalreporter.getreports("") if report.when == "teardown"]
    counted: dict[str, int] = {}
    for name, value in (found for report in reports for found in report.user_properties):
        if isinstance(value, int):
            counted[name] = counted.get(name, 0) + value
        else:
            terminalreporter.write_line(f"@@CAPABILITY {name}: {value}")
    for name, value in counted.items():
        terminalreporter.write_line(f"@@COUNT {name}: {value}")
    for line in registers.REPORT:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def devices() -> Devices:
    return Devices.of_guest()


@pytest.fixture
def proof(devices: Devices, record_property) -> Iterator[Proof]:
    """Proof by devices at physical addresses, which counts the transfers."""
    before = devices.transfers
    with iobmd.allocate(len(devices.devices) * PAGE) as pages:
        yield Proof(devices, pages)
    record_property("DMA transfers", devices.transfers - before)


@pytest.fixture(scope="session")
def name() -> str:
    """A device that is bound to VFIO; all others are unchanged."""
    return pci.bind(pci.find(edu.VENDOR, edu.DEVICE)[0], "vfio-pci")


@pytest.fixture
def mapper(name: str) -> Iterator[IOMapper]:
    gc.collect()  # expected errors of an earlier test may refer to registers of the device, and thus hold it
    with IOMapper(name) as one:
        yield one


@pytest.fixture(scope="session")
def rdma_device() -> None:
    """Create an RDMA device in this guest."""
    rxe.start(rxe.HERE)


@pytest.fixture(scope="session")
def rdma_machines(rdma_device: None) -> None:
    """Create one in the other guest too."""
    rxe.wait_for_the_other()
    assert rxe.run_there(f"python3 -m support.rxe {rxe.THERE}") == f"{rxe.DEVICE}\n"


@pytest.fixture
def moving_memory() -> Iterator[None]:
    """Make the kernel compact memory repeatedly, while most of the free memory is filled and freed again."""
    stop = threading.Event()

    def compact() -> None:
        while not stop.wait(0.05):
            Path("/proc/sys/vm/compact_memory").write_text("1")

    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) >> 10
    fill = f"while :; do dd if=/dev/zero of=/tmp/fill bs=1M count={free * 5 // 8}; rm /tmp/fill; done"
    filler = subprocess.Popen(["sh", "-c", fill], stderr=subprocess.DEVNULL, start_new_session=True)
    compactor = threading.Thread(target=compact)
    compactor.start()
    try:
        yield
    finally:
        stop.set()
        compactor.join()
        os.killpg(filler.pid, 9)
        filler.wait()
        with contextlib.suppress(FileNotFoundError):
            Path("/tmp/fill").unlink()
