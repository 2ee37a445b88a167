"""`IOReturnError`: the right Python exception for each code, in every table of the contract; pickling."""

import pickle

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
