"""What each side must know about the other to connect, and which RDMA cannot exchange itself."""

from typing import NamedTuple


class Station(NamedTuple):
    """One side of a connection, as the other must know it (struct ibv_qp_attr)."""

    gid: str
    lid: int
    queue_pair: int
    first_packet: int
    mtu: int
