"""The memory of secrets: locked, not dumped, not inherited, between guard pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.backing.anonymous import AnonymousBacking
from iobmd.host import limits
from iobmd.units import PAGE_SIZE, format_size, round_up

if TYPE_CHECKING:
    from iobmd.physical.pin_attempts import PinAttempts
    from iobmd.physical.search import PhysicalConstraints


class SecretBacking(AnonymousBacking):
    """Zeroed locked memory for secrets, with an inaccessible page on each side.

    Core dumps lack it (MADV_DONTDUMP), and a forked child has zeros in its place (MADV_WIPEONFORK). It is pinned if
    the kernel permits it: a page that the kernel moves leaves a copy of its contents behind.

    Parameters
    ----------
    size : int
        Size in bytes, rounded up to whole pages.
    """

    _reusable = False

    def __init__(self, size: int) -> None:
        super().__init__(size, wired=True)

    def _obtain(self, size: int, want: PhysicalConstraints | None, attempts: PinAttempts, alignment: int) -> Mapping:  # noqa: ARG002 (of a secret: always the same)
        try:
            mapping = Mapping.guarded(round_up(size, PAGE_SIZE), PAGE_SIZE)
            for advice in (mman.MADV_DONTDUMP, mman.MADV_WIPEONFORK):
                mman.advise(mapping.address, mapping.size, advice)
        except (OSError, OverflowError) as error:
            raise limits.from_oserror(error, f"cannot map {format_size(size)} for a secret", size) from None
        return mapping

    def _use_hugetlb(self, want: PhysicalConstraints) -> bool:  # noqa: ARG002
        """Return False: hugetlb pages are inherited by forked children."""
        return False
