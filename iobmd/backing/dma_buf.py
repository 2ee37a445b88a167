"""Memory of a dma-buf: that of another driver or of a heap, mapped in this process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING, NoReturn

from iobmd.backing.shared import SharedBacking
from iobmd.errors import NotPermittedError, UnsupportedError
from iobmd.host import limits
from iobmd.memory import dma_buf
from iobmd.memory.shmem import Extent, SharedObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping


class DmaBufBacking(SharedBacking):
    """Memory of a dma-buf. `pin` and `unpin` announce accesses by the processor to its exporter.

    Its pages belong to the exporter: the kernel neither shows their frames to processes, nor pins them for any.

    Parameters
    ----------
    fd : int
        A descriptor of the dma-buf, which belongs to this object from now on, also after an error.
    access : int
        The accesses of this process: `dma_buf.READ`, `dma_buf.WRITE` or both.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`: its descriptor is open for reading only.
    """

    def __init__(self, fd: int, access: int) -> None:
        try:
            size = dma_buf.size_of(fd)
            _require_writable(fd)
            shared = SharedObject(fd, [Extent(0, size)])
        except BaseException:
            os.close(fd)
            raise
        super().__init__(shared, wired=False)
        self._access = access
        self._began = False

    def duplicate(self) -> int:
        """Return another descriptor of the dma-buf. Raises as `dma_buf.duplicate`."""
        with self._shared.fd.use() as fd:
            return dma_buf.duplicate_known(fd)

    def pin(self) -> None:
        """Begin accesses by the processor."""
        with self._shared.fd.use() as fd:
            self._announce(dma_buf.begin, fd)
        self._began = True

    def unpin(self, *, wait: bool = True) -> None:  # noqa: ARG002 (the protocol's)
        """End accesses by the processor."""
        if self._began:
            self._began = False
            with self._shared.fd.use() as fd:
                self._announce(dma_buf.end, fd)

    def _announce(self, change: Callable[[int, int], None], fd: int) -> None:
        try:
            change(fd, self._access)
        except OSError as error:
            raise limits.from_oserror(
                error, "the exporter of the dma-buf refuses accesses by the processor"
            ) from None

    @contextlib.contextmanager
    def _accessed(self) -> Iterator[None]:
        """Announce accesses inside a `with` block, unless `pin` has done so."""
        if self._began:
            yield
            return
        with self._shared.fd.use() as fd:
            self._announce(dma_buf.begin, fd)
            try:
                yield
            finally:
                self._announce(dma_buf.end, fd)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, starting at `offset`."""
        with self._accessed():
            return super().read(offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        with self._accessed():
            super().read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""
        with self._accessed():
            super().write(offset, data)

    def _require_room(self, mapping: Mapping, offset: int, length: int, *, swappable: bool = True) -> None:
        """Check nothing: all pages exist."""

    def read_runs(self, *, gaps: bool = False) -> NoReturn:  # noqa: ARG002 (the protocol's)
        """Raise: the kernel hides the frames."""
        raise _hidden()

    @property
    def pin_refusal(self) -> NoReturn:  # type: ignore[override]
        """Raise, as `read_runs`."""
        raise _hidden()

    def page_counts(self) -> NoReturn:
        """Raise, as `read_runs`."""
        raise _hidden()

    def huge_bytes(self) -> NoReturn:
        """Raise, as `read_runs`."""
        raise _hidden()


def _require_writable(fd: int) -> None:
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise NotPermittedError(
            "the descriptor of this dma-buf is open for reading only: its exporter permits writing with DRM_RDWR, or "
            "O_RDWR in the flags of VIDIOC_EXPBUF",
            errno.EACCES,
        )


def _hidden() -> UnsupportedError:
    return UnsupportedError(
        "the kernel hides the pages of a dma-buf from processes: pass its descriptor to the driver of the device"
    )
