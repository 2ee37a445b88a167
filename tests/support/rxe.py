"""An RDMA device over a network card of a guest (rdma_rxe), and commands on the guest that is connected to it."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

DEVICE, HERE, THERE = "rxe0", "10.0.0.1", "10.0.0.2"
_CARD = "eth0"
_SHELL, _AGENT = 7000, 7001  # ports of the other guest: for commands, and for callers of docs/examples/far
AGENT = ["nc", THERE, str(_AGENT)]
"""As `ssh HOST python3 -m far.agent DEVICE`, without a key (tools/vm/profiles.py)."""

_NETLINK_RDMA, _NLDEV, _NEWLINK = 20, 5, 3  # rdma/rdma_netlink.h
_NAME, _CARD_NAME, _TYPE = 2, 51, 65
_REQUEST_ACK = 0x1 | 0x4


def start(address: str) -> None:
    """Load the modules, connect the network card, and create the device."""
    for module in ("virtio_pci", "virtio_net", "crc32_generic", "ib_uverbs", "rdma_rxe"):
        subprocess.run(["modprobe", module], check=False, capture_output=True)  # built in, or not needed, on some
    for command in (f"ip addr add {address}/24 dev {_CARD}", f"ip link set {_CARD} mtu 4200 up"):
        subprocess.run(command.split(), check=False, capture_output=True)  # the other guest is connected already
    if not Path("/sys/class/infiniband", DEVICE).exists():
        _add(DEVICE, _CARD)
    gids = Path(f"/sys/class/infiniband/{DEVICE}/ports/1/gids")
    mapped = "ffff:" + "{:02x}{:02x}:{:02x}{:02x}".format(*socket.inet_aton(address))
    end = time.monotonic() + 30
    while not any(gid.read_text().strip().endswith(mapped) for gid in gids.iterdir() if _is_set(gid)):
        assert time.monotonic() < end, "the device has no address"
        time.sleep(0.1)


def _is_set(gid: Path) -> bool:
    try:
        return bool(gid.read_text())
    except OSError:
        return False


def _add(name: str, card: str) -> None:
    """Create an RDMA device: RDMA_NLDEV_CMD_NEWLINK, as `rdma link add` does."""
    body = _attribute(_NAME, name) + _attribute(_TYPE, "rxe") + _attribute(_CARD_NAME, card)
    head = struct.pack("=IHHII", 16 + len(body), _NLDEV << 10 | _NEWLINK, _REQUEST_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_RDMA) as link:
        link.bind((0, 0))
        link.send(head + body)
        error = struct.unpack_from("=i", link.recv(4096), 16)[0]
    if error:
        raise OSError(-error, os.strerror(-error))


def _attribute(kind: int, text: str) -> bytes:
    value = text.encode() + b"\0"
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def start_there(command: str) -> subprocess.Popen[str]:
    """Start a command on the other guest, whose standard input and output are pipes here."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(["nc", THERE, str(_SHELL)], text=True, **pipes)
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):  # refused, which the end of its output shows
        process.stdin.write(f"exec {command} 2>/dev/$IOBMD_RESULTS\n")
        process.stdin.flush()
    return process


def run_there(command: str) -> str:
    """Return the output of a command on the other guest."""
    return start_there(command).communicate(timeout=100)[0]


def wait_for_the_other(seconds: float = 200) -> None:
    """Wait until the other guest executes commands."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if run_there("echo here") == "here\n":
            return
        time.sleep(1)
    raise TimeoutError(f"the other guest did not start within {seconds} s")


if __name__ == "__main__":
    start(sys.argv[1])
    print(DEVICE)
