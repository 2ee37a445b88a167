"""Errors that operations are expected to raise."""

from collections.abc import Callable

import pytest

from iobmd import IOReturn, IOReturnError


def refusal(action: Callable[[], object]) -> tuple[IOReturn, str]:
    """Return the code and the message of the error that `action` must raise."""
    with pytest.raises(IOReturnError) as caught:
        action()
    return caught.value.code, str(caught.value)


def code_of(action: Callable[[], object]) -> IOReturn:
    """Return the code of the error that `action` must raise."""
    return refusal(action)[0]
