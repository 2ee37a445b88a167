from collections.abc import Iterable, Iterator, Sequence
from typing import Self, TypedDict, type_check_only

from typing_extensions import Buffer, disjoint_base

MOST_RANGES: int
NEEDS_FILE: int

@type_check_only
class Named(TypedDict):
    paths: Sequence[bytes]
    inode: int
    device: int

@disjoint_base
class Attempt:
    address: int
    moved: int
    data: bytes
    error: int
    opened: tuple[int, int, int, int]
    def __new__(
        cls,
        ranges: Sequence[tuple[int, int]],
        *,
        task: int = 0,
        pidfd: int = -1,
        file: int = -1,
        write: bool = False,
        paths: Sequence[bytes] = (),
        inode: int = 0,
        device: int = 0,
        opened: bool = True,
        ours: Sequence[int] | None = None,
        count: bool = False,
        resident: bool = False,
        page_out: bool = False,
        page: int = 0,
        fresh: bool = False,
        holes: bool = True,
        room: int = 0,
    ) -> Self: ...
    def again(self, ranges: Sequence[tuple[int, int]]) -> None: ...
    def start(self) -> None: ...
    def wait(self, milliseconds: int) -> bool: ...
    def end(self) -> None: ...

@disjoint_base
class Ranges:
    size: int
    def __new__(cls, ranges: Iterable[tuple[int, int]] = ()) -> Self: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: int, /) -> tuple[int, int]: ...
    def __iter__(self) -> Iterator[tuple[int, int]]: ...
    def between(self, start: int, end: int) -> Ranges: ...
    def outside(self, start: int, end: int) -> Ranges: ...
    def whole(self, theirs: int, ours: int, unit: int) -> list[tuple[int, int]]: ...
    def cuts(self, start: int, most: int, unit: int) -> list[int]: ...
    @staticmethod
    def joined(parts: Iterable[Ranges], end: int) -> Ranges: ...

@disjoint_base
class HeldBuffer:
    address: int
    size: int
    def __new__(cls, obj: Buffer, writable: bool) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_error: object) -> None: ...

def absent(pagemap: int, theirs: int, size: int, page: int) -> Ranges: ...
def by_kind(entries: bytes, start: int, end: int, write: bool, page: int) -> tuple[Ranges, Ranges, Ranges, bool]: ...
def count_shared(pagemap: int, theirs: int, size: int, page: int) -> int: ...
def copy_here(ours: int, source: int, size: int) -> None: ...
def fetch_descriptor(pidfd: int, fd: int) -> int: ...
def fresh_bytes(size: int) -> bytes: ...
def has_exited(pidfd: int) -> bool: ...
def is_mapped(address: int, size: int, page: int) -> bool: ...
def move_present(
    folder: bytes,
    device: int,
    pid: int,
    pidfd: int,
    write: bool,
    fresh: bool,
    theirs: int,
    ours: int,
    size: int,
    page: int,
) -> int: ...
def touch(pid: int, pidfd: int, address: int, size: int, page: int) -> int: ...
def transfer(
    pid: int,
    memory: int,
    pagemap: int,
    pidfd: int,
    write: bool,
    skip: bool,
    theirs: int,
    ours: int,
    size: int,
    page: int,
    huge: int = 0,
    readable: Ranges | None = None,
) -> tuple[int, int, Ranges, Ranges]: ...
def zero(ours: int, size: int) -> None: ...
