"""The workload of `iobmd bench purgeable` under a limit: requests to a cache of contents of 1 MiB.

`python -m iobmd.tools.bench.workload cache|bytes WORKING_SET REQUESTS CGROUP_PROCS` prints, as JSON, the hits per
second of the time that hits took, and their share of all requests. CGROUP_PROCS is empty, or the cgroup.procs to
enter first.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd.cache import PurgeableCache

if TYPE_CHECKING:
    from collections.abc import Callable

CONTENT = 1 << 20


class RetainingCache(dict[int, bytes]):
    """A cache with the same interface that stores `bytes`, which cannot be reclaimed."""

    def __init__(self, loader: Callable[[int], bytes]) -> None:
        self._loader = loader

    def __missing__(self, key: int) -> bytes:
        self[key] = self._loader(key)
        return self[key]


def work(kind: str, working_set: int, requests: int) -> dict[str, float]:
    """Request contents, some more often than others, and read all bytes of each."""
    loads = 0

    def counted(key: int) -> bytes:
        nonlocal loads
        loads += 1
        return key.to_bytes(4, "little") * (CONTENT // 4)

    cache = PurgeableCache(counted) if kind == "cache" else RetainingCache(counted)
    contents, chance = working_set // CONTENT, random.Random(1)
    hits, took = 0, 0.0
    for _ in range(requests):
        key, before = int(contents * chance.random() ** 2), loads
        begin = time.perf_counter()
        zlib.adler32(cache[key])
        end = time.perf_counter()
        if loads == before:
            hits, took = hits + 1, took + end - begin
    if isinstance(cache, PurgeableCache):
        cache.close()
    return {"rate": hits / took, "share": hits / requests}


def main() -> None:
    """Run as the program."""
    kind, working_set, requests, procs = sys.argv[1:]
    if procs:
        Path(procs).write_text(str(os.getpid()))
    print(json.dumps(work(kind, int(working_set), int(requests))))


if __name__ == "__main__":
    main()
