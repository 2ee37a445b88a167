"""`IOInterruptEventSource` over an eventfd, as VFIO signals one. Devices: tests/vm."""

import math
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.child import in_child
from support.errors import code_of

from iobmd import IODeviceMemory, IOInterruptEventSource, IOReturn
from iobmd._internal.process_local import Fd
from iobmd.device.vfio import VFIOLine
from iobmd.errors import NotOpenError


class Line:
    """An interrupt that nothing masks."""

    what, automatic = "an eventfd", False

    def __init__(self) -> None:
        self.file = Fd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), self.what)

    read = VFIOLine.read

    def mask(self, *, masked: bool) -> None:
        pass

    def close(self) -> None:
        self.file.close()


@pytest.fixture
def source() -> Iterator[IOInterruptEventSource]:
    with IOInterruptEventSource(Line(), None, 0) as one:
        yield one


@contextmanager
def waiting(source: IOInterruptEventSource, timeout: float | None = None) -> Iterator[list[object]]:
    """Wait for an interrupt in a thread during the block; yield a list that then contains the result or the error."""
    found: list[object] = []

    def wait() -> None:
        try:
            found.append(source.wait(timeout))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(0.3)  # it sleeps in poll(2) by now
    assert not found
    yield found
    thread.join(10)
    assert found, "it still waits"


def test_close_ends_a_wait_of_another_thread(source: IOInterruptEventSource) -> None:
    with waiting(source) as found:
        source.close()
    assert isinstance(found[0], NotOpenError)
    assert code_of(source.wait) == IOReturn.kIOReturnNotOpen


def test_close_in_a_forked_child_does_not_wake_the_parent(source: IOInterruptEventSource) -> None:
    with waiting(source) as found:
        in_child(source.close)
        os.eventfd_write(source.fileno(), 3)
    assert found == [3]
    used = time.thread_time()
    assert source.wait(0.3) == 0
    assert time.thread_time() - used < 0.1, "it polls continuously"


@pytest.mark.parametrize("timeout", [math.inf, 1e12, 1 << 200])
def test_long_timeouts(source: IOInterruptEventSource, timeout: float) -> None:
    with waiting(source, timeout) as found:
        os.eventfd_write(source.fileno(), 2)
    assert found == [2]


def test_timeouts_that_are_no_numbers(source: IOInterruptEventSource) -> None:
    assert code_of(lambda: source.wait(math.nan)) == IOReturn.kIOReturnBadArgument
    with pytest.raises(TypeError, match="timeout must be a number"):
        source.wait("1")  # type: ignore[arg-type]


@pytest.mark.needs("numpy")
def test_a_narrow_timeout(source: IOInterruptEventSource) -> None:
    """The sum of the time and a float16 is infinite if the host has run for 18 hours."""
    import numpy

    begin = time.monotonic()
    assert source.wait(numpy.float16(0.125)) == 0
    assert 0.1 < time.monotonic() - begin < 10


@pytest.mark.parametrize("mapper", ["0000:00:01.0", None, os])
def test_other_objects_than_mappers(mapper: object) -> None:
    for create in (IOInterruptEventSource.ofVFIO, IODeviceMemory.ofVFIO):
        with pytest.raises(TypeError, match="mapper must be an IOMapper"):
            create(mapper, 0)  # type: ignore[operator]


class ClosedBetween:
    """A mapper that another thread closes while its descriptor is duplicated."""

    name = "0000:00:01.0"
    iovmMapMemory = None  # noqa: N815 (IOKit's)

    def __init__(self, calls: int = 1) -> None:
        self._number, self._calls = os.open(os.devnull, os.O_RDWR), calls

    def fileno(self) -> int:
        self._calls -= 1
        if self._calls < 0:
            os.close(self._number)
            raise NotOpenError("closed")
        return self._number


CREATORS = [IOInterruptEventSource.ofVFIO, IODeviceMemory.ofVFIO]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("create", CREATORS)
def test_a_mapper_that_is_closed_between(create: Callable[..., object]) -> None:
    """The duplicate may be a descriptor of another device."""
    assert code_of(lambda: create(ClosedBetween(), 0)) == IOReturn.kIOReturnNotOpen


@pytest.mark.parametrize("create", CREATORS)
def test_no_descriptor_is_free(create: Callable[..., object]) -> None:
    def refused() -> IOReturn:
        mapper = ClosedBetween(9)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))
        return code_of(lambda: create(mapper, 0))

    assert in_child(refused) == IOReturn.kIOReturnNoResources


def test_no_descriptor_is_free_for_a_source() -> None:
    def refused() -> tuple[IOReturn, bool]:
        line = Line()
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))
        return code_of(lambda: IOInterruptEventSource(line, None, 0)), line.file.closed

    assert in_child(refused) == (IOReturn.kIOReturnNoResources, True)
