"""Capture video (V4L2) into memory of iobmd: NumPy arrays of the memory that the driver fills, without a copy.

    python capture.py /dev/video0                    # by dma-buf: requires udmabuf (Linux 6.12, root or group kvm)
    python capture.py /dev/video0 --memory userptr   # by address, on every kernel
    python capture.py /dev/video0 --contiguous       # for drivers that need contiguous memory

It requires NumPy, and linuxpy for the structures and ioctls of V4L2.
"""

import argparse
import contextlib
import os
import select
import time
from collections.abc import Iterator
from typing import Self

import numpy as np
from linuxpy.video.device import BufferFlag, BufferType, Device, Memory, enqueue_buffer_raw, raw

import iobmd

_VIDEO = BufferType.VIDEO_CAPTURE
_PIXEL = 3  # bytes of RGB3


class Capture:
    """Pictures of a camera in buffers of this process, until the end of the `with` block.

    Parameters
    ----------
    path : str
        The device, such as "/dev/video0".
    width, height : int
        The size of the pictures. The driver chooses the closest that it supports: `format` shows it.
    memory : Memory
        How the driver obtains the memory: `Memory.DMABUF` or `Memory.USERPTR`.
    contiguous : bool
        Use contiguous memory, which drivers without scatter/gather need.
    count : int
        Number of buffers. The driver may require more.
    """

    def __init__(
        self, path: str, width: int, height: int, memory: Memory, *, contiguous: bool = False, count: int = 4
    ) -> None:
        self.memory = memory
        self.buffers: list[iobmd.IOBufferMemoryDescriptor] = []
        self._dma_bufs: list[tuple[int, iobmd.IOMemoryDescriptor]] = []
        with contextlib.ExitStack() as undo:
            self._device = undo.enter_context(Device(path))
            self._device.set_format(_VIDEO, width, height, "RGB3")
            self.format = self._device.get_format(_VIDEO)
            for _ in range(self._device.request_buffers(_VIDEO, memory, count).count):
                self._allocate(undo, contiguous)
            undo.callback(self._device.free_buffers, _VIDEO, memory)  # before the memory itself
            for index in range(len(self.buffers)):
                self._queue(index)
            self._device.stream_on(_VIDEO)
            undo.callback(self._device.stream_off, _VIDEO)
            self._access = undo.enter_context(contextlib.ExitStack())
            self._opened = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._opened.close()

    def pictures(self, timeout: float = 5) -> Iterator[np.ndarray]:
        """Yield pictures: rows, columns, and red, green, blue. Each is valid until the next one is requested."""
        while not self._device.closed:
            self._access.close()
            if not select.select([self._device], [], [], timeout)[0]:
                raise TimeoutError(f"no picture within {timeout} s")
            filled = self._device.dequeue_buffer(_VIDEO, self.memory)
            self._begin_access(filled.index)
            if not filled.flags & BufferFlag.ERROR:  # otherwise it is incomplete, and filled again
                yield self._picture(self.buffers[filled.index])

    def _picture(self, buffer: iobmd.IOBufferMemoryDescriptor) -> np.ndarray:
        width, height = self.format.width, self.format.height
        rows = buffer.array("u1", (height, self.format.bytes_per_line))  # which may end with padding
        return rows[:, : width * _PIXEL].reshape(height, width, _PIXEL)

    def _allocate(self, undo: contextlib.ExitStack, contiguous: bool) -> None:
        shared = self.memory == Memory.DMABUF
        buffer = undo.enter_context(iobmd.allocate(self.format.size, shared=shared, contiguous=contiguous))
        self.buffers.append(buffer)
        if shared:
            fd = iobmd.dmabuf.export(buffer)
            undo.callback(os.close, fd)
            self._dma_bufs.append((fd, undo.enter_context(iobmd.dmabuf.attach(fd, "in"))))

    def _begin_access(self, index: int) -> None:
        """Own a buffer until `_access` is closed, by the next request or at the end, which queues it again."""
        self._access.callback(self._queue, index)
        if self.memory == Memory.DMABUF:  # otherwise the driver announces the processor's accesses itself
            _fd, attached = self._dma_bufs[index]
            attached.prepare()
            self._access.callback(attached.complete)

    def _queue(self, index: int) -> None:
        """Pass a buffer to the driver, to be filled."""
        buffer = self.buffers[index]
        entry = raw.v4l2_buffer(index=index, type=_VIDEO, memory=self.memory, length=buffer.getCapacity())
        if self.memory == Memory.DMABUF:
            entry.m.fd, _attached = self._dma_bufs[index]
        else:
            entry.m.userptr = buffer.getBytesNoCopy()
        enqueue_buffer_raw(self._device, entry)


def main() -> None:
    """Capture pictures, and print their rate and the color of the last one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device")
    parser.add_argument("--size", default="640x360", help="width and height (default: 640x360)")
    parser.add_argument("--count", type=int, default=100, help="number of pictures (default: 100)")
    parser.add_argument("--memory", choices=["dmabuf", "userptr"], default="dmabuf")
    parser.add_argument("--contiguous", action="store_true", help="use contiguous memory")
    arguments = parser.parse_args()

    width, height = map(int, arguments.size.split("x"))
    memory = Memory[arguments.memory.upper()]
    with Capture(arguments.device, width, height, memory, contiguous=arguments.contiguous) as capture:
        begin = time.perf_counter()
        for number, picture in enumerate(capture.pictures(), 1):
            color = picture.mean(axis=(0, 1)).round().astype(int)
            if number == arguments.count:
                break
        seconds = time.perf_counter() - begin
        print(f"{number} pictures of {capture.format.width} x {capture.format.height} in {seconds:.1f} s")
        print(f"the mean color of the last one: red {color[0]}, green {color[1]}, blue {color[2]}")


if __name__ == "__main__":
    main()
