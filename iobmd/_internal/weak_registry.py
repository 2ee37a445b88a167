"""Registries of objects that can be enumerated without keeping them alive; safe for concurrent use by threads."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

_T = TypeVar("_T")


class WeakRegistry(Generic[_T]):
    """A registry of objects, from which each is removed when it ends; a forked child has those of its parent.

    Objects are compared by identity. The references are removed by a callback in C, because this adds to the cost of
    every allocation of a buffer.
    """

    def __init__(self) -> None:
        self._references: set[weakref.ref[_T]] = set()

    def add(self, one: _T) -> None:
        """Register an object."""
        self._references.add(weakref.ref(one, self._references.discard))

    def remove(self, one: _T) -> None:
        """Remove an object."""
        self._references.discard(weakref.ref(one))

    def all(self) -> list[_T]:
        """Return the objects that still exist."""
        return [one for reference in list(self._references) if (one := reference()) is not None]
