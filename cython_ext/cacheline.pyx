# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Which instructions on cache lines this processor has."""

from cacheline cimport (
    IOBMD_CLFLUSH, IOBMD_CLFLUSHOPT, IOBMD_CLWB, IOBMD_DC, IOBMD_NONE, iobmd_best, iobmd_line,
)

NONE = IOBMD_NONE
CLFLUSH = IOBMD_CLFLUSH
CLFLUSHOPT = IOBMD_CLFLUSHOPT
CLWB = IOBMD_CLWB
DC = IOBMD_DC

BEST = iobmd_best()
"""What `Mapping` uses unless it is told otherwise: found out as the module is loaded (cpuid)."""

LINE_SIZE = iobmd_line()
"""Bytes of a cache line."""
