"""Objects that end a use of memory or of a device when they are collected, so that a copy would end it too early."""

from typing import NoReturn, SupportsIndex


class Uncopyable:
    """An object that copy.copy and pickle refuse."""

    __slots__ = ()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{type(self).__name__} belongs to its process and cannot be copied or pickled")
