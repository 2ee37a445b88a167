"""The command line that starts a Python program of iobmd."""

import sys


def python(*arguments: str) -> list[str]:
    """Return a command that starts this interpreter without the current directory on its module search path.

    Without `-P` (Python 3.11), `-m` and `-c` search that directory first: a user who may write to it could plant an
    `iobmd` or a `hashlib.py` that root then runs.
    """
    return [sys.executable, "-P", *arguments]
