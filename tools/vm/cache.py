"""The directory, outside the source tree, that stores kernels and archives between runs."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path


def folder() -> Path:
    """Return the directory: `IOBMD_VM_CACHE`, or `iobmd/vm` in the user's cache (XDG Base Directories)."""
    if chosen := os.environ.get("IOBMD_VM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iobmd" / "vm"


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """Return `path`, a file or a directory; if it does not exist, `make` creates it, completely or not at all."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}")
    try:
        make(draft)
        draft.rename(path)
    except OSError:
        if not path.exists():  # otherwise another process has made the same directory in the meantime
            raise
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)
    return path
