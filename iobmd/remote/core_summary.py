"""The summary of a core file, which is public: importing it does not load the writer."""

from typing import NamedTuple


class CoreSummary(NamedTuple):
    """A core file that was written."""

    size: int
    """Its size in bytes, including holes."""
    written: int
    """Bytes of memory that it contains."""
    omitted: int
    """Bytes of memory of the process that it does not contain: because of the filter or MADV_DONTDUMP, or because the
    snapshot lacks them. Memory that was never touched does not count."""
    areas: int
    """The number of memory areas."""
    threads: int
    """The number of threads."""
    stopped_ns: int
    """For how many nanoseconds the process was stopped, at most."""
    seconds: float
    """The time it took to write the file."""
