"""The end of `with` blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd.errors import IOReturnError

if TYPE_CHECKING:
    from collections.abc import Callable


def leave(release: Callable[[], object], error: BaseException | None) -> None:
    """Release an object at the end of its `with` block.

    An exception that is raised here would hide that of the block; it is therefore added to that one as a note.
    """
    try:
        release()
    except IOReturnError as failure:
        if error is None:
            raise
        error.add_note(f"leaving the with block also failed: {failure}")
