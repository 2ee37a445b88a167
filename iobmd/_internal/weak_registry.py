"""Lists of objects that are looked through and keep nothing alive; any thread may, also while others add to them."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

_T = TypeVar("_T")


class WeakRegistry(Generic[_T]):
    """Objects, each until it goes; a forked child knows those of its parent.

    Compared by identity. A set of references, which each leaves by a callback in C: it is paid for with every
    buffer that is made.
    """

    def __init__(self) -> None:
        self._references: set[weakref.ref[_T]] = set()

    def add(self, one: _T) -> None:
        """Take note of it."""
        self._references.add(weakref.ref(one, self._references.discard))

    def remove(self, one: _T) -> None:
        """Forget it."""
        self._references.discard(weakref.ref(one))

    def all(self) -> list[_T]:
        """Return those that are there still."""
        return [one for reference in list(self._references) if (one := reference()) is not None]
