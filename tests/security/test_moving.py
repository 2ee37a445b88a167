"""A target that keeps moving its areas ahead of a reader delays neither the reader nor other inspections."""

from __future__ import annotations

import contextlib
import io
import json
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from iobmd.tools.pagemap.order import ordered
from support import kernel
from support.moving_areas import MovingAreas

from iobmd import IOReturn, IOReturnError, pagemap, procfs
from iobmd._internal import pidns
from iobmd.cli import main
from iobmd.pagemap.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from iobmd._native.pagemap import Walk

FEW = 256


@pytest.fixture
def target() -> Iterator[MovingAreas]:
    with MovingAreas() as target:
        yield target


READERS: dict[str, Callable[[int], Iterable[object]]] = {
    "maps": procfs.maps,
    "details": procfs.details,
    "areas of a range": lambda pid: procfs.areas(pid, 0, 1 << 47),
    "areas": lambda pid: pagemap.areas(pid, details=False),
    "areas with smaps": lambda pid: pagemap.areas(pid, details=True),
    "spans": pagemap.spans,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_reading_ends(target: MovingAreas, read: Callable[[int], Iterable[object]]) -> None:
    areas = len(Path(f"/proc/{target.pid}/maps").read_text().splitlines())
    found = 0
    with pytest.raises(IOReturnError, match="keeps moving its memory") as caught:
        for _one in read(target.pid):
            found += 1
            assert found < 4 * areas, "it does not end"
            target.move()
    assert caught.value.code == IOReturn.kIOReturnBusy


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_all_of_a_task_that_stands_still_is_read(
    target: MovingAreas, read: Callable[[int], Iterable[object]]
) -> None:
    assert sum(1 for _one in read(target.pid)) >= 400


def test_a_task_that_grows_is_read(target: MovingAreas) -> None:
    """Up to twice as many areas as it had are accepted."""
    areas = len(Path(f"/proc/{target.pid}/maps").read_text().splitlines())
    found = 0
    for found, _area in enumerate(procfs.maps(target.pid), 1):
        if found <= areas:
            target.move(1)
    assert areas < found <= 2 * areas


class MovingOutput(io.StringIO):
    """Standard output that makes the target move its areas with each line that is written."""

    def __init__(self, target: MovingAreas) -> None:
        super().__init__()
        self._target = target
        self._lines = 0

    def write(self, text: str) -> int:
        self._lines += "\n" in text
        assert self._lines < 4000, "it does not end"
        self._target.move(100 if "\n" in text else 0)
        return super().write(text)


def test_the_command(target: MovingAreas, capsys: pytest.CaptureFixture[str]) -> None:
    """The command shows the areas that it has read, completes its document and states the reason."""
    with contextlib.redirect_stdout(MovingOutput(target)) as shown:
        assert main(["pagemap", str(target.pid), "--json"]) == 1
    assert "keeps moving its memory" in capsys.readouterr().err
    assert shown.getvalue().count("\n") > FEW
    document: Any = json.loads(shown.getvalue())
    assert document["changed_while_read"]


def test_sorted_rows_are_not_held_in_memory() -> None:
    """The rows of a target with a million areas once took 128 MiB."""
    rows = ((number * 7919 % 20_000, f"{number:<4096}") for number in range(20_000))
    tracemalloc.start()
    try:
        least = [row.strip() for row, _ in zip(ordered(rows, backwards=False), range(3), strict=False)]
        assert tracemalloc.get_traced_memory()[1] < 16 << 20, "of 80 MiB"
    finally:
        tracemalloc.stop()
    assert [int(number) * 7919 % 20_000 for number in least] == [0, 1, 2]


def moving_with_each_step(target: MovingAreas, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Reader.steps
    left = iter(range(4000))

    def moving(reader: Reader, start: int, end: int) -> Iterator[Walk]:
        if reader.task.pid == target.pid:
            next(left)  # StopIteration: it does not end
            target.move()
        return steps(reader, start, end)

    monkeypatch.setattr(Reader, "steps", moving)


@pytest.mark.needs("frames")
def test_other_processes_are_searched_for_a_frame(target: MovingAreas, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that was not searched completely is named."""
    program = next(area for area in procfs.maps(target.pid) if area.inode)
    entry = kernel.entries(program.start, 1, target.pid)[0]
    with MovingAreas(10) as other:
        # The target is searched first, and moves with each of its areas that is inspected.
        monkeypatch.setattr(pidns, "pids", lambda: [target.pid, other.pid])
        moving_with_each_step(target, monkeypatch)
        refused: dict[int, IOReturnError] = {}
        physical = (entry & kernel.FRAME) * kernel.PAGE
        assert physical
        uses = list(pagemap.users(physical, kernel.PAGE, refused=refused.__setitem__))
    assert {use.pid for use in uses} >= {other.pid}, "they map the same page of a file"
    assert {pid: error.code for pid, error in refused.items()} == {target.pid: IOReturn.kIOReturnBusy}


def test_a_snapshot_is_not_written(target: MovingAreas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving_with_each_step(target, monkeypatch)
    with pytest.raises(IOReturnError, match="keeps moving its memory"):
        pagemap.save(target.pid, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
