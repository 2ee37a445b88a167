"""Files that are written whole, or not at all."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINKS = 40  # that the kernel follows at the most


@contextmanager
def replacing(path: str | Path, mode: int) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when all is written, and is gone when not.

    Parameters
    ----------
    path
        Where it is a link, the file behind it is replaced. A device or a pipe is written to as it is, and so is a
        descriptor of this process (/dev/stdout), which stays where it is in whatever file.
    mode : int
        Permissions of the new file, less the umask.

    Raises
    ------
    OSError
        It cannot be written; it names `path`.
    """
    asked = str(path)
    draft = None
    try:
        path, draft, opened = _open(Path(path), mode)
        with open(opened, "wb") as file:  # noqa: PTH123 (it is open already)
            yield cast("BinaryIO", file)
        if draft:
            draft.replace(path)
    except BaseException as error:
        if draft:
            draft.unlink()
        if isinstance(error, OSError) and not error.filename:
            error.filename = asked
        raise


def _open(path: Path, mode: int) -> tuple[Path, Path | None, int]:
    """Return the path with links followed, the draft that is to take its place if any, and what is open to write."""
    descriptor = _descriptor(path)
    real = Path(os.path.realpath(path))  # which takes links that lead in circles as they are
    try:
        if descriptor is not None:
            if sys.stdout:
                sys.stdout.flush()
            return real, None, os.dup(descriptor)
        if real.exists() and not real.is_file():
            return real, None, os.open(real, os.O_WRONLY | os.O_CLOEXEC)
        draft = real.with_name(f".{real.name}.{os.urandom(8).hex()}")
        # Exclusively: nobody who foresaw the name has us write through a link.
        return real, draft, os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except OSError as error:
        error.filename = str(path)  # what was asked for, not the draft's
        raise


def _descriptor(path: Path) -> int | None:
    """Return the descriptor of this process that `path` is a name of."""
    ours = Path(os.path.realpath("/proc/self/fd"))
    for _ in range(_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if path.parent == ours and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None
