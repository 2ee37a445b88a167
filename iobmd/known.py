"""Lists of objects that are looked through and keep nothing alive; any thread may, also while others add to them."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Known(Generic[_T]):
    """Objects, each until it goes; a forked child knows those of its parent."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[_T]] = {}

    def add(self, one: _T) -> None:
        """Take note of it."""
        number = id(one)
        self._references[number] = weakref.ref(one, lambda _gone: self._references.pop(number, None))

    def remove(self, one: _T) -> None:
        """Forget it."""
        self._references.pop(id(one), None)

    def all(self) -> list[_T]:
        """Return those that are there still."""
        return [one for reference in list(self._references.values()) if (one := reference()) is not None]
