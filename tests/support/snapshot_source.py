"""A program for tests of snapshots and core files."""

import os
from pathlib import Path

from support.targets import Target, build, need_ptrace

SIZE = 4 << 20


class Source(Target):
    """The program: `own` to `closed` are the addresses of its areas, whose pages contain a 1 at first."""

    def __init__(
        self, size: int = SIZE, threads: int = 0, program: Path | None = None, procs: Path | None = None
    ) -> None:
        def enter() -> None:
            if procs:
                procs.write_text(str(os.getpid()))

        need_ptrace()
        super().__init__([program or build("snapshot"), str(size), *["thread"] * threads], before=enter)
        self.own, self.shared, self.kept, self.wiped, self.hidden, self.closed = map(int, self.line().split())

    def write(self, first: int, pages: int, value: int, where: str = "own") -> None:
        self.request(where, first, pages, value)

    def request(self, command: str, first: int = 0, pages: int = 0, value: int = 0) -> list[int]:
        self.tell(f"{command} {first} {pages} {value}")
        return [int(number) for number in self.line().split()]
