"""`SecretBuffer`: a buffer for a key or a password, of `iobmd.allocate` and `iobmd.copy`."""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING

from iobmd._internal.chunked import Carried
from iobmd.backing.placement import ANYWHERE, Placement
from iobmd.descriptors import slabs
from iobmd.descriptors.buffer import IOBufferMemoryDescriptor
from iobmd.descriptors.options import CONCEALED, check_request, check_secret
from iobmd.errors import BusyError, VMError
from iobmd.physical import policy

if TYPE_CHECKING:
    from iobmd._native.mapping import SecretSlab
    from iobmd.backing.contents import CopyOf
    from iobmd.task.task import AnyTask


class SecretBuffer(IOBufferMemoryDescriptor):
    """A buffer that is locked, not dumped, not inherited, and cleared when it is freed.

    Parameters
    ----------
    kind : bool or str
        `CONCEALED`: it is inaccessible while it has no view and no method runs.
    contents, node, placement
        As for `IOBufferMemoryDescriptor`.
    """

    _slab_of_secret: SecretSlab | None = None

    def __init__(
        self,
        kind: bool | str,
        *,
        contents: CopyOf | None = None,
        node: int | None = None,
        placement: Placement = ANYWHERE,
    ) -> None:
        super().__init__(contents=contents, node=node, placement=placement)
        self._kind = kind

    def initWithPhysicalMask(
        self, inTask: AnyTask | None, options: int, capacity: int, alignment: int, physicalMask: int
    ) -> bool:
        """Allocate the memory, as `IOBufferMemoryDescriptor.initWithPhysicalMask`.

        Raises
        ------
        IOReturnError
            Also `kIOReturnBadArgument`: the memory cannot be that of a secret.
        """
        if self._state != "not initialised":
            raise BusyError(f"{self!r} is already initialized")
        wanted = check_request(inTask, options, capacity, alignment, physicalMask, placement=self._position)
        if not wanted.piece_alignment or not wanted.wired or self._node is not None:
            check_secret(wanted, self._node)
        contents, self._contents = self._contents, None
        if contents:
            contents.check()
        separate, concealed = not policy.reuses(), self._kind == CONCEALED
        self._capacity = wanted.capacity
        try:
            self._slab_of_secret = slabs.allocate_secret(
                self, wanted.capacity, index(alignment), contents, separate=separate, concealed=concealed
            )
        except Carried as carried:
            raise carried.error from None
        if contents:
            self.source_stopped_ns, self._holes = contents.stopped_ns, contents.holes
        self._options, self._state = wanted.options, "open"
        return True

    def verify(self) -> None:
        """As `IOMemoryDescriptor.verify`, and verify that no byte next to the secret was overwritten."""
        if address := self._overwritten():
            raise _missed(address)
        super().verify()

    def _overwritten(self) -> int:
        return self._slab_of_secret.overwritten(self) if self._slab_of_secret is not None else 0

    def _release(self, *, in_use: bool) -> None:
        address = self._overwritten()
        super()._release(in_use=in_use)
        self._slab_of_secret = None
        if address:
            raise _missed(address)


def _missed(address: int) -> VMError:
    message = f"the byte at {address:#x}, next to a secret, was overwritten: a store has missed the secret"
    return VMError(message, 0, address)
