"""Types of command line arguments that several commands take."""

import argparse

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
