"""Video of the kernel's test driver (vivid) in memory of iobmd, by the program of docs/examples: no copy is made."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.errors import code_of
from support.examples import EXAMPLES, run

import iobmd
from iobmd import IOReturn

if TYPE_CHECKING:
    import numpy as np

sys.path.insert(0, str(EXAMPLES))

pytestmark = pytest.mark.needs("vivid")
CAMERA = "/dev/video0"
WIDTH, HEIGHT, RATE = 320, 180, 50
# The bars of the standard pattern at 75 %: white, yellow, cyan, green, magenta, red, blue, black.
BARS = [(191 * (bits >> 1 & 1), 191 * (bits >> 2), 191 * (bits & 1)) for bits in range(7, -1, -1)]
OSD_TEXT_MODE, WITHOUT_TEXT = 0x00F0F001, 2  # V4L2_CID_... of vivid-ctrls.c
ANY, CONTIGUOUS = "any", "contiguous"
ALLOCATORS = {ANY: 0, CONTIGUOUS: 1}
"""What the driver requires of memory: nothing (videobuf2-vmalloc), or to be contiguous (videobuf2-dma-contig)."""


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Import libraries before the memory of this process is counted."""
    import capture  # noqa: F401


@pytest.fixture
def driver(request: pytest.FixtureRequest) -> Iterator[str]:
    """Load the driver, which requires memory of a kind; it can be unloaded only if no memory remains in use."""
    parameters = {
        "n_devs": 1,
        "node_types": 1,
        "num_inputs": 1,
        "input_types": 0,
        "no_error_inj": 1,
        "multiplanar": 1,
    }
    parameters["allocators"] = ALLOCATORS[request.param]
    subprocess.run(["modprobe", "vivid", *(f"{name}={value}" for name, value in parameters.items())], check=True)
    try:
        from linuxpy.video.device import BufferType, Device, set_control

        with Device(CAMERA) as device:
            device.set_format(BufferType.VIDEO_CAPTURE, WIDTH, HEIGHT, "RGB3")
            device.set_fps(BufferType.VIDEO_CAPTURE, RATE)
            set_control(device, OSD_TEXT_MODE, WITHOUT_TEXT)
        yield request.param
    finally:
        subprocess.run(["modprobe", "-r", "vivid"], check=True)


def capture(memory: str, **keywords: bool) -> Any:
    from capture import Capture
    from linuxpy.video.device import Memory

    return Capture(CAMERA, WIDTH, HEIGHT, Memory[memory], **keywords)


def pattern() -> "np.ndarray":
    import numpy

    return numpy.repeat(numpy.array([BARS], "u1"), WIDTH // len(BARS), axis=1).repeat(HEIGHT, axis=0)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("driver", "memory", "contiguous"),
    [
        pytest.param(ANY, "DMABUF", False, marks=pytest.mark.needs("udmabuf")),
        pytest.param(ANY, "DMABUF", True, marks=pytest.mark.needs("udmabuf")),
        pytest.param(CONTIGUOUS, "DMABUF", True, marks=pytest.mark.needs("udmabuf")),
        (ANY, "USERPTR", False),
        (ANY, "USERPTR", True),
    ],
    indirect=["driver"],
)
def test_a_hundred_pictures(driver: str, memory: str, contiguous: bool, record_property) -> None:
    import numpy

    expected = pattern()
    with capture(memory, contiguous=contiguous) as camera:
        places = {buffer.getBytesNoCopy() for buffer in camera.buffers}
        used = set()
        for _number, picture in zip(range(100), camera.pictures(), strict=False):
            assert numpy.array_equal(picture, expected)
            used.add(picture.ctypes.data)
            picture[:] = 1  # so that the next one in this buffer is not this one
        assert used == places
        for buffer in camera.buffers:
            buffer.verify()
    record_property(
        f"V4L2 by {memory}, driver for {driver} memory, {CONTIGUOUS if contiguous else ANY} memory", "works"
    )


