"""A reliable connection between two machines (an RC queue pair of pyverbs), by which one reads the other's memory."""

import contextlib
import secrets
import time
from collections.abc import Callable
from typing import Self

import pyverbs.enums as verbs
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

from iobmd import IOReturn, IOReturnError, NotPermittedError

from .messages import Station

PORT = 1
GIDS = 256  # addresses of a port, at most
DEPTH = 16  # transfers in flight
LARGEST = 64 << 20  # bytes of one transfer; the port may permit fewer
ERRORS = {getattr(verbs, name): name for name in dir(verbs) if name.startswith("IBV_WC_") and name.endswith("_ERR")}
TIMEOUT, RETRIES = 18, 7  # 4.096 µs << 18 = 1.07 s until a packet counts as lost, and how often it is repeated


class QueuePair:
    """A queue pair of a device, with its protection domain.

    Parameters
    ----------
    device : str
        The RDMA device, such as "mlx5_0" or "rxe0".
    access : int
        The accesses that the other side is permitted, if the memory is registered for them.
    """

    def __init__(self, device: str, access: int = 0) -> None:
        self._access = access
        with contextlib.ExitStack() as undo:
            context = undo.enter_context(Context(name=device))
            self.domain = undo.enter_context(PD(context))
            self._done = undo.enter_context(CQ(context, 2 * DEPTH))
            room = QPCap(max_send_wr=DEPTH, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
            made = QPInitAttr(qp_type=verbs.IBV_QPT_RC, scq=self._done, rcq=self._done, cap=room, sq_sig_all=1)
            self._pair = undo.enter_context(QP(self.domain, made))
            port = context.query_port(PORT)
            self._largest = min(LARGEST, port.max_msg_sz)
            self._gid_index, gid = _route(context)
            self.here = Station(gid, port.lid, self._pair.qp_num, secrets.randbelow(1 << 24), port.active_mtu)
            self._undo = undo.pop_all()

    def connect(self, there: Station) -> None:
        """Connect it to the queue pair of the other side, which does the same."""
        attributes = QPAttr(qp_state=verbs.IBV_QPS_INIT, cur_qp_state=verbs.IBV_QPS_RESET, port_num=PORT)
        attributes.qp_access_flags = self._access
        attributes.dest_qp_num, attributes.path_mtu = there.queue_pair, min(there.mtu, self.here.mtu)
        attributes.rq_psn, attributes.sq_psn = there.first_packet, self.here.first_packet
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
        attributes.min_rnr_timer, attributes.rnr_retry = 12, RETRIES
        attributes.timeout, attributes.retry_cnt = TIMEOUT, RETRIES
        route = GlobalRoute(dgid=GID(there.gid), sgid_index=self._gid_index)
        attributes.ah_attr = AHAttr(port_num=PORT, is_global=1, gr=route, dlid=there.lid)
        self._pair.to_rts(attributes)

    def read(self, region, address: int, key: int, check: Callable[[], None] = lambda: None) -> None:
        """Fill a `MemoryRegion` with memory of the other side, at its address, which it registered with this key.

        `check` is called while the transfer is in progress, and ends it by an exception.

        Raises
        ------
        IOReturnError
            `kIOReturnNotPermitted`: the other side refuses this address or key. `kIOReturnNotResponding`: it did not
            answer for `RETRIES` timeouts. `kIOReturnIOError`. The connection is then unusable.
        """
        self.transfer(verbs.IBV_WR_RDMA_READ, region, address, key, check)

    def transfer(
        self, operation: int, region, address: int, key: int, check: Callable[[], None] = lambda: None
    ) -> None:
        """As `read`, for a READ or a WRITE of all of a region."""
        starts = range(0, region.length, self._largest)
        for number, offset in enumerate(starts):
            if number >= DEPTH:
                self.wait(check)
            length = min(self._largest, region.length - offset)
            request = SendWR(opcode=operation, num_sge=1, sg=[SGE(region.address + offset, length, region.lkey)])
            request.set_wr_rdma(key, address + offset)
            self._pair.post_send(request)
        for _ in starts[:DEPTH]:
            self.wait(check)

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait for the end of one transfer; `check` and errors as `read`."""
        pause = 1e-5
        while True:
            count, completions = self._done.poll(1)
            if count:
                return _require_success(completions[0].status)
            check()
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)

    def close(self) -> None:
        """End the connection, and close the device with all its regions."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _route(context: Context) -> tuple[int, str]:
    """Return the index and the name of the address of a port: RoCE v2 with an IPv4 address, if it has one."""
    table = [entry for entry in context.query_gid_table(GIDS) if entry.port_num == PORT]
    routed = [entry for entry in table if entry.gid_type == verbs.IBV_GID_TYPE_ROCE_V2]
    best = next((entry for entry in routed if "ffff:" in entry.gid_str()), (routed or table)[0])
    return best.gid_index, best.gid_str()


def _require_success(status: int) -> None:
    if status == verbs.IBV_WC_SUCCESS:
        return
    why = f"an RDMA transfer ended with {ERRORS.get(status, status)}"
    if status == verbs.IBV_WC_REM_ACCESS_ERR:
        raise NotPermittedError(f"{why}: the other side has not registered this memory with this key")
    if status == verbs.IBV_WC_RETRY_EXC_ERR:
        raise IOReturnError(IOReturn.kIOReturnNotResponding, f"{why}: the other side does not answer")
    raise IOReturnError(IOReturn.kIOReturnIOError, why)
