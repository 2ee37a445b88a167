"""The host's page size, rounding, and the text form of sizes, times and counts."""

import mmap
import re

PAGE_SIZE = mmap.PAGESIZE
"""Bytes in a base page of this host (sysconf(_SC_PAGESIZE))."""


def huge_page_size(page: int, reported: str) -> int:
    """Return the size of a huge page from the text of hpage_pmd_size (Linux 4.9), which may be missing.

    It is what one PMD maps: a page of page table entries, each of 8 bytes on every 64-bit architecture.
    """
    return int(reported) if reported.strip().isdigit() else page * (page // 8)


def _reported_huge_page_size() -> str:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") as file:
            return file.read()
    except OSError:  # a kernel without transparent huge pages, or a container without /sys
        return ""


HUGE_PAGE_SIZE = huge_page_size(PAGE_SIZE, _reported_huge_page_size())
"""Bytes in a huge page of this host: 2 MiB with base pages of 4 KiB, 32 MiB with 16 KiB, 512 MiB with 64 KiB.
Mappings are aligned to it so that they can be huge."""

_SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = r"(0x[0-9a-f]+|[0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?"


def round_down(value: int, multiple: int) -> int:
    """Return the largest multiple of `multiple` that is not above `value`."""
    return value - value % multiple


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `value`."""
    return value + -value % multiple


def is_power_of_two(value: int) -> bool:
    """Return whether `value` is a positive power of two."""
    return value > 0 and value & (value - 1) == 0


def pages(size: int) -> int:
    """Return how many base pages hold `size` bytes."""
    return round_up(size, PAGE_SIZE) // PAGE_SIZE


def parse_size(text: str) -> int:
    """Read a size in bytes: decimal or 0x hexadecimal, with an optional binary suffix (`64k`, `1.5MiB`).

    Raises
    ------
    ValueError
        `text` is not a size, or not a whole number of bytes.
    """
    match = re.fullmatch(_SIZE, text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size: write bytes, 0x…, or a number with k, M, G or T")
    number: str = match[1]
    scale = _SUFFIXES[match[2].lower()]
    if number.lower().startswith("0x"):
        return int(number, 16) * scale
    whole, _, fraction = number.partition(".")
    numerator = int(whole + fraction) * scale
    denominator: int = 10 ** len(fraction)
    if numerator % denominator:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return numerator // denominator


def format_size(size: int) -> str:
    """Write a size in binary units with at most one decimal: `64 KiB`, `1.5 GiB`."""
    amount, unit = float(size), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, bigger
    return f"{amount:.1f}".removesuffix(".0") + f" {unit}"


def format_time(seconds: float) -> str:
    """Write a duration with three significant digits in the unit that fits: `965 µs`, `1.59 s`, `125 s`."""
    for limit, factor, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        # Rounded first: 999.7 µs is 1 ms.
        if float(f"{seconds:.3g}") < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def format_count(number: int, singular: str, plural: str = "") -> str:
    """Write a number with its noun: `1 area`, `65,530 areas`, `2 processes`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
