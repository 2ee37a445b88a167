"""`tools/prose.py`, the lint step that finds phrases to avoid."""

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
        (
            "a.py",
            "# The page lies there\n# as it was, over and over.\n",
            [(1, "lies"), (2, "as it was"), (2, "idiom")],
        ),
        ("a.py", '"""Return a process of its own."""\n', [(1, "of its own")]),
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
        (
            "a.py",
            '"""Wait as soon as it was read.\n\n    ours, theirs\n        The server of its own file.\n    """\n',
        ),
        ("a.md", "The lock that another task holds is released by `tell`.\n"),
    ],
)
def test_false_alarms(path: str, text: str) -> None:
    assert list(prose.findings(path, text)) == []


def test_a_phrase_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("Nothing to report.\n")
    assert prose.main() == 0
    (tmp_path / "README.md").write_text("Nothing to report.\nThe kernel tells.\n")
    assert prose.main() == 1
    assert "README.md:2: 'tells' (tell): write report" in capsys.readouterr().out
