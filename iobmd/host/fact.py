"""The result of a probe, and helpers of probes: reading optional files, a scratch page."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from iobmd import procfs, units
from iobmd._native import mapping, maps

JSON: TypeAlias = bool | int | str | Sequence["JSON"] | Mapping[str, "JSON"] | None


class Status(StrEnum):
    """Whether a feature is usable."""

    YES = "yes"
    """It is usable."""
    LIMITED = "limited"
    """It is usable with restrictions."""
    NO = "no"
    """It is not usable."""
    INFO = "info"
    """Information, not a feature."""


class Fact(NamedTuple):
    """A feature that this host supports or lacks, or that this process may or may not use."""

    name: str
    """The feature, in the kernel's spelling."""
    status: Status
    """Whether it is usable; `Status.INFO` for information."""
    value: JSON
    """The finding as data."""
    summary: str
    """The finding in a few words."""
    purpose: str
    """The purpose of the feature."""
    remedy: str = ""
    """How to enable it, one alternative per line; empty if nothing can be done."""

    @property
    def usable(self) -> bool:
        """Whether it is usable, possibly within a limit."""
        return self.status is not Status.NO


def read_text(path: str) -> str | None:
    """Return the text of a kernel file without its last newline, or None if it is missing or unreadable."""
    try:
        return maps.read_text(path).rstrip("\n")
    except OSError:
        return None


def lines(text: str | None) -> list[str]:
    """Return the lines of a text from `read_text`.

    Only newlines end lines. Users choose the names of files and control groups, and the kernel does not escape other
    characters that str.splitlines() treats as line ends.
    """
    return text.split("\n") if text else []


def read_int(path: str) -> int | None:
    """Return the number in a kernel file, or None as `read_text`."""
    try:
        return int(read_text(path) or "")
    except ValueError:
        return None


def own_status() -> dict[str, str]:
    """Return the fields of /proc/self/status, empty if /proc is not mounted."""
    try:
        return procfs.status()
    except OSError:
        return {}


def has_seccomp_filter() -> bool:
    """Return whether this process has a seccomp filter (Linux 3.8, proc_pid_status(5))."""
    return own_status().get("Seccomp") == "2"


@contextmanager
def scratch(size: int = units.PAGE_SIZE) -> Iterator[mapping.Mapping]:
    """Map `size` new bytes, aligned to `size`, and unmap them at the end.

    Raises
    ------
    OSError
        No memory is available, or a limit such as RLIMIT_AS is reached.
    """
    memory = mapping.Mapping.anonymous(size, size)
    try:
        yield memory
    finally:
        memory.close()
