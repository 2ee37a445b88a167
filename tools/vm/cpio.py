"""Writing initramfs archives (Documentation/driver-api/early-userspace/buffer-format.rst, the "newc" format)."""

import stat
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self


class Archive:
    """One archive. An initramfs may consist of several, each padded. Times are omitted, so that it is reproducible.

    Parameters
    ----------
    file
        The file to write to.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._written = 0
        self._inode = 0
        self._folders = {Path("/")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _where: TracebackType | None) -> None:
        if error is None:
            self._entry("TRAILER!!!", 0)
            self._put(b"\0" * (-self._written % 512))

    def folder(self, name: str | Path) -> None:
        """Add a directory and its parents."""
        path = Path("/", name)
        if path not in self._folders:
            self.folder(path.parent)
            self._folders.add(path)
            self._entry(path, stat.S_IFDIR | 0o755)

    def file(self, name: str | Path, data: bytes, mode: int = 0o755) -> None:
        """Add a file."""
        self.folder(Path("/", name).parent)
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str | Path, target: str) -> None:
        """Add a symbolic link."""
        self.folder(Path("/", name).parent)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def console(self) -> None:
        """Add /dev/console, without which init has no output."""
        self.folder("/dev")
        self._entry("/dev/console", stat.S_IFCHR | 0o600, device=(5, 1))

    def copy(self, source: Path, name: str | Path) -> None:
        """Add a file, or a directory with its contents."""
        if source.is_symlink():
            self.link(name, str(source.readlink()))
        elif source.is_dir():
            self.folder(name)
            for entry in sorted(source.iterdir()):
                self.copy(entry, Path(name, entry.name))
        else:
            self.file(name, source.read_bytes(), source.stat().st_mode & 0o777)

    def _entry(self, name: str | Path, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = str(name).lstrip("/").encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        self._padded(b"070701" + b"".join(b"%08X" % field for field in fields) + path)
        self._padded(data)

    def _padded(self, data: bytes) -> None:
        self._put(data + b"\0" * (-len(data) % 4))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._written += len(data)
