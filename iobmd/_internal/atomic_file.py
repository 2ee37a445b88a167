"""Files that are written completely or not at all, and that other users cannot redirect."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

_OWN_DESCRIPTORS = Path("/dev/fd"), Path("/proc/self/fd")
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


@contextlib.contextmanager
def replacing(path: str | Path, mode: int) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when it is complete, and is removed otherwise.

    Parameters
    ----------
    path
        A symbolic link is replaced, not followed. A link to a descriptor of this process (/dev/stdout), a device and
        a pipe are written to.
    mode : int
        Permissions of the new file, less the umask.

    Raises
    ------
    OSError
        The file cannot be written; the error names `path`. `EACCES`: `path` is a link or a pipe that belongs to
        another user, in a world-writable directory.

    Notes
    -----
    If enabled, the kernel's fs.protected_symlinks and fs.protected_fifos refuse the same for a path that is opened
    with O_CREAT and whose links the kernel follows (proc_sys_fs(5)).
    """
    path = Path(path)
    draft = None
    try:
        draft, opened = _open(path, mode)
        with open(opened, "wb") as file:  # noqa: PTH123 (it is open already)
            yield cast("BinaryIO", file)
        if draft:
            draft.publish(path)
    except BaseException as error:
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)
        raise
    finally:
        if draft:
            draft.end()


class _Draft:
    """A new file in the directory of `path`, until it replaces it.

    It has no name if the file system supports that (O_TMPFILE): if this process is killed, the kernel removes it.
    Otherwise (overlayfs before Linux 6.1, NFS), a hidden file remains.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self._name = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        self._unnamed = -1
        try:
            self.opened = self._without_name(path.parent, mode)
        except OSError:
            # Exclusive, so that a user who predicts the name cannot redirect the output by a link.
            self.opened = os.open(self._name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def _without_name(self, folder: Path, mode: int) -> int:
        opened = os.open(folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode)
        try:
            self._unnamed = os.dup(opened)  # until it has a name
            Path(self._source).stat()  # without /proc, it could not get one
        except BaseException:
            os.close(opened)
            self.end()
            raise
        return opened

    @property
    def _source(self) -> str:
        return f"/proc/thread-self/fd/{self._unnamed}"

    def publish(self, path: Path) -> None:
        """Replace `path`. Raises OSError."""
        if self._unnamed >= 0:
            with contextlib.suppress(FileExistsError):
                self._link(path)
                return
            self._link(self._name)  # a link replaces no file
        self._name.replace(path)

    def _link(self, path: Path) -> None:
        os.link(self._source, path, src_dir_fd=self._unnamed)  # for linkat(2), which follows a link; it is not used

    def end(self) -> None:
        """Remove the file if it is not published."""
        self._name.unlink(missing_ok=True)
        if self._unnamed >= 0:
            os.close(self._unnamed)
            self._unnamed = -1


def _open(path: Path, mode: int) -> tuple[_Draft | None, int]:
    """Return the temporary file that is to replace `path`, if any, and a descriptor to write to."""
    try:
        found = path.lstat() if os.path.lexists(path) else None
        if found and (stat.S_ISLNK(found.st_mode) or stat.S_ISFIFO(found.st_mode)):
            _require_own(path, found)
        if (descriptor := _descriptor(path, found)) is not None:
            if sys.stdout:
                sys.stdout.flush()
            return None, os.dup(descriptor)
        if found and not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
            return None, _open_existing(path, found)
        draft = _Draft(path, mode)
    except OSError as error:
        error.filename = str(path)  # not the name of the temporary file
        raise
    return draft, draft.opened


def _open_existing(path: Path, found: os.stat_result) -> int:
    """Open a device or a pipe, after checking that it was not replaced. Raises OSError."""
    opened = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        _require_same(os.fstat(opened), found)
    except BaseException:
        os.close(opened)
        raise
    return opened


def _require_same(now: os.stat_result, found: os.stat_result) -> None:
    if (now.st_dev, now.st_ino) != (found.st_dev, found.st_ino):
        raise OSError(errno.EACCES, "it was replaced by another file")


def _require_own(path: Path, found: os.stat_result) -> None:
    """Raise EACCES for a file of another user in a world-writable directory."""
    folder = path.parent.stat()
    if folder.st_mode & stat.S_IWOTH and found.st_uid not in (os.geteuid(), folder.st_uid):
        kind = "symbolic link" if stat.S_ISLNK(found.st_mode) else "pipe"
        message = f"a {kind} of another user (uid {found.st_uid}) in a world-writable directory"
        raise OSError(errno.EACCES, message)


def _descriptor(path: Path, found: os.stat_result | None) -> int | None:
    """Return the descriptor of this process that `path` names, or to which the link `found` leads."""
    named = str(path) in _STANDARD or path.parent in _OWN_DESCRIPTORS
    if found and stat.S_ISLNK(found.st_mode) and not named:
        link = path
        path = link.parent / link.readlink()
        _require_same(link.lstat(), found)
    if str(path) in _STANDARD:
        return _STANDARD[str(path)]
    ours = os.path.realpath("/proc/self/fd")
    if path.name.isdecimal() and (path.parent in _OWN_DESCRIPTORS or os.path.realpath(path.parent) == ours):
        return int(path.name)
    return None
