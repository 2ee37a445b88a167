"""What a probe returns, and what every probe needs: files that may be missing, a page to try things on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from iobmd import procfs, units
from iobmd._native import mapping

JSON: TypeAlias = bool | int | str | Sequence["JSON"] | Mapping[str, "JSON"] | None


class Status(StrEnum):
    """Whether something can be used here."""

    YES = "yes"
    LIMITED = "limited"
    NO = "no"
    INFO = "info"


class Fact(NamedTuple):
    """One thing this host, or this process on it, can or cannot do.

    Attributes
    ----------
    name : str
        What was probed, in the kernel's own spelling.
    status : Status
        Whether it can be used; `Status.INFO` for plain information.
    value : JSON
        The finding as data.
    summary : str
        The finding for people, in a few words.
    purpose : str
        What it is good for.
    remedy : str
        How to turn it on, one alternative a line; empty when there is nothing to do.
    """

    name: str
    status: Status
    value: JSON
    summary: str
    purpose: str
    remedy: str = ""

    @property
    def usable(self) -> bool:
        """Whether it can be used, if only within a limit."""
        return self.status is not Status.NO


def read_text(path: str) -> str | None:
    """Return the text of a kernel file without its last newline, or None when it is missing or unreadable."""
    try:
        with open(path, errors="surrogateescape", newline="\n") as file:
            return file.read().rstrip("\n")
    except OSError:
        return None


def lines(text: str | None) -> list[str]:
    """Return the lines of what `read_text` returned.

    Only a newline ends one. Users choose the names of files and control groups, in which the kernel prints other
    characters as they are that str.splitlines() takes for an end.
    """
    return text.split("\n") if text else []


def read_int(path: str) -> int | None:
    """Return the number a kernel file holds, or None as `read_text`."""
    try:
        return int(read_text(path) or "")
    except ValueError:
        return None


def own_status() -> dict[str, str]:
    """Return /proc/self/status, empty where /proc is not mounted."""
    try:
        return procfs.status()
    except OSError:
        return {}


def has_seccomp_filter() -> bool:
    """Say whether a seccomp filter judges the system calls of this process (Linux 3.8, proc_pid_status(5))."""
    return own_status().get("Seccomp") == "2"


@contextmanager
def scratch(size: int = units.PAGE_SIZE) -> Iterator[mapping.Mapping]:
    """Map `size` fresh bytes aligned to `size`; unmap them at the end.

    Raises
    ------
    OSError
        The kernel gives no memory: out of it, or a limit such as RLIMIT_AS.
    """
    memory = mapping.Mapping.anonymous(size, size)
    try:
        yield memory
    finally:
        memory.close()
