"""Text of others, such as names of files and programs, for terminals and pictures."""

from __future__ import annotations

import re

# Control characters, marks that turn the direction of writing, lone surrogates, and what XML forbids.
_ODD = "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"


def printable(text: str) -> str:
    r"""Return a text with what would steer a terminal, or is no character at all, written as \x1b or \u202e."""
    return text if text.isprintable() else re.sub(_ODD, _written, text)  # most are, and `re` is slow to begin


def _written(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8 (surrogateescape)
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
