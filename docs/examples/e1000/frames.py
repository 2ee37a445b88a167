"""The frames of the demonstration: ARP (RFC 826) and ICMP echo (RFC 792) over Ethernet."""

import struct

BROADCAST = b"\xff" * 6
_ARP, _IPV4 = 0x0806, 0x0800
_ARP_HEADER = struct.pack("!HHBB", 1, _IPV4, 6, 4)
_REQUEST, _REPLY = 1, 2
ECHO, ECHO_REPLY = 8, 0


def arp_request(source: bytes, own: bytes, wanted: bytes) -> bytes:
    """Return the frame that asks for the Ethernet address of an IPv4 address."""
    payload = _ARP_HEADER + struct.pack("!H", _REQUEST) + source + own + bytes(6) + wanted
    return _ethernet(BROADCAST, source, _ARP) + payload


def arp_reply(frame: bytes, wanted: bytes) -> bytes | None:
    """Return the Ethernet address in the reply for an IPv4 address; None if the frame is another one."""
    is_reply = frame[12:22] == struct.pack("!H", _ARP) + _ARP_HEADER + struct.pack("!H", _REPLY)
    return frame[22:28] if is_reply and frame[28:32] == wanted else None


def echo_headers(target: bytes, source: bytes, own: bytes, peer: bytes, payload: bytes) -> bytes:
    """Return the headers of an echo request, which precede its payload in the frame."""
    icmp = struct.pack("!BBHHH", ECHO, 0, 0, 1, 1)
    icmp = icmp[:2] + _checksum(icmp + payload) + icmp[4:]
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp) + len(payload), 1, 0, 64, 1, 0, own, peer)
    header = header[:10] + _checksum(header) + header[12:]
    return _ethernet(target, source, _IPV4) + header + icmp


def echo_reply(frame: bytes) -> bytes | None:
    """Return the payload of an echo reply; None if the frame is another one."""
    if frame[12:14] != struct.pack("!H", _IPV4) or frame[23] != 1 or frame[34] != ECHO_REPLY:
        return None
    (length,) = struct.unpack_from("!H", frame, 16)
    return frame[42 : 14 + length]


def _ethernet(target: bytes, source: bytes, kind: int) -> bytes:
    return target + source + struct.pack("!H", kind)


def _checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
