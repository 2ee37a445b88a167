"""Escaping of text that other users choose, such as names of files and programs, for terminals and pictures.

Errors and the text form of an area contain it escaped: a traceback on a terminal shows them.
"""

from __future__ import annotations

import re

# Control characters, bidirectional marks, lone surrogates, and characters that XML forbids.
_ODD = "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"


def printable(text: str) -> str:
    r"""Return a text in which characters that control a terminal, or are invalid, are escaped (\x1b, \u202e)."""
    return text if text.isprintable() else re.sub(_ODD, _written, text)  # most are, and compiling takes time


def _written(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8 (surrogateescape)
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
