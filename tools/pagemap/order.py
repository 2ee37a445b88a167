"""Sorting of rows without holding all of them in memory."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def ordered(rows: Iterable[tuple[float | str, str]], *, backwards: bool) -> Iterator[str]:
    """Iterate over rows sorted by their keys, in the original order for equal keys; they are stored in a file."""
    import tempfile  # noqa: PLC0415 (the command starts sooner without)

    with tempfile.TemporaryFile(prefix="iobmd-") as file:
        places: list[tuple[float | str, int, int]] = []
        end = 0
        for key, row in rows:
            data = row.encode(errors="surrogateescape")
            places.append(
                (sys.intern(key) if isinstance(key, str) else key, end, len(data))
            )  # many have the same name
            end += file.write(data)
        places.sort(key=lambda place: place[0], reverse=backwards)
        for _key, start, length in places:
            file.seek(start)
            yield file.read(length).decode(errors="surrogateescape")
