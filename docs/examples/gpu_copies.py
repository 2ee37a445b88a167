"""Measure copies between a GPU and memory of this process: pageable, of the GPU's driver, and of iobmd.

It uses the runtime of CUDA or ROCm, whose functions differ by their prefix only. Without a GPU it prints the reason.
"""

import argparse
import ctypes
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import iobmd

TO_DEVICE, TO_HOST = 1, 2
"""cudaMemcpyHostToDevice and cudaMemcpyDeviceToHost; those of HIP are equal."""
RUNTIMES = [("CUDA", "cuda", "libcudart.so", (13, 12, 11)), ("ROCm", "hip", "libamdhip64.so", (7, 6, 5))]
FUNCTIONS: dict[str, list[Any]] = {
    "GetDeviceCount": [ctypes.POINTER(ctypes.c_int)],
    "Malloc": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t],
    "Free": [ctypes.c_void_p],
    "Memcpy": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    "DeviceSynchronize": [],
    "HostRegister": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint],
    "HostUnregister": [ctypes.c_void_p],
}


class Runtime:
    """The functions of a runtime library, which raise its errors."""

    def __init__(self, name: str, prefix: str, library: ctypes.CDLL) -> None:
        self.name, self._prefix, self._library = name, prefix, library
        for function, types in FUNCTIONS.items():
            getattr(library, prefix + function).argtypes = types
        # The driver's own pinned memory: (pointer, size, flags), and its release.
        self._allocate = library["hipHostMalloc" if prefix == "hip" else "cudaHostAlloc"]
        self._allocate.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint]
        self._free = library["hipHostFree" if prefix == "hip" else "cudaFreeHost"]
        self._free.argtypes = [ctypes.c_void_p]

    def call(self, function: str, *arguments: object) -> None:
        """Call a function; raise OSError with the text of its error."""
        self._check(function, getattr(self._library, self._prefix + function)(*arguments))

    def _check(self, function: str, status: int) -> None:
        if status:
            text = getattr(self._library, f"{self._prefix}GetErrorString")
            text.restype = ctypes.c_char_p
            raise OSError(f"{self._prefix}{function}: {text(status).decode()} ({status})")

    def devices(self) -> int:
        """Return the number of devices."""
        count = ctypes.c_int()
        self.call("GetDeviceCount", ctypes.byref(count))
        return count.value

    def allocate(self, stack: ExitStack, size: int) -> int:
        """Return the address of pinned memory of the driver."""
        address = ctypes.c_void_p()
        self._check("HostAlloc", self._allocate(ctypes.byref(address), size, 0))
        stack.callback(self._free, address)
        return int(address.value or 0)

    def copy(self, target: object, source: object, size: int, direction: int) -> None:
        """Copy, and wait for the end: a copy of pageable memory returns when that was read."""
        self.call("Memcpy", target, source, size, direction)
        self.call("DeviceSynchronize")

    def register(self, stack: ExitStack, address: int, size: int) -> None:
        """Register memory, until the stack is left: before the memory itself is freed."""
        self.call("HostRegister", address, size, 0)
        stack.callback(self.call, "HostUnregister", address)


def candidates(library: str, versions: tuple[int, ...]) -> Iterator[str]:
    """Return where a runtime may be: a library of the system, or a package of pip, as those of PyTorch."""
    yield from (library, *(f"{library}.{version}" for version in versions))
    for folder in sys.path:
        yield from map(str, Path(folder).glob(f"nvidia/*/lib/{library}.*"))


def load(library: str, versions: tuple[int, ...]) -> ctypes.CDLL | None:
    """Load the first candidate that exists."""
    for candidate in candidates(library, versions):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    return None


def find() -> tuple[Runtime | None, list[str]]:
    """Return the first runtime with a device, and why the others cannot be used."""
    reasons = []
    for name, prefix, file, versions in RUNTIMES:
        library = load(file, versions)
        if library is None:
            reasons.append(f"no {file} of {name}")
            continue
        runtime = Runtime(name, prefix, library)
        try:
            if runtime.devices():
                return runtime, reasons
            reasons.append(f"no device of {name}")
        except OSError as error:
            reasons.append(str(error))
    return None, reasons


def pageable(stack: ExitStack, size: int) -> int:
    """Return the address of ordinary memory."""
    memory = stack.enter_context(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    pointer = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(pointer)
    del pointer  # otherwise the mapping could not be closed
    return address


def of_iobmd(stack: ExitStack, size: int) -> int:
    """Return the address of a wired buffer."""
    return stack.enter_context(iobmd.allocate(size)).getBytesNoCopy()


def seconds(action: Callable[[], object]) -> float:
    """Return the duration of a call."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure(
    runtime: Runtime, allocate: Callable[[ExitStack, int], int], size: int, rounds: int, registered: bool
) -> list[float]:
    """Return the milliseconds to allocate and to register memory, and the GB/s to the GPU and back."""
    with ExitStack() as stack:
        device = ctypes.c_void_p()
        runtime.call("Malloc", ctypes.byref(device), size)
        stack.callback(runtime.call, "Free", device)
        found: list[int] = []
        allocating = seconds(lambda: found.append(allocate(stack, size)))
        (address,) = found
        registering = seconds(partial(runtime.register, stack, address, size)) if registered else 0.0
        data = os.urandom(4096) * (size // 4096)
        ctypes.memmove(address, data, size)
        there, back = [], []
        for _ in range(rounds + 1):
            there.append(seconds(partial(runtime.copy, device, address, size, TO_DEVICE)))
            ctypes.memset(address, 0, size)
            back.append(seconds(partial(runtime.copy, address, device, size, TO_HOST)))
            if ctypes.string_at(address, size) != data:
                raise SystemExit("the GPU returned other data")
        # The first copy creates what the driver needs for others.
        return [
            allocating * 1e3,
            registering * 1e3,
            size / statistics.median(there[1:]) / 1e9,
            size / statistics.median(back[1:]) / 1e9,
        ]


def main() -> None:
    """Measure each kind of memory, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="MiB of each copy (default: 256)")
    parser.add_argument("--rounds", type=int, default=10, help="copies of each kind (default: 10)")
    arguments = parser.parse_args()
    runtime, reasons = find()
    if runtime is None:
        print(f"not measured: {'; '.join(reasons)}")
        return
    kinds = [
        ("pageable", pageable, False),
        ("pageable, registered", pageable, True),
        ("pinned by the driver", runtime.allocate, False),
        ("iobmd, registered", of_iobmd, True),
    ]
    print(f"{runtime.name}, {arguments.size} MiB, medians of {arguments.rounds}")
    print(f"{'memory':24}{'allocate':>12}{'register':>12}{'to the GPU':>14}{'back':>14}")
    for name, allocate, registered in kinds:
        row = measure(runtime, allocate, arguments.size << 20, arguments.rounds, registered)
        print(f"{name:24}{row[0]:9.1f} ms{row[1]:9.1f} ms{row[2]:9.1f} GB/s{row[3]:9.1f} GB/s")


if __name__ == "__main__":
    main()
