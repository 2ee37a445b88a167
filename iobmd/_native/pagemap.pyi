from typing_extensions import Buffer

PAGE_IS_HUGE: int
PAGE_IS_PFNZERO: int
PAGE_IS_PRESENT: int
PAGE_IS_SWAPPED: int
PAGE_IS_WRITTEN: int

def amount(fd: int, start: int, end: int, required: int, excluded: int, limit: int) -> int: ...
def decode(raw: Buffer) -> list[tuple[bool, bool, int | None, bool, bool, bool, bool]]: ...
def scan(
    fd: int, start: int, end: int, required: int, excluded: int, protect: bool = False
) -> list[tuple[int, int]]: ...
def tally(raw: Buffer) -> tuple[int, int, int, int]: ...
