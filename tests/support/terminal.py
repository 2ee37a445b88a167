"""A command whose output is a terminal of a given size."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios


def lines_on_terminal(columns: int, *arguments: str, rows: int = 50, raw: bool = False, status: int = 0) -> list[str]:
    """Run `iobmd` on a terminal of some lines; return the printed lines, and check its exit status.

    Control sequences are removed, unless `raw` is true. Those of a failing command include its error.
    """
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "iobmd", *arguments]
    errors = follower if status else None
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=errors, env=environment) as process:
        os.close(follower)
        text = b""
        with contextlib.suppress(OSError):  # EIO: the command has exited
            while found := os.read(leader, 1 << 16):
                text += found
    os.close(leader)
    assert process.returncode == status
    printed = text.decode()
    return (printed if raw else re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", printed)).splitlines()
