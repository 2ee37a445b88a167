"""Exceptions with IOKit's error codes: one type for each situation, all derived from `IOReturnError`."""

from collections.abc import Callable
from errno import EMFILE, ENFILE
from typing import Self

from iobmd.constants import IOReturn

NO_DESCRIPTOR = (EMFILE, ENFILE)
"""Error numbers for a lack of file descriptors, which are unrelated to the object of the call."""


class IOReturnError(OSError):
    """An IOKit call failed. Raised wherever IOKit itself would return NULL or an IOReturn.

    Parameters
    ----------
    code : IOReturn
        IOKit's error code. As with `OSError`, an instance of the corresponding subclass is created.
    message : str or callable
        What failed, why, and the remedy. A callable that returns the message is called once, when the message is
        first read (`str`, `repr`, `args`, `strerror`, pickling), for explanations that cost far more than the
        failure.
    errno : int
        The kernel's error number, 0 if there is none.
    address : int, optional
        For `kIOReturnVMError`: the first byte that could not be accessed.

    Attributes
    ----------
    code, errno, address
        As above.
    strerror : str
        The message.
    args : tuple
        The code and the message.
    """

    code: IOReturn
    address: int | None
    _message: str | Callable[[], str]
    _arguments: tuple[object, ...] | None = None
    _by_code: dict[IOReturn, type["IOReturnError"]] = {}  # noqa: RUF012 (filled by NamedError)

    def __new__(
        cls, code: IOReturn, message: str | Callable[[], str], errno: int = 0, address: int | None = None
    ) -> Self:
        """Create the subclass that stands for `code`."""
        fitting = cls._by_code.get(code, cls)
        return (fitting if issubclass(fitting, cls) else cls)._create(code, message, errno, address)

    # Not in __init__: its parameters would have to be those of the class that __new__ was called on.
    @classmethod
    def _create(cls, code: IOReturn, message: str | Callable[[], str], errno: int, address: int | None) -> Self:
        self = OSError.__new__(cls)
        self.errno = errno
        self.code = code if type(code) is IOReturn else IOReturn(code)  # looking up a member takes a microsecond
        self.address = address
        self._message = message
        return self

    @property
    def strerror(self) -> str:  # type: ignore[override]
        """The message."""
        if not isinstance(self._message, str):
            self._message = self._message()
        return self._message

    @property
    def args(self) -> tuple[object, ...]:
        """The code and the message, unless other arguments were assigned."""
        return self._arguments or (self.code, self.strerror)

    @args.setter
    def args(self, arguments: tuple[object, ...]) -> None:
        self._arguments = arguments

    def __str__(self) -> str:
        return f"{self.strerror} [{self.code.name}]"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.args))})"

    def __reduce__(self) -> tuple[object, ...]:
        return IOReturnError, (self.code, self.strerror, self.errno, self.address)


class NamedError(IOReturnError):
    """An `IOReturnError` whose class stands for its code: the same parameters, without the code."""

    def __init_subclass__(cls, code: IOReturn | None = None, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if code is not None:
            cls.code = code
            cls._by_code[code] = cls

    def __new__(cls, message: str | Callable[[], str], errno: int = 0, address: int | None = None) -> Self:
        """Create the error."""
        return cls._create(cls.code, message, errno, address)


class BadArgumentError(NamedError, ValueError, code=IOReturn.kIOReturnBadArgument):
    """A bad size, alignment, combination of options, or an offset past the end."""


class NotPrivilegedError(NamedError, PermissionError, code=IOReturn.kIOReturnNotPrivileged):
    """The calling process lacks a capability, such as CAP_SYS_ADMIN for physical addresses."""


class NotPermittedError(NamedError, PermissionError, code=IOReturn.kIOReturnNotPermitted):
    """Access to another task is denied: its user, Yama, a seccomp filter, or another tracer."""


class CannotWireError(NamedError, code=IOReturn.kIOReturnCannotWire):
    """Memory cannot be wired: a limit on locked memory, or pinning is not available."""


class NoResourcesError(NamedError, code=IOReturn.kIOReturnNoResources):
    """No contiguous run, no page under the mask, or an empty pool."""


class NoMemoryError(NamedError, code=IOReturn.kIOReturnNoMemory):
    """The kernel is out of memory or address space."""


class VMError(NamedError, code=IOReturn.kIOReturnVMError):
    """An address range is not mapped or not accessible; `address` is the first such byte."""


class NotFoundError(NamedError, ProcessLookupError, code=IOReturn.kIOReturnNotFound):
    """The task no longer exists: it exited, or its pid was reused."""


class NotReadyError(NamedError, code=IOReturn.kIOReturnNotReady):
    """The operation requires pinned memory, such as a request for a physical address."""


class BusyError(NamedError, BufferError, code=IOReturn.kIOReturnBusy):
    """The memory is in use: prepared, mapped or viewed by a `memoryview`; or a task keeps moving its memory."""

    viewed: bool = False
    """Whether only views, arrays or copies in progress use the memory; these retain it themselves."""


class NotOpenError(NamedError, ValueError, code=IOReturn.kIOReturnNotOpen):
    """The object was used after its release, or before its initialization."""


class TaskTimeoutError(NamedError, TimeoutError, code=IOReturn.kIOReturnTimeout):
    """Another task did not stop, or did not serve a page fault, in time."""


class UnsupportedError(NamedError, code=IOReturn.kIOReturnUnsupported):
    """The kernel, the CPU, the kind of memory or this version of `iobmd` does not support the operation."""


def is_of_system_call(error: OSError) -> bool:
    """Return whether an error is that of a system call. That of a signal handler (TimeoutError) has no number."""
    return error.errno is not None and not isinstance(error, IOReturnError)
