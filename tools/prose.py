"""Count phrases in comments, docstrings, messages and documentation that a technical writer would replace.

`tools/lint` runs this as `python tools/prose.py`, which fails if a count exceeds its ceiling in `PATTERNS`. A ceiling
above zero counts the places where the phrase is right ("a caller who", the user nobody). With `--list`, each place is
printed as well.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
_PARTS = ("README.md", "CHANGELOG.md", "SECURITY.md", "docs", "iobmd", "cython_ext", "tools", "tests")
_OWN = {"prose.py", "test_prose.py"}  # these files contain the phrases


class Pattern(NamedTuple):
    """A phrase to avoid: the expression that finds it, how often it may occur, and what to write instead."""

    expression: str
    ceiling: int
    instead: str


_PRONOUN = "it|they|he|we|there|nothing|nobody|none"
_VERB = "is|are|was|were|has|have|had|can|cannot|could|does|do|did|would|must|may|needs?|takes?|makes?"
PATTERNS = {
    "what-clause": Pattern(
        r"\b(?:what|which) (?:is|are|was|were|has|had)"
        r" (?:there|made|left|had|told|kept|known|taken|given|meant|asked)\b",
        0,
        "the noun: existing memory, its dependents, the report",
    ),
    "tell": Pattern(r"\b(?:tells?|told|telling)\b", 0, "report, show, return, record"),
    "to be had": Pattern(
        r"\bbe had\b|(?<!there\s)\b(?:is|are|was|were) none\b",
        0,
        "is available, cannot be obtained, there is no, lacks",
    ),
    "for = because": Pattern(
        rf"[,;:] for (?:(?:{_PRONOUN}) |(?:(?:the|a|an|its|their|no) )?[\w-]+ (?:{_VERB})\b)"
        r"|\b(?:of|than) which\b",
        0,
        "because; a new sentence",
    ),
    "somebody": Pattern(
        r"\b(?:some|no|any|every)body\b|\bwhoever\b|\b(?:ours|theirs)\b"
        r"|(?:\A|[.:;(] )who\b|\b(?:and|or|but|for|to) who\b",
        7,
        "the caller, another process, this process, the target",
    ),
    "docstring": Pattern(r"\A(?:Have|Be|Let|Give|Take|Tell|Know) [a-z]", 0, "the operation: map, lock, populate"),
    "vague verb": Pattern(
        r"\blet(?:s|ting)? (?:\w+ )?go\b|\bg(?:ive|ives|ave|iven|iving) (?:\w+ )?(?:back|away)\b"
        r"|\btak(?:e|es|en|ing) away\b"
        r"|\bknow(?:s|n)? (?:of|again)\b|\blook(?:s|ed|ing)? (?:at|whether|again|there)\b",
        0,
        "allocate, release, retain, register, map, inspect, unblock",
    ),
    "archaism": Pattern(
        r"\bmeanwhile\b|\bat the most\b|\bbehind (?:each |one an)other\b|\banew\b|\bin vain\b|\bbeside\b"
        r"|\bstrewn\b|\bat last\b|\bElse\b (?!if\b)|\b(?:no|any) more(?=[.,;:)])|\bdoes without\b"
        r"|\bof itself\b",
        0,
        "concurrently, at most, contiguous (consecutive), again, next to, in addition to, otherwise",
    ),
}  # fmt: skip
_EXPRESSIONS = {name: re.compile(pattern.expression.replace(" ", r"\s+"), re.M) for name, pattern in PATTERNS.items()}


class Finding(NamedTuple):
    """One occurrence of a pattern."""

    path: str
    line: int
    pattern: str
    phrase: str


_HASH_COMMENT = r"(?:#[^\n]*(?:\n[ \t]*(?=#))?)+"
_C_COMMENT = r"/\*.*?\*/|//[^\n]*"
_STRING = r'"""(?:\\.|.)*?"""|"(?:\\.|[^"\\\n])*"'
_CODE = r"'(?:\\.|[^'\\\n])*'"  # names and characters: ruff formats every sentence with double quotes
_GRAMMAR = {
    # Files of declarations contain C code in strings: only their comments are read.
    ".pxd": re.compile(f"({_HASH_COMMENT}|{_C_COMMENT})", re.S),
    **dict.fromkeys((".py", ".pyi", ".pyx", ".pxi"), re.compile(f"({_HASH_COMMENT}|{_STRING})|{_CODE}", re.S)),
    **dict.fromkeys((".c", ".h"), re.compile(f"({_C_COMMENT}|{_STRING})|{_CODE}", re.S)),
    ".md": re.compile(r"((?:(?!^```).)+)|^```.*?^```$", re.S | re.M),
}


def passages(suffix: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield each comment, string of several words, or stretch of documentation, with its offset in `text`."""
    for match in _GRAMMAR[suffix].finditer(text):
        if match[1] and " " in match[1].strip():
            yield match.start(1), match[1]


def prose(passage: str) -> str:
    """Blank out code, quotation marks and comment marks; all other characters remain at their offsets."""

    def blank(match: re.Match[str]) -> str:
        return " " * len(match[0])

    # The names of parameters, in a numpydoc section, precede an indented description.
    passage = re.sub(r"^([ \t]*)\w+(?:, \w+)*(?: : [^\n]*)?$(?=\n\1[ \t]+\S)", blank, passage, flags=re.M)
    return re.sub(r"`[^`\n]*`|\{[^{}\n]*\}|\n[ \t]*(?:#:?|//|\*)|^[#/*\"]+", blank, passage)


def findings(path: str, text: str) -> Iterator[Finding]:
    """Yield every occurrence of every pattern in the prose of a file."""
    for offset, passage in passages(Path(path).suffix, text):
        words = prose(passage).lstrip()
        start = offset + len(passage) - len(words)
        for name, expression in _EXPRESSIONS.items():
            for match in expression.finditer(words):
                line = text.count("\n", 0, start + match.start()) + 1
                yield Finding(path, line, name, re.sub(r"\s+", " ", match[0]).strip())


def files() -> list[Path]:
    """Return the files that are checked."""
    paths = [path for part in _PARTS for path in [ROOT / part, *(ROOT / part).rglob("*")] if path.suffix in _GRAMMAR]
    return sorted(path for path in paths if "_build" not in path.parts and path.name not in _OWN and path.is_file())


def main(arguments: list[str]) -> int:
    """Print each count with its ceiling, and with `--list` each place; return 1 if a count exceeds its ceiling."""
    found = [one for path in files() for one in findings(str(path.relative_to(ROOT)), path.read_text())]
    if "--list" in arguments:
        print(*(f"{one.path}:{one.line}: {one.pattern}: {one.phrase}" for one in found), sep="\n")
    counts = Counter(one.pattern for one in found)
    exceeded = [name for name, pattern in PATTERNS.items() if counts[name] > pattern.ceiling]
    for name, pattern in PATTERNS.items():
        print(f"prose: {name}: {counts[name]} (at most {pattern.ceiling})")
    for name in exceeded:
        print(f"prose: too many of {name!r}: python tools/prose.py --list; write instead: {PATTERNS[name].instead}")
    return bool(exceeded)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
