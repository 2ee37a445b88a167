"""Errors that operations are expected to raise."""

from collections.abc import Callable

import pytest

from iobmd import IOReturn, IOReturnError


def error_of(action: Callable[[], object]) -> IOReturnError:
    """Return the error that `action` must raise."""
    with pytest.raises(IOReturnError) as caught:
        action()
    return caught.value


def refusal(action: Callable[[], object]) -> tuple[IOReturn, str]:
    """Return the code and the message of the error that `action` must raise."""
    error = error_of(action)
    return error.code, str(error)


def code_of(action: Callable[[], object]) -> IOReturn:
    """Return the code of the error that `action` must raise."""
    return error_of(action).code
