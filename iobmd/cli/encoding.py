"""Signs that the encoding of a terminal or pipe lacks: of ISO 8859-1, or of ASCII, which PYTHONIOENCODING selects."""

from __future__ import annotations

import codecs
import io
import sys

_SUBSTITUTES = {"…": "~", "µ": "u", "≤": "<=", "≥": ">=", "·": "."}
"""ASCII for signs in text that is otherwise English; drawings use letters instead (`can_write`)."""


def can_write(signs: str) -> bool:
    """Return whether the encoding of stdout has all of the signs."""
    try:
        signs.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def substitute_missing_signs() -> None:
    """Register substitutes of the characters that stdout and stderr cannot encode; without, Python raises an error.

    File names may contain any character; those without a substitute are written as escape sequences. UTF-8 has all.
    """
    codecs.register_error("iobmd.substitute", _substitute)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="iobmd.substitute")


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    escaped = (_SUBSTITUTES.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in missing)
    return "".join(escaped), error.end
