from collections.abc import Sequence
from typing import Self, final

from iobmd._native.mapping import Mapping

PROCESSOR: str
ELF_MACHINE: int
INSTRUCTION: bytes
INSTRUCTION_ALIGNMENT: int
RETURNING: bytes
CALLING: bytes
MADE_CALLS: dict[str, int]
CALLS_ENDED_BY_A_STOP: dict[str, int]
CALLS: int
LIMIT: float
CHANGED: int
DIVERTED: int
DONE: int
ENDED: int
FAILED: int
GONE: int
GUEST: int
HELD: int
IS_32_BIT: int
LATE: int
NO_MEMORY: int
NO_PROCESS: int
REFUSED: int
SIGNALLED: int
SNAPSHOT: int
FOREIGN_THREAD: int
STUCK: int
UNCOPIED: int
UNREADABLE: int
UNSEEN: int

@final
class Tracer:
    stopped_ns: int
    was_killed: bool
    def __new__(
        cls,
        task: int,
        instruction: int,
        returning: int,
        calling: int,
        options: int,
        is_thread: bool,
        patience: float,
        short: float,
    ) -> Self: ...
    @property
    def child(self) -> int: ...
    @property
    def error(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def guest(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def registers(self) -> list[tuple[int, int, list[tuple[int, bytes]]]]: ...
    @property
    def results(self) -> list[int]: ...
    def collect(self, threads: Sequence[tuple[int, int, int, int, int, int]], failed: bool) -> int: ...
    def end(self) -> None: ...
    def freeze(
        self,
        threads: Sequence[tuple[int, int, int, int, int, int]],
        wanted: int = 0,
        deadline: float = 0.0,
        records: bool = False,
        objects: Sequence[tuple[bytes, int, int, int, int, Mapping, bool]] = (),
    ) -> int: ...
    def run(
        self, calls: Sequence[tuple[int, Sequence[int], Sequence[int], int]], deadline: float, may_wait: bool
    ) -> int: ...
    def stand_alone(self, threads: Sequence[tuple[int, int, int, int, int, int]], deadline: float) -> int: ...
    def stop(
        self,
        threads: Sequence[tuple[int, int, int, int, int, int]],
        calls: Sequence[tuple[int, Sequence[int], Sequence[int], int]],
    ) -> int: ...
    def succeed(self) -> bool: ...
    def thaw(self) -> int: ...
    def use(self, instruction: int, returning: int, calling: int) -> None: ...
