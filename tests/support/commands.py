"""Commands of iobmd, run in this process."""

import pytest

from iobmd.cli import main


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the output of `iobmd pagemap` with these arguments, which must succeed."""
    assert main(["pagemap", *arguments]) == 0
    return capsys.readouterr().out
