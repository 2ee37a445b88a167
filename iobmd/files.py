"""Files that are written whole, or not at all."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def replacing(path: str | Path, mode: int) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when all is written, and is gone when not.

    Parameters
    ----------
    path
        A device or a pipe is written to as it is.
    mode : int
        Permissions of the new file, less the umask.

    Raises
    ------
    OSError
        It cannot be written; it names `path`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        try:
            with path.open("wb") as file:
                yield file
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        return
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        # Exclusively: nobody who foresaw the name has us write through a link.
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except OSError as error:
        error.filename = str(path)  # what was asked for, not the draft's
        raise
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 (it is open already)
            yield cast("BinaryIO", file)
        draft.replace(path)
    except BaseException:
        draft.unlink()
        raise
