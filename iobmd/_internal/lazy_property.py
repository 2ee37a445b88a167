"""Properties that are computed once, without a lock.

Before Python 3.12, `functools.cached_property` computes inside a lock that all objects of the class share. A forked
child inherits it: if another thread was computing at the fork, the child waits forever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

_T = TypeVar("_T")


class LazyProperty(Generic[_T]):
    """A property that is computed on first use and then stored in the object; two threads may compute it twice."""

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> _T: ...
    def __get__(self, instance: object | None, owner: type | None = None) -> Self | _T:
        """Return the value, which is not computed again: an attribute of the object has priority over this."""
        if instance is None:
            return self
        value = instance.__dict__[self._name] = self._compute(instance)
        return value
