"""The text form of sizes, times and counts."""

from pathlib import Path

import pytest

from iobmd.units import (
    HUGE_PAGE_SIZE,
    PAGE_SIZE,
    format_count,
    format_size,
    format_time,
    huge_page_size,
    pages,
    parse_size,
    round_down,
    round_up,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("0x1000", 4096), ("0XfF", 255), ("64k", 65536), ("64K", 65536), ("64KiB", 65536),
        ("1.5MiB", 3 << 19), ("2g", 2 << 30), ("1 TB", 1 << 40), ("0.5k", 512), ("10b", 10), ("0x10k", 16384),
        (" 7 ", 7),
    ],
)  # fmt: skip
def test_parse(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1.2.3", "1e3", "64q", "0.3", "0x", "1_000", "1.0001k"])
def test_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (64 << 20, "64 MiB"), (3 << 40, "3 TiB")],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ns"), (31e-9, "31 ns"), (965e-6, "965 µs"), (999.7e-6, "1 ms"), (0.003077, "3.08 ms"), (0.9996, "1 s"),
        (1.59, "1.59 s"), (99.99, "100 s"), (1590.4, "1,590 s"),
    ],
)  # fmt: skip
def test_format_time(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_format_count() -> None:
    assert [format_count(number, "area") for number in (0, 1, 65530)] == ["0 areas", "1 area", "65,530 areas"]
    assert [format_count(number, "process", "processes") for number in (1, 2)] == ["1 process", "2 processes"]


def test_rounding() -> None:
    assert (round_up(1, 4096), round_up(4096, 4096), round_down(4097, 4096)) == (4096, 4096, 4096)
    assert (pages(0), pages(1), pages(4097)) == (0, 1, 2)


@pytest.mark.parametrize(
    ("page", "huge"),
    [(4 << 10, 2 << 20), (16 << 10, 32 << 20), (64 << 10, 512 << 20)],
    ids=["4 KiB", "16 KiB", "64 KiB"],
)
def test_huge_pages_of_each_page_size(page: int, huge: int) -> None:
    """What the kernel reports counts; without huge pages, or /sys, the size is that of a full page table."""
    assert huge_page_size(page, "") == huge
    assert huge_page_size(page, f"{huge}\n") == huge
    assert huge_page_size(page, "1048576\n") == 1 << 20


def test_huge_pages_of_this_host() -> None:
    reported = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    assert (int(reported.read_text()) if reported.exists() else PAGE_SIZE**2 // 8) == HUGE_PAGE_SIZE
