"""Rows of `iobmd bench remote`: how long the requests of a Redis server wait while a snapshot of it exists.

Redis saves its data in the same way, from a child that it forks (BGSAVE). `python -m iobmd.tools.bench.bgsave SOCKET
KEYS` is the client: it overwrites random values without a pause, and for each line that it reads, it prints the
longest wait since the last one, in microseconds.
"""

from __future__ import annotations

import contextlib
import random
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from iobmd.api import snapshot
from iobmd.cli.child import python
from iobmd.errors import NoMemoryError
from iobmd.host import headroom
from iobmd.units import format_size, format_time

from .result import Result

if TYPE_CHECKING:
    from collections.abc import Callable

_VALUE = 1000  # bytes
_ENTRY = 1150  # bytes that Redis uses for each value, measured
_SECONDS = 3.0  # for which each snapshot exists; BGSAVE takes longer for 4 GiB
_PATIENCE = 120.0  # seconds for an answer, and for a BGSAVE


class Connection:
    """A connection to a Redis server, with its protocol (RESP)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_PATIENCE)
        self._socket.connect(str(path))

    def ask(self, *words: bytes | str | int) -> bytes:
        """Send a command, and return the answer: a line, or the text of a bulk string."""
        parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        self._socket.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(one), one) for one in parts))
        answer = b""
        while not answer.endswith(b"\r\n") or not self._is_whole(answer):
            answer += self._socket.recv(1 << 16)
        if answer.startswith(b"-"):
            raise RuntimeError(answer.decode().strip())
        return answer

    @staticmethod
    def _is_whole(answer: bytes) -> bool:
        line, _, rest = answer.partition(b"\r\n")
        return not line.startswith(b"$") or len(rest) >= int(line[1:]) + 2

    def close(self) -> None:
        """Close it."""
        self._socket.close()


class Server:
    """A Redis server with `size` bytes of values, and its client, as a context manager."""

    def __init__(self, program: str, size: int, folder: Path) -> None:
        self._path = folder / "socket"
        options = {"port": 0, "unixsocket": self._path, "dir": folder, "save": "", "enable-debug-command": "yes"}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL)
        self.pid = self._process.pid
        self._client: subprocess.Popen[str] | None = None
        self._connection: Connection | None = None
        try:
            deadline = time.monotonic() + _PATIENCE
            while not self._path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            self._connection = Connection(self._path)
            keys = max(1, size // _ENTRY)
            self._ask("DEBUG", "POPULATE", keys, "key", _VALUE)
            command = python("-m", "iobmd.tools.bench.bgsave", str(self._path), str(keys))
            self._client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.longest_wait()
        except BaseException:
            self.__exit__()
            raise

    def _ask(self, *words: bytes | str | int) -> bytes:
        assert self._connection
        return self._connection.ask(*words)

    def longest_wait(self) -> float:
        """Return the longest time that a request has waited since the last call, in seconds."""
        assert self._client
        assert self._client.stdin
        assert self._client.stdout
        self._client.stdin.write("\n")
        self._client.stdin.flush()
        return int(self._client.stdout.readline()) / 1e6

    def during(self, work: Callable[[], object]) -> float:
        """Return the longest wait during a function."""
        self.longest_wait()
        work()
        return self.longest_wait()

    def save(self) -> None:
        """Run its BGSAVE, and wait for its end."""
        self._ask("BGSAVE")
        deadline = time.monotonic() + _PATIENCE
        while b"rdb_bgsave_in_progress:1" in self._ask("INFO", "persistence") and time.monotonic() < deadline:
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection:
            self._connection.close()
        for process in (self._client, self._process):
            if process:
                process.kill()
                process.communicate()


def run(size: int, rounds: int) -> list[Result]:
    """Measure a server with `size` bytes of values; no rows if Redis is not installed, or memory is short."""
    program = shutil.which("redis-server")
    try:
        headroom.require(2 * size, swappable=False)
    except NoMemoryError:
        program = None
    if not program:
        return []
    with tempfile.TemporaryDirectory() as folder, Server(program, size, Path(folder)) as server:

        def hold() -> None:
            with snapshot(server.pid):
                time.sleep(_SECONDS)

        def core() -> None:
            with snapshot(server.pid) as held:
                held.core(Path(folder, "core"))

        works = hold, core, server.save
        waits = [[server.during(work) for work in works] for _ in range(rounds)]
    held, written, saved = (statistics.median(column) for column in zip(*waits, strict=True))
    what = f"Redis with {format_size(size)} under load, the longest wait of a request"
    against = f"during its BGSAVE: {format_time(saved)}"
    return [
        Result(f"{what}: with a snapshot", format_time(held), against, held / saved, "≤ 1", held <= saved),
        Result(f"{what}: with a core file", format_time(written), against, written / saved, "≤ 1", written <= saved),
    ]


def _main(path: str, keys: int) -> None:
    longest = 0.0
    with contextlib.closing(Connection(Path(path))) as connection:
        while True:
            key, value = random.randrange(keys), random.randbytes(_VALUE)
            begin = time.perf_counter()
            connection.ask("SET", f"key:{key}", value)
            longest = max(longest, time.perf_counter() - begin)
            if select.select([sys.stdin], [], [], 0)[0]:
                if not sys.stdin.readline():
                    return
                print(round(longest * 1e6), flush=True)
                longest = 0.0


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
