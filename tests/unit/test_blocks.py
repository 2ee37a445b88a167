"""Which pages contiguous memory is searched in, for hosts of each page size; and frames that a pin moves."""

from pathlib import Path
from typing import Any

import pytest

from iobmd import host
from iobmd.host import pages
from iobmd.physical import pin_attempts, search
from iobmd.physical.pin_attempts import PinAttempts
from iobmd.physical.search import PhysicalConstraints, blocks_for

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("size", "available", "blocks"),
    [
        (64 * KIB, [16 * KIB, 32 * MIB], (16 * KIB, 32 * MIB)),
        (64 * KIB, [16 * KIB, 64 * KIB, 2 * MIB, 32 * MIB], (64 * KIB, 16 * KIB, 32 * MIB)),
        (3 * MIB, [16 * KIB, 2 * MIB, 32 * MIB], (2 * MIB, 16 * KIB, 32 * MIB)),
        (100 * KIB, [16 * KIB, 2 * MIB, 32 * MIB], (2 * MIB, 16 * KIB, 32 * MIB)),
        (32 * MIB, [16 * KIB, 2 * MIB, 32 * MIB], (32 * MIB, 2 * MIB, 16 * KIB)),
        (64 * KIB, [64 * KIB, 512 * MIB], (64 * KIB, 512 * MIB)),
        (2 * MIB, [64 * KIB, 2 * MIB, 512 * MIB], (2 * MIB, 64 * KIB, 512 * MIB)),
        (1024 * MIB, [64 * KIB, 2 * MIB, 512 * MIB], (512 * MIB, 2 * MIB, 64 * KIB)),
    ],
)
def test_the_most_suitable_pages_first(size: int, available: list[int], blocks: tuple[int, ...]) -> None:
    assert blocks_for(size, available) == blocks


@pytest.mark.parametrize(("page", "huge"), [(16 * KIB, 32 * MIB), (64 * KIB, 512 * MIB)])
def test_large_huge_pages_are_not_the_first_choice(page: int, huge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of any size is still searched, with a batch of at least one block."""
    monkeypatch.setattr(search, "PAGE_SIZE", page)
    monkeypatch.setattr(search, "HUGE_PAGE_SIZE", huge)
    monkeypatch.setattr(search, "folio_sizes", lambda: [page, huge])
    assert PhysicalConstraints(4 * page, contiguous=True).blocks == (page, huge)
    assert PhysicalConstraints(4 * page, allowed=(1 << 32) - 1).blocks == (huge, page)
    looking = search.Search(PhysicalConstraints(4 * page, contiguous=True), Room())
    assert looking._next_batch(1, 1, huge) == 1


class Room:
    """A budget with much room."""

    bytes = 1 << 40

    def measure(self, held: int) -> None:
        pass


def test_huge_pages_of_2_mib_are_used_for_all_sizes() -> None:
    if search.HUGE_PAGE_SIZE == 2 * MIB:
        assert PhysicalConstraints(4096, contiguous=True).blocks == (2 * MIB,)


@pytest.mark.parametrize(
    ("size", "text"), [(64 * KIB, "64K"), (2 * MIB, "2M"), (32 * MIB, "32M"), (512 * MIB, "512M"), (1 << 30, "1G")]
)
def test_sizes_in_boot_parameters(size: int, text: str) -> None:
    assert pages.boot_size(size) == text


def thp(folder: Path, general: str, **settings: str) -> None:
    """Write a directory as /sys/kernel/mm/transparent_hugepage."""
    choices = ("always", "inherit", "madvise", "never")
    for name, chosen in {"": general, **settings}.items():
        file = (folder / f"hugepages-{name}kB" if name else folder) / "enabled"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(f"[{choice}]" if choice == chosen else choice for choice in choices))


@pytest.fixture
def large_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with pages of 64 KiB and 512 MiB."""
    monkeypatch.setattr(pages, "_THP", str(tmp_path))
    monkeypatch.setattr(pages, "PAGE_SIZE", 64 * KIB)
    monkeypatch.setattr(pages, "HUGE_PAGE_SIZE", 512 * MIB)
    return tmp_path


def test_page_sizes_that_are_enabled(large_pages: Path) -> None:
    settings = {"128": "always", "2048": "madvise", "4096": "inherit", "8192": "never", "524288": "inherit"}
    thp(large_pages, "madvise", **settings)
    assert pages.folio_sizes() == [64 * KIB, 128 * KIB, 2 * MIB, 4 * MIB, 512 * MIB]
    thp(large_pages, "never", **settings)
    assert pages.folio_sizes() == [64 * KIB, 128 * KIB, 2 * MIB, 512 * MIB]


def test_the_remedy_for_large_huge_pages(large_pages: Path) -> None:
    """It is a command; once it has run, nothing is missing."""
    sizes = {"128": "never", "2048": "never", "8192": "never"}
    thp(large_pages, "madvise", **sizes, **{"524288": "inherit"})
    fact = pages.huge_pages()
    assert fact.status is host.Status.LIMITED
    assert "512 MiB: madvise" in fact.summary
    assert "smaller sizes: none enabled" in fact.summary
    assert fact.remedy.startswith(f"echo madvise > {large_pages}/hugepages-2048kB/enabled")
    thp(large_pages, "madvise", **{**sizes, "2048": "madvise", "524288": "inherit"})
    fact = pages.huge_pages()
    assert (fact.status, fact.remedy) == (host.Status.YES, "")
    assert "smaller sizes: 2 MiB" in fact.summary


class Runs:
    """The runs of pinned memory, as virtual address, physical address and length."""

    def __init__(self, *runs: tuple[int, int, int]) -> None:
        self._runs = runs
        self.count = len(runs)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return self._runs[index]


@pytest.fixture
def nothing_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pin_attempts, "_moved", set())


@pytest.mark.usefixtures("nothing_moved")
def test_blocks_that_pages_leave_are_omitted() -> None:
    """As with CMA: each attempt that shows another such block counts less than one that shows nothing new."""
    page, huge = pin_attempts.PAGE_SIZE, pin_attempts.HUGE_PAGE_SIZE
    attempts = PinAttempts()
    for number, _attempt in enumerate(attempts):
        block = min(number, 9)
        attempts.expect([block * huge], huge, 2 * page)  # its end was freed, and is not looked for
        elsewhere = 100 * huge
        runs: Any = Runs((0, block * huge, page), (page, elsewhere, page))
        attempts.failed(runs)
        assert not pin_attempts.may_be_pinned(block * huge, page)
        assert pin_attempts.may_be_pinned(elsewhere, huge)
    assert attempts.made == 10 + pin_attempts.TRIES
    assert not pin_attempts.may_be_pinned(0, 20 * huge)
    assert pin_attempts.forget()
    assert pin_attempts.may_be_pinned(0, 20 * huge)
    assert not pin_attempts.forget()


@pytest.mark.usefixtures("nothing_moved")
def test_attempts_end() -> None:
    attempts = PinAttempts()
    for number, _attempt in enumerate(attempts):
        attempts.expect([number * pin_attempts.HUGE_PAGE_SIZE], pin_attempts.HUGE_PAGE_SIZE, 1)
        empty: Any = Runs()
        attempts.failed(empty)
    assert attempts.made == 64


def test_hidden_frames_show_nothing() -> None:
    attempts = PinAttempts()
    for _attempt in attempts:
        attempts.failed(None)
    assert attempts.made == pin_attempts.TRIES
