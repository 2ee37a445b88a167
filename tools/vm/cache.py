"""The folder, outside of the tree, that keeps kernels and archives from one run to the next."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path


def folder() -> Path:
    """Return it: `IOBMD_VM_CACHE`, or `iobmd/vm` in the user's cache (XDG Base Directory Specification)."""
    if chosen := os.environ.get("IOBMD_VM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iobmd" / "vm"


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """Return `path`, a file or a folder, which `make` makes if it is not there: whole or not at all."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}")
    try:
        make(draft)
        draft.rename(path)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)
    return path
