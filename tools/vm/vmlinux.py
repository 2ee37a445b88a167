"""The ELF kernel inside a bzImage: QEMU boots it by its PVH note, without decompressing it under emulation."""

import bz2
import gzip
import lzma
import struct
import subprocess


def extract(bzimage: bytes) -> bytes:
    """Return the kernel that a bzImage contains (Documentation/arch/x86/boot.rst, payload_offset).

    Raises ValueError for an unknown compression.
    """
    setup = (bzimage[0x1F1] or 4) + 1
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    begin = setup * 512 + offset
    return _decompress(bzimage[begin : begin + length - 4])  # the size follows in 4 bytes


def _decompress(payload: bytes) -> bytes:
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return gzip.decompress(payload)
    if payload.startswith(b"BZh"):
        return bz2.decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return subprocess.run(["zstd", "-dcq"], input=payload, stdout=subprocess.PIPE, check=True).stdout
    raise ValueError(f"unknown compression of the kernel, which begins with {payload[:6].hex()}")
