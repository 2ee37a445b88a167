"""A 32-bit program that only waits for signals, composed here because compilers of such programs are rare."""

import errno
import platform
import struct
import subprocess
import tempfile
from pathlib import Path

_ADDRESS = 1 << 22
_HEADERS = 52 + 2 * 32
# By processor: its number in ELF, the flags of its programs, and the code: a loop of pause(2), number 29.
_CODE = {
    "x86_64": (3, 0, bytes.fromhex("b81d000000 cd80 ebf7")),  # mov eax, 29; int 0x80; jmp
    "aarch64": (40, 5 << 24, struct.pack("<3I", 0xE3A0701D, 0xEF000000, 0xEAFFFFFC)),  # mov r7, 29; svc 0; b
}


def write(path: Path) -> None:
    """Write the program to a file."""
    machine, flags, code = _CODE[platform.machine()]
    begin = _ADDRESS + _HEADERS
    header = struct.pack("<2H5I6H", 2, machine, 1, begin, 52, 0, flags, 52, 32, 2, 0, 0, 0)
    loaded = struct.pack("<8I", 1, 0, _ADDRESS, _ADDRESS, _HEADERS + len(code), _HEADERS + len(code), 5, 1 << 16)
    stack = struct.pack("<8I", 0x6474E551, 0, 0, 0, 0, 0, 6, 0)  # PT_GNU_STACK: not executable
    path.write_bytes(b"\x7fELF\1\1\1".ljust(16, b"\0") + header + loaded + stack + code)
    path.chmod(0o755)


def why_not() -> str | None:
    """Return why this kernel cannot run such programs, None if it can."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        write(program)
        try:
            with subprocess.Popen([program]) as running:
                running.kill()
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                return "this kernel runs no 32-bit programs"
            if error.errno == errno.EACCES:
                return f"no program may be executed in {folder}"
            raise
    return None
