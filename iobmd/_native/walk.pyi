from typing import Self, final

AHEAD: int
FILE: int
GUARD: int
HUGE: int
MARKER: int
PRESENT: int
SWAPPED: int
ZERO: int

@final
class Tally:
    present: int
    hidden: int
    swapped: int
    file: int
    zero: int
    exclusive: int
    soft_dirty: int
    guard: int
    marker: int
    huge: int
    huge_zero: int
    runs: int
    largest: int
    ascending: int
    descending: int

@final
class Walk:
    count: int
    swapless: bool
    scans: bool
    def __new__(
        cls, fd: int, page: int, huge: int, zero: int, huge_zero: int, thorough: bool, scan: bool
    ) -> Self: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[int, int, int, int]: ...
    def clear(self) -> None: ...
    def finish(self) -> None: ...
    def raw(self) -> bytes: ...
    def read_ahead(self, ranges: list[tuple[int, int]]) -> None: ...
    def step(self, start: int, end: int) -> int: ...
    def take(self) -> Tally: ...
    def total(self, start: int, end: int) -> Tally: ...
    def totals(self, ranges: list[tuple[int, int]]) -> list[Tally]: ...
    def within(self, low: int, high: int) -> None: ...
