"""The workflows of GitHub, which this host cannot run: what they name exists, and their actions are pinned."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
if not WORKFLOWS:
    pytest.skip("the tests are run away from the sources", allow_module_level=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned(path: Path) -> None:
    """A tag can be moved to other code; the comment names the version, for dependabot and for readers."""
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    assert [one for one in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_exist(path: Path) -> None:
    """The targets of make, the files, and the jobs and steps that are referred to."""
    text = path.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets
    for named in re.findall(r" (\.ci/\w+|iobmd/\w+\.py|CHANGELOG\.md|README\.md|pyproject\.toml)", text):
        assert (ROOT / named).is_file(), named
    jobs = set(re.findall(r"^  ([\w-]+):$", text.partition("\njobs:")[2], re.MULTILINE))
    needed = {name for names in re.findall(r"needs: \[?([\w, -]+)", text) for name in names.split(", ")}
    assert needed <= jobs
    uploaded = set(re.findall(r"upload-artifact@.*\n +with:\n +name: (\w+)", text))
    assert set(re.findall(r"download-artifact@.*\n +with:\n +name: (\w+)", text)) <= uploaded


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_job_is_limited(path: Path) -> None:
    """In time, and in what its token permits; no job runs code of a pull request with a token of this repository."""
    text = path.read_text()
    jobs = re.split(r"^  [\w-]+:$", text.partition("\njobs:")[2], flags=re.MULTILINE)[1:]
    assert all("timeout-minutes:" in job for job in jobs)
    assert re.search(r"^permissions:( \{\}|\n  contents: read)$", text, re.MULTILINE)
    assert "pull_request_target" not in text
    assert "secrets." not in text
    assert all("persist-credentials: false" in job for job in jobs if "actions/checkout@" in job)
