"""Checks of argument types, with errors that name the parameter."""

from operator import index
from typing import SupportsIndex, cast

from iobmd.errors import BadArgumentError

# Types are checked by attributes of the class: isinstance() of a protocol takes as long as a system call.


def check_integers(**values: object) -> None:
    """Raise TypeError for a value that is not an integer, as operator.index() accepts them.

    Without this check, a float would pass every comparison, and be truncated later or fail in an unrelated
    expression.
    """
    for name, value in values.items():
        if not hasattr(type(value), "__index__"):
            raise TypeError(f"{name} must be an integer, not {value!r}")


def integers(**values: object) -> list[int]:
    """Return values as Python's integers. Raises as `check_integers`.

    Sums of NumPy's integers wrap around, also those of a NumPy integer and a small Python integer. Offsets and
    lengths must therefore be converted before they are compared or stored.
    """
    check_integers(**values)
    return [int(index(cast("SupportsIndex", value))) for value in values.values()]


def optional_integers(**values: object) -> list[int | None]:
    """Return values as `integers`, except that None remains None."""
    return [None if value is None else integers(**{name: value})[0] for name, value in values.items()]


def check_numbers(**values: object) -> None:
    """Raise TypeError for a value that is not a real number."""
    for name, value in values.items():
        if not hasattr(type(value), "__float__") and not hasattr(type(value), "__index__"):
            raise TypeError(f"{name} must be a number, not {value!r}")


def check_timeout(timeout: float | None) -> None:
    """Raise for a timeout that is neither None nor a number of seconds; NaN would never be over."""
    if timeout is not None:
        check_numbers(timeout=timeout)
        if not timeout >= 0:
            raise BadArgumentError(f"timeout must be 0 or more seconds, not {timeout}")


def check_flags(text: str | None = None, /, **values: object) -> None:
    """Raise TypeError for a value that is neither a bool, Python's or NumPy's, nor an integer, nor `text`.

    Without this check, any string would count as True, "no" and "False" included.
    """
    for name, value in values.items():
        if not isinstance(value, int) and not hasattr(type(value), "dtype") and (text is None or value != text):
            choices = "True or False" if text is None else f"True or False, or {text!r}"
            raise TypeError(f"{name} must be {choices}, not {value!r}")


def check_type(expected: type, **values: object) -> None:
    """Raise TypeError for a value that is not an instance of a class."""
    for name, value in values.items():
        if not isinstance(value, expected):
            raise TypeError(f"{name} must be of type {expected.__name__}, not {value!r}")


def offset_of(key: SupportsIndex, length: int) -> int:
    """Return the offset for an index of a sequence; negative indices count from the end. Raises IndexError."""
    number = index(key)
    if not -length <= number < length:
        raise IndexError(f"index {number} is outside the {length} bytes")
    return number % length
