"""Find phrases in comments, docstrings, messages and documentation that a technical writer would replace.

`tools/lint` runs this as `python tools/prose.py`, which prints each place and fails if there is one. If a phrase is
right, exclude its context in `PATTERNS`, or write it as code.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
_PARTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
          ".github", "docs", "iobmd", "cython_ext", "tools", "tests")  # fmt: skip
_OWN = {"prose.py", "test_prose.py"}  # these files contain the phrases


class Pattern(NamedTuple):
    """A phrase to avoid: the expression that finds it, and what to write instead."""

    expression: str
    instead: str


_PRONOUN = "it|they|he|we|there|nothing|nobody|none"
_VERB = "is|are|was|were|has|have|had|can|cannot|could|does|do|did|would|must|may|needs?|takes?|makes?"
PATTERNS = {
    "what-clause": Pattern(
        r"\b(?:what|which) (?:is|are|was|were|has|had)"
        r" (?:there|made|left|had|told|kept|known|taken|given|meant|asked)\b",
        "the noun: existing memory, its dependents, the report",
    ),
    "tell": Pattern(r"\b(?:tells?|told|telling)\b", "report, show, return, record"),
    "to be had": Pattern(
        r"\bbe had\b|(?<!there\s)\b(?:is|are|was|were) none\b|\b[Nn]one if there (?:is|are) none\b",
        "is available, cannot be obtained, there is no, lacks",
    ),
    "for = because": Pattern(
        rf"[,;:] for (?:(?:{_PRONOUN}) |(?:(?:the|a|an|its|their|no) )?[\w-]+ (?:{_VERB})\b)"
        r"|\b(?:of|than) which\b",
        "because; a new sentence",
    ),
    "somebody": Pattern(
        r"\b(?:some|no|any|every)body\b|\bwhoever\b|\b(?:ours|theirs)\b"
        r"|(?:\A|[.:;(] )who\b|\b(?:and|or|but|for|to) who\b",
        "the caller, another process, this process, the target",
    ),
    "docstring": Pattern(r"\A(?:Have|Be|Let|Give|Take|Tell|Know) [a-z]", "the operation: map, lock, populate"),
    "vague verb": Pattern(
        r"\blet(?:s|ting)? (?:\w+ )?go\b|\bg(?:ive|ives|ave|iven|iving) (?:\w+ )?(?:back|away)\b"
        r"|\btak(?:e|es|en|ing) away\b"
        r"|\bknow(?:s|n)? (?:of|again)\b|\blook(?:s|ed|ing)? (?:at|whether|again|there)\b",
        "allocate, release, retain, register, map, inspect, unblock",
    ),
    "archaism": Pattern(
        r"\bmeanwhile\b|\bat the most\b|\bbehind (?:each |one an)other\b|\banew\b|\bin vain\b|\bbeside\b"
        r"|\bstrewn\b|\bat last\b|\bElse\b (?!if\b)|\b(?:no|any) more(?=[.,;:)])|\bdoes without\b"
        r"|\bof itself\b",
        "concurrently, at most, contiguous (consecutive), again, next to, in addition to, otherwise",
    ),
    "idiom": Pattern(
        r"\bover and over\b|\bagain and again\b|\ball the while\b|\b(?:for|after) a (?:while|moment)\b|\bfor good\b"
        r"|\bst(?:and|ands|anding|ood) still\b|\bin one piece\b|\bgo(?:es|ing)? (?:on|away)\b|\bso many\b",
        "repeatedly, temporarily, briefly, stopped, contiguous, continue, disappear, this number",
    ),
    "of its own": Pattern(
        r"\bof (?:its|their|one's) own(?=[,.;:)]| (?:and|or|that|which|for|with|to|by|in|on)\b|\s*\Z)",
        "separate, its own",
    ),
    "as it was": Pattern(r"(?<!soon\s)(?<!often\s)\bas (?:it|they) (?:was|were)\b", "unchanged, as before"),
    "lies": Pattern(r"\b(?:lies|lie|lay|lying)\b(?!-)", "is, is located, has the address"),
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
    ".md": re.compile(r"^```\{glossary\}$|((?:(?!^```).)+)|^```.*?^```$", re.S | re.M),
}


def passages(suffix: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield each comment, string of several words, or passage of documentation, with its offset in `text`."""
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


def main() -> int:
    """Print each place, and what to write instead; return 1 if there is one."""
    found = [one for path in files() for one in findings(str(path.relative_to(ROOT)), path.read_text())]
    for one in found:
        print(f"{one.path}:{one.line}: {one.phrase!r} ({one.pattern}): write {PATTERNS[one.pattern].instead}")
    print(f"prose: {len(found)} phrases of {len(PATTERNS)} patterns")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
