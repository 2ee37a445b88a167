"""Argument types that several commands share."""

import argparse
import contextlib
import math
import threading
from collections.abc import Iterator

from iobmd.errors import CannotWireError
from iobmd.memory.mlock import PAGEABLE
from iobmd.units import parse_size

STANDARD_OUTPUT = "-"
_NAMES_OF_STANDARD_OUTPUT = (STANDARD_OUTPUT, "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def size(text: str) -> int:
    """Read a size as `units.parse_size`, for argparse; it must be positive."""
    try:
        number = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive")
    return number


def output(text: str) -> str:
    """Read the name of an output file, for argparse; all names of standard output become `STANDARD_OUTPUT`.

    Otherwise the summary, which is then written to standard error, would be mixed with the bytes.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty")
    return STANDARD_OUTPUT if text in _NAMES_OF_STANDARD_OUTPUT else text


@contextlib.contextmanager
def instead_of_wiring(remedy: str) -> Iterator[None]:
    """In errors on memory that cannot be wired, replace the advice to use pageable memory by the command's option."""
    try:
        yield
    except CannotWireError as error:
        raise CannotWireError(error.strerror.replace(PAGEABLE, remedy), error.errno or 0, error.address) from None


def duration(text: str) -> float:
    """Read a number of seconds, for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds
