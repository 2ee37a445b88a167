"""The Ethernet driver of docs/examples: frames are exchanged with QEMU's network, which answers ARP and ping."""

import socket
import sys
from collections.abc import Iterator

import pytest
from support import pci
from support.examples import EXAMPLES, run
from support.kernel import nothing_is_pinned

sys.path.insert(0, str(EXAMPLES))

pytestmark = pytest.mark.needs("e1000")
OWN, GATEWAY = "10.0.2.15", "10.0.2.2"  # of QEMU's user mode network
ADDRESS_OF_QEMU = bytes.fromhex("525400123456")  # the default of the first card


@pytest.fixture(params=["interrupts", "polling"])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    folder = pci.find(0x8086, 0x100E)[0]
    if request.param == "interrupts":
        pci.bind(folder, "uio_pci_generic")
    yield folder.name
    pci.unbind(folder)


@pytest.fixture
def card(name: str) -> Iterator[object]:
    from e1000 import Card

    with Card(name) as one:
        yield one


@pytest.mark.parametrize("size", [1, 56, 1000, 1472])
def test_a_ping_is_gathered_and_answered(card, size: int, record_property) -> None:
    from e1000.__main__ import ping, resolve

    assert card.address == ADDRESS_OF_QEMU
    own, gateway = socket.inet_aton(OWN), socket.inet_aton(GATEWAY)
    target = resolve(card, own, gateway)
    payload = bytes(index % 251 for index in range(size))
    for _ in range(3):
        pieces, reply = ping(card, target, own, gateway, payload)
        assert reply == payload
        assert pieces >= 2
    if card._device.interrupts:
        assert card._device.interrupts.count > 0
    record_property("frames sent and received", 8)


def test_the_rings_wrap_around(card) -> None:
    from e1000.__main__ import ping, resolve

    own, gateway = socket.inet_aton(OWN), socket.inet_aton(GATEWAY)
    target = resolve(card, own, gateway)
    for number in range(2 * card._receiving.count + 3):
        payload = number.to_bytes(4, "little") * 100
        assert ping(card, target, own, gateway, payload)[1] == payload


def test_nothing_arrives(card) -> None:
    with pytest.raises(TimeoutError, match="descriptor 0"):
        card.receive(0.2)


def test_the_program(name: str) -> None:
    done = run("-m", "e1000", name, OWN, GATEWAY, "1400")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{GATEWAY} is at 52:55:0a:00:02:02" in done.stdout
    assert "1400 bytes returned" in done.stdout


@pytest.mark.usefixtures("nothing_left")
def test_memory_is_given_back(name: str) -> None:
    from e1000 import Card

    for _ in range(2):
        with Card(name):
            pass
    assert nothing_is_pinned()
