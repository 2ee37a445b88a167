"""`tools/prose.py`, the lint step that counts phrases to avoid."""

from pathlib import Path

import pytest
from iobmd.tools import prose


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a.py", "# The kernel tells\n#   whether the page\n# is none.\n", [(1, "tell"), (3, "to be had")]),
        ("a.py", '"""Have the pages faulted in."""\n', [(1, "docstring")]),
        ("a.py", 'raise Error(f"{who} looks\\nat it, for it is there")\n', [(1, "for = because")]),
        ("a.py", 'x = 1\nraise Error(f"the limit that was told to {x}")\n', [(2, "tell")]),
        ("a.pyx", "cdef int told  # somebody else's\n", [(1, "somebody")]),
        (
            "a.h",
            "int told;\n/* The lock is given\n * back anew. */\n",
            [(2, "vague verb"), (3, "archaism")],
        ),
        ("a.md", "What is `told`.\n\n```text\ntold\n```\n\n- what was made of it\n", [(7, "what-clause")]),
    ],
)
def test_findings(path: str, text: str, expected: list[tuple[int, str]]) -> None:
    assert [(one.line, one.pattern) for one in sorted(prose.findings(path, text))] == expected


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.py", "told = nobody('tell it')  # a user who waits for it, for example, has not run\n"),
        ("a.py", '"""Return the pages; `whoever` waits."""\n'),
        ("a.md", "The lock that another task holds is released by `tell`.\n"),
    ],
)
def test_false_alarms(path: str, text: str) -> None:
    assert list(prose.findings(path, text)) == []


def test_a_count_above_its_ceiling_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("Nothing to report.\n")
    assert prose.main([]) == 0
    count = prose.PATTERNS["tell"].ceiling + 1
    (tmp_path / "README.md").write_text("The kernel tells.\n" * count)
    assert prose.main(["--list"]) == 1
    assert f"README.md:{count}: tell: tells" in capsys.readouterr().out
