"""Starting Python programs of iobmd's own."""

import sys


def python(*arguments: str) -> list[str]:
    """Return the command that starts this interpreter without the current directory among its modules' folders.

    `-m` and `-c` would look there first (`-P`, Python 3.11): whoever may write to that directory could have root run
    an `iobmd` or a `hashlib.py` planted there.
    """
    return [sys.executable, "-P", *arguments]
