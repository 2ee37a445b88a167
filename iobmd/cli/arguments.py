"""Argument types that several commands share."""

import argparse
import math
import threading

from iobmd.units import parse_size


def size(text: str) -> int:
    """Read a size as `units.parse_size`, for argparse; it must be positive."""
    try:
        number = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive")
    return number


def duration(text: str) -> float:
    """Read a number of seconds, for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds
