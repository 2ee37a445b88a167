"""`SourceProcess`: a C process with memory of every kind (source_process.c), which executes commands."""

import contextlib
import subprocess
from pathlib import Path
from typing import NamedTuple, Self

SOURCE = Path(__file__).with_name("source_process.c")


class Region(NamedTuple):
    """Memory of one kind: its address in the process, 0 if the host does not support that kind."""

    address: int
    size: int


def build(folder: Path, source: Path = SOURCE, *options: str) -> Path:
    """Compile the program."""
    program = folder / source.stem
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-pthread", *options, "-o", program, source], check=True)
    return program


class CommandedProcess:
    """A running program that executes the commands of its input and answers each; the end of `with` kills it."""

    process: subprocess.Popen[str]

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def command(self, command: str) -> None:
        self.tell(command)
        answer = self._answer()
        assert answer == "ok", answer

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        with contextlib.suppress(OSError):  # it no longer reads
            self.process.communicate()


class SourceProcess(CommandedProcess):
    """The running program, which the end of the `with` block kills."""

    def __init__(self, program: Path, size: int = 4 << 20, *options: str) -> None:
        self.process = subprocess.Popen(
            [program, str(size), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        self.regions: dict[str, Region] = {}
        while (line := self._answer()) != "ready":
            kind, address, length = line.split()
            self.regions[kind] = Region(int(address), int(length))

    def __getitem__(self, kind: str) -> Region:
        return self.regions[kind]

    def dump(self, kind: str, path: Path) -> bytes:
        """Return the bytes of one kind, which the process itself writes to a file."""
        self.command(f"dump {kind} {path}")
        return path.read_bytes()