@pytest.mark.parametrize("driver", [ANY], indirect=True)
@pytest.mark.parametrize("memory", [pytest.param("DMABUF", marks=pytest.mark.needs("udmabuf")), "USERPTR"])
@pytest.mark.usefixtures("driver")
def test_a_picture_holds_its_buffer(memory: str) -> None:
    with capture(memory) as camera:
        picture = next(camera.pictures())
        (buffer,) = (one for one in camera.buffers if one.getBytesNoCopy() == picture.ctypes.data)
        assert code_of(buffer.free) == IOReturn.kIOReturnBusy
    assert picture.shape == (HEIGHT, WIDTH, 3)  # the memory lives as long as the array
    assert int(picture[0, 0, 0]) == BARS[0][0]


@pytest.mark.parametrize("driver", [ANY], indirect=True)
@pytest.mark.parametrize("memory", [pytest.param("DMABUF", marks=pytest.mark.needs("udmabuf")), "USERPTR"])
@pytest.mark.usefixtures("driver", "nothing_left")
def test_pictures_that_are_abandoned(memory: str) -> None:
    """The buffer of the last picture is filled again when another one is requested, by whichever iterator."""
    with capture(memory) as camera:
        iterators = [camera.pictures() for _buffer in (*camera.buffers, "one more than the driver can have lost")]
        for pictures in iterators:
            next(pictures)
    assert not any(list(pictures) for pictures in iterators)  # they end with the capture


@pytest.mark.parametrize("driver", [CONTIGUOUS], indirect=True)
@pytest.mark.usefixtures("driver", "nothing_left")
def test_a_driver_for_contiguous_memory_has_no_userptr(record_property) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        capture("USERPTR", contiguous=True)
    record_property("V4L2 by USERPTR, driver for contiguous memory", "refused by the driver: EINVAL")


@pytest.mark.needs("udmabuf")
@pytest.mark.parametrize("driver", [CONTIGUOUS], indirect=True)
@pytest.mark.usefixtures("driver", "nothing_left")
def test_a_driver_for_contiguous_memory_refuses_other_memory(record_property) -> None:
    """The halves of a buffer in reverse order are not contiguous, except in bounce buffers for memory above 4 GiB."""
    from linuxpy.video.device import BufferType, Device, Memory, enqueue_buffer_raw, raw

    half = 128 << 10
    with ExitStack() as stack:
        whole = stack.enter_context(iobmd.allocate(2 * half, shared=True, contiguous=True))
        parts = [
            stack.enter_context(iobmd.IOSubMemoryDescriptor.withSubRange(whole, start, half, 3))
            for start in (half, 0)
        ]
        swapped = stack.enter_context(iobmd.IOMultiMemoryDescriptor.withDescriptors(parts, 3))
        device = stack.enter_context(Device(CAMERA))
        stack.callback(os.close, fd := iobmd.dmabuf.export(swapped))
        device.request_buffers(BufferType.VIDEO_CAPTURE, Memory.DMABUF, 1)
        entry = raw.v4l2_buffer(type=BufferType.VIDEO_CAPTURE, memory=Memory.DMABUF)
        entry.m.fd = fd
        with pytest.raises(OSError, match="Bad address"):
            enqueue_buffer_raw(device, entry)
    record_property("V4L2 by DMABUF, driver for contiguous memory, scattered memory", "refused by the driver: EFAULT")


@pytest.mark.parametrize("driver", [ANY], indirect=True)
@pytest.mark.usefixtures("nothing_left")
def test_a_kernel_without_udmabuf_is_named(driver: str, record_property) -> None:
    if Path("/dev/udmabuf").exists():
        pytest.skip("this kernel has udmabuf: the other tests use it")
    with pytest.raises(iobmd.UnsupportedError, match="CONFIG_UDMABUF"):
        capture("DMABUF")
    record_property(f"V4L2 by DMABUF, driver for {driver} memory, {ANY} memory", "no udmabuf")
    with capture("USERPTR") as camera:  # the driver is free again
        next(camera.pictures())


@pytest.mark.parametrize("driver", [ANY], indirect=True)
@pytest.mark.parametrize("memory", [pytest.param("dmabuf", marks=pytest.mark.needs("udmabuf")), "userptr"])
@pytest.mark.usefixtures("driver")
def test_the_program(memory: str) -> None:
    done = run("capture.py", CAMERA, "--size", f"{WIDTH}x{HEIGHT}", "--count", "10", "--memory", memory)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith("10 pictures of 320 x 180 in ")
    assert second == "the mean color of the last one: red 96, green 96, blue 96"
