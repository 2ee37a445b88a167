"""Private memory of another task, which only that task maps: it is charged to the task, and its children copy it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NoReturn

from iobmd._native.mapping import ClosedError, Mapping
from iobmd.backing.mapped import span
from iobmd.backing.ranges import RangeBacking
from iobmd.errors import CannotWireError, NotOpenError, UnsupportedError, VMError
from iobmd.host import headroom
from iobmd.memory.mlock import Wiring
from iobmd.remote.mapping import RemoteMapping, private_extent
from iobmd.remote.pin import RemotePin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from iobmd.backing.placement import Placement
    from iobmd.task.task import Task


class RemotePrivateBacking(RangeBacking):
    """Private memory in another task. This process reads and writes it as existing memory of the task.

    Parameters
    ----------
    task : Task
        The other task.
    size : int
        Size in bytes, rounded up to whole pages.
    wired : bool
        Whether to wire it there: pinned, or locked if it cannot be pinned.
    placement : Placement
        The address and the protection.

    Raises
    ------
    IOReturnError
        As `RemoteMapping`, `RangeBacking.pin` and `headroom.require`.
    """

    def __init__(self, task: Task, size: int, *, wired: bool, placement: Placement) -> None:
        self._lock: RemotePin | None = None  # while it is wired, but not pinned
        self._is_left = False
        extent = private_extent(span(0, size))
        pinned = wired and "w" in placement.protection  # a pin requires write access
        try:
            if pinned:
                headroom.require(extent.length, swappable=False, pid=task.pid)
            self._there = RemoteMapping(
                task,
                [extent],
                at=placement.at,
                writable="w" in placement.protection,
                executable="x" in placement.protection,
                private=True,
                pinned=pinned,
            )
        finally:
            if extent.fd:
                extent.fd.close()
        self.mapped_read_only = "w" not in placement.protection
        # It counts the transfers in progress, and is never accessed: the addresses are those of the other task.
        self._transfers = Mapping.borrow(self._there.address, extent.length, False)
        try:
            super().__init__(task, self._there.address, extent.length, writable=False)
            if pin := self._there.transfer_pin():
                self._hold_pin(pin)
            elif wired:
                self._wire()
            self.stopped_ns += self._there.stopped_ns
        except BaseException:
            self.close()
            raise

    def _wire(self) -> None:
        try:
            self.pin()
        except CannotWireError as error:
            message = f"{error.strerror}; memory that is allocated with shared=True is charged to this process"
            raise CannotWireError(message, error.errno or 0) from None
        if isinstance(pin := self._pin, RemotePin):
            self.stopped_ns = pin.stopped_ns
            if not pin.holds_frames:
                self._lock, self._pin, self.pin_refusal = pin, None, pin.refusal

    def pin(self) -> None:
        """As `RangeBacking.pin`; memory that is locked by its options must be pinned, as in this process."""
        self._require_own(self.address, self.address + self.size)
        with self._there.writable():  # a pin requires write access
            if self._lock is None:
                super().pin()
                return
            pin = RemotePin(self._there.task, self.address, self.size)
        if not pin.holds_frames:
            pin.release()
            raise CannotWireError(pin.refusal)
        self._hold_pin(pin)

    def _require(self, *, writable: bool) -> None:
        """Do nothing: it has just been mapped, and each use checks that it still is."""

    def _require_own(self, start: int, end: int) -> None:
        """Raise `kIOReturnVMError` unless the task still maps this memory at these addresses."""
        lost = self._there.lost(start, end)
        if lost is not None:
            message = f"task {self._there.task.pid} has unmapped or replaced the memory of this buffer at {lost:#x}"
            raise VMError(message, address=lost)

    @property
    def wiring(self) -> Wiring:
        """Whether it is pageable, resident or pinned."""
        wiring = super().wiring
        return Wiring.RESIDENT if wiring is Wiring.PAGEABLE and self._lock else wiring

    def lost(self) -> int | None:
        """Return the first address at which its task has unmapped or replaced it, or None."""
        return self._there.lost()

    @contextlib.contextmanager
    def _transfer(self, offset: int, length: int) -> Iterator[None]:
        """Keep it mapped inside a `with` block."""
        try:
            self._transfers.hold()
        except ClosedError:
            raise NotOpenError("this memory is released") from None
        try:
            if length:
                self._require_own(self.address + offset, self.address + offset + length)
            yield
        finally:
            self._transfers.release()

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, starting at `offset`. Raises as `Task.read`."""
        with self._transfer(offset, length):
            return super().read(offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes at `offset`. Raises as `Task.read`."""
        with self._transfer(offset, memoryview(buffer).nbytes):
            super().read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`. Raises as `Task.write`."""
        with self._transfer(offset, memoryview(data).nbytes), self._there.writable():
            super().write(offset, data)

    def copy_to(self, offset: int, length: int, destination: int) -> int:
        """As `Backing.copy_to`."""
        with self._transfer(offset, length):
            return super().copy_to(offset, length, destination)

    def exported(self) -> NoReturn:
        """Raise: it is mapped in the other task only."""
        message = (
            f"this memory is private in task {self._there.task.pid}, and cannot be viewed here: allocate it with "
            "shared=True, and use map() for a view"
        )
        raise UnsupportedError(message)

    def leave(self) -> None:
        """Leave the memory to its task when this backing is closed."""
        self._is_left = True
        self._there.leave()

    def tasks_to_stop(self) -> list[Task]:
        """Return the task in which `seal` unmaps it, if it does."""
        return [self._there.task] if self._there.is_mapped else []

    def seal(self) -> None:
        """Prevent further use, and unmap it in its task, if that still exists. Raises as `RemoteMapping.close`."""
        self._transfers.seal()  # raises while a transfer is in progress, before anything is unmapped
        try:
            self._there.close()
        except BaseException:
            self.unseal()
            raise

    def unseal(self) -> None:
        """Undo `seal`."""
        self._transfers.unseal()

    def drop(self) -> None:
        """As `close`, for a destructor, which must not wait: the memory is unmapped once its task can be stopped."""
        self._release(wait=False)
        self._there.close_when_free()

    def close(self) -> None:
        """Seal and release it; idempotent."""
        self.seal()
        self._release(wait=True)

    def _release(self, *, wait: bool) -> None:
        lock, self._lock = self._lock, None
        for pin in (self._pin, lock):
            if isinstance(pin, RemotePin) and not self._is_left:
                pin.unmapped()
        self.unpin(wait=wait)
        if lock:
            lock.release(wait=wait)
