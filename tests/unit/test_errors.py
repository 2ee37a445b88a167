"""`IOReturnError`: the right Python exception for each code, in every table of the contract; pickling."""

import pickle
from collections.abc import Callable

import pytest

from iobmd import IOReturn, IOReturnError
from iobmd.errors import VMError

ALSO = {
    IOReturn.kIOReturnBadArgument: ValueError,
    IOReturn.kIOReturnNotPrivileged: PermissionError,
    IOReturn.kIOReturnNotPermitted: PermissionError,
    IOReturn.kIOReturnCannotWire: OSError,
    IOReturn.kIOReturnNoResources: OSError,
    IOReturn.kIOReturnNoMemory: OSError,
    IOReturn.kIOReturnVMError: OSError,
    IOReturn.kIOReturnNotFound: ProcessLookupError,
    IOReturn.kIOReturnNotReady: OSError,
    IOReturn.kIOReturnBusy: BufferError,
    IOReturn.kIOReturnNotOpen: ValueError,
    IOReturn.kIOReturnUnsupported: OSError,
    IOReturn.kIOReturnTimeout: OSError,
}


@pytest.mark.parametrize("code", ALSO)
def test_each_code_makes_its_exception(code: IOReturn) -> None:
    error = IOReturnError(code, "what failed, and why", 12)
    assert isinstance(error, IOReturnError)
    assert isinstance(error, ALSO[code])
    assert (error.code, error.errno, error.strerror) == (code, 12, "what failed, and why")
    assert str(error) == f"what failed, and why [{code.name}]"


def test_without_an_error_number() -> None:
    assert IOReturnError(IOReturn.kIOReturnBusy, "busy").errno == 0


def test_pickles() -> None:
    error = pickle.loads(pickle.dumps(IOReturnError(IOReturn.kIOReturnVMError, "gone", 14, 0x1000)))
    assert type(error) is VMError
    assert (error.code, error.errno, error.address, error.strerror) == (IOReturn.kIOReturnVMError, 14, 4096, "gone")


def test_carries_code_and_message() -> None:
    error = IOReturnError(IOReturn.kIOReturnBusy, "in use")
    assert error.args == (IOReturn.kIOReturnBusy, "in use")
    assert repr(error) == f"BusyError({IOReturn.kIOReturnBusy!r}, 'in use')"
    error.args += ("noted by the caller",)
    assert error.args[2:] == ("noted by the caller",)
    assert str(error) == "in use [kIOReturnBusy]"


@pytest.mark.parametrize("ask", [str, repr, pickle.dumps, lambda error: error.args, lambda error: error.strerror])
def test_a_message_is_made_once_when_it_is_asked_for(ask: Callable[[IOReturnError], object]) -> None:
    made: list[int] = []

    def message() -> str:
        made.append(1)
        return f"number {len(made)}"

    error = IOReturnError(IOReturn.kIOReturnVMError, message, 14, 0x1000)
    assert (error.code, error.errno, error.address) == (IOReturn.kIOReturnVMError, 14, 0x1000)
    assert not made
    ask(error)
    assert str(error) == "number 1 [kIOReturnVMError]"
    assert pickle.loads(pickle.dumps(error)).args == (IOReturn.kIOReturnVMError, "number 1")
    assert made == [1]
