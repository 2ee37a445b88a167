"""Changes between two snapshots."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from iobmd._internal.arguments import check_type
from iobmd.errors import BadArgumentError
from iobmd.pagemap.reader import require_frames
from iobmd.pagemap.snapshot import Snapshot
from iobmd.pagemap.span import spans
from iobmd.task.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from iobmd.pagemap.snapshot import Batch
    from iobmd.pagemap.span import Span
    from iobmd.procfs import VMA

    _T = TypeVar("_T")


class Kind(StrEnum):
    """Kinds of changes."""

    MAPPED = "mapped"
    """A new area."""
    UNMAPPED = "unmapped"
    """An area that no longer exists."""
    NEWLY_RESIDENT = "newly resident"
    """In memory; previously neither in memory nor in swap, or in swap as shared memory. Zero pages do not count."""
    RELEASED = "released"
    """No longer in memory or in swap; or shared memory that is now in swap, which pagemap does not show."""
    SWAPPED_OUT = "swapped out"
    """Previously in memory, now in swap."""
    SWAPPED_IN = "swapped in"
    """Previously in swap, now in memory."""
    COPIED = "copied"
    """An anonymous page has replaced a page of a file, as after a write to it; or the reverse."""
    MIGRATED = "migrated"
    """In another page frame: moved, or copied by a write after a fork."""
    WRITTEN = "written"
    """Between two `iobmd.Snapshot` of a task: in another page frame, because the task wrote to it. Few others count
    too: pages that the kernel moved while they were compared."""
    SPLIT = "split"
    """Previously mapped by a huge page, now by small ones."""
    COLLAPSED = "collapsed"
    """Previously mapped by small pages, now by a huge one."""
    OTHER = "other"
    """Zero pages, guard pages and markers that appeared or disappeared."""


class Change(NamedTuple):
    """A change of contiguous pages; in bytes."""

    kind: Kind
    """What happened."""
    virtual: int
    """The first virtual address."""
    length: int
    """The length."""
    before: int | None
    """The previous physical address; None if unknown, or if its frames were not contiguous."""
    after: int | None
    """The new physical address; None if unknown, or if its frames are not contiguous."""


def changes(before: Snapshot | Task, after: Snapshot | Task, *, joined: bool = True) -> Iterator[Change]:
    """Iterate over the changes: first new and removed areas, then pages, each in ascending order.

    If frame numbers are hidden in one of the two, moved pages are not reported.

    Parameters
    ----------
    before, after : Snapshot or iobmd.Snapshot
        Saved snapshots of the same range; or two snapshots of the same task that are open (`iobmd.snapshot`), between
        which the pages are listed that the task has written to.
    joined : bool
        Whether adjacent ranges of an area with the same change are one, whatever their frames; if not, there is one
        for each contiguous range of frames, whose addresses are then all reported.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: the snapshots have different ranges or page sizes, or one is damaged; or they are not
        snapshots of the same task. `kIOReturnNotPrivileged`: frame numbers are hidden, and the snapshots are open.
        `kIOReturnNotOpen`: one of the tasks' snapshots was closed.
    """
    if isinstance(before, Task) or isinstance(after, Task):
        found = _written(before, after)
        return _joined(found, _bounds(before, after)) if joined else found
    check_type(Snapshot, before=before, after=after)
    old_header, new_header = before.header, after.header
    for what, old_one, new_one in (
        ("ranges", (old_header.start, old_header.end), (new_header.start, new_header.end)),
        ("page sizes", old_header.page_bytes, new_header.page_bytes),
    ):
        if old_one != new_one:
            raise BadArgumentError(f"the snapshots are of different {what}")
    found = _changes(before, after)
    return _joined(found, _bounds(before, after)) if joined else found


def _written(before: object, after: object) -> Iterator[Change]:
    """Iterate over the changes between two open snapshots, which share the frames that were not written to."""
    task = getattr(before, "task", None)
    if not (isinstance(before, Task) and isinstance(after, Task) and task and task == getattr(after, "task", None)):
        message = f"{before!r} and {after!r} are not snapshots of the same task: create both by iobmd.snapshot"
        raise BadArgumentError(message)
    for one in (before, after):
        one._require_open()
    require_frames()
    return _changes_of_tasks(before, after)


def _changes_of_tasks(before: Task, after: Task) -> Iterator[Change]:
    yield from _changed_areas(*([(vma.start, vma.end) for vma in _areas(one)] for one in (before, after)))
    for change in _changed_spans(spans(before), spans(after)):
        yield change._replace(kind=Kind.WRITTEN) if change.kind is Kind.MIGRATED else change


def _bounds(*snapshots: Snapshot | Task) -> array[int]:
    """Return the starts of the areas of snapshots, ascending; it takes 8 bytes each."""
    return array("Q", sorted(area.start for snapshot in snapshots for area in _areas(snapshot)))


def _areas(snapshot: Snapshot | Task) -> Iterable[VMA]:
    """Return the areas of a snapshot of either kind: the module of `iobmd.Snapshot` is above this one."""
    found: Iterable[VMA] = snapshot.areas()  # type: ignore[union-attr]
    return found


def _joined(found: Iterator[Change], starts: array[int]) -> Iterator[Change]:
    """Join adjacent changes of the same kind, and split them where an area starts."""
    last: Change | None = None
    for whole in found:
        for change in _split(whole, starts):
            follows = last and last.kind == change.kind and last.virtual + last.length == change.virtual
            if last and follows and not _has(starts, change.virtual):
                last = last._replace(
                    length=last.length + change.length,
                    before=_contiguous(last.before, last.length, change.before),
                    after=_contiguous(last.after, last.length, change.after),
                )
                continue
            if last:
                yield last
            last = change
    if last:
        yield last


def _split(change: Change, starts: array[int]) -> Iterator[Change]:
    """Split a change at the starts of areas; the frames of the second part and those above it are left out."""
    first, end = change.virtual, change.virtual + change.length
    index = bisect_right(starts, first)
    if index == len(starts) or starts[index] >= end:  # nearly always
        yield change
        return
    yield change._replace(length=starts[index] - first)
    while index < len(starts) and starts[index] < end:
        stop = min(end, starts[index + 1]) if index + 1 < len(starts) else end
        if starts[index] < stop:  # an area of both snapshots has the same start twice
            yield Change(change.kind, starts[index], stop - starts[index], None, None)
        index += 1


def _has(starts: array[int], address: int) -> bool:
    index = bisect_left(starts, address)
    return index < len(starts) and starts[index] == address


def _contiguous(physical: int | None, length: int, following: int | None) -> int | None:
    return physical if physical is not None and physical + length == following else None


def _changed_areas(before: Iterable[tuple[int, int]], after: Iterable[tuple[int, int]]) -> Iterator[Change]:
    for start, end, old, new in _pieces(before, after, lambda one: one):
        if old is None or new is None:
            yield Change(Kind.MAPPED if old is None else Kind.UNMAPPED, start, end - start, None, None)


def _changes(before: Snapshot, after: Snapshot) -> Iterator[Change]:
    yield from _changed_areas(_ranges(before), _ranges(after))
    for olds, news in _differing(before.batches(), after.batches()):
        yield from _changed_spans(olds, news)


def _changed_spans(before: Iterable[Span], after: Iterable[Span]) -> Iterator[Change]:
    for first, last, had, has in _pieces(before, after, lambda span: (span.virtual, span.end)):
        if kind := _judge(first, had, has):
            yield Change(kind, first, last - first, _frame(had, first), _frame(has, first))


def _ranges(snapshot: Snapshot) -> Iterator[tuple[int, int]]:
    """Iterate over the areas, limited to the range of the snapshot."""
    low, high = snapshot.header.start, snapshot.header.end
    return ((max(area.start, low), min(area.end, high)) for area in snapshot.areas())


def _differing(before: Iterator[Batch], after: Iterator[Batch]) -> Iterator[tuple[list[Span], list[Span]]]:
    """Iterate over the spans of two snapshots in groups with common bounds, without equal groups.

    Most of a large task is unchanged, and comparing texts takes a tenth of the time that parsing them takes.
    """
    old, new = next(before, None), next(after, None)
    olds: list[Span] = []
    news: list[Span] = []
    while old or new:
        start = min(batch.start for batch in (old, new) if batch)
        if all(spans[-1].end <= start for spans in (olds, news) if spans):
            yield olds, news
            olds, news = [], []
            if old and new and old.text == new.text:
                old, new = next(before, None), next(after, None)
                continue
        if old and old.start == start:
            olds += old.spans()
            old = next(before, None)
        if new and new.start == start:
            news += new.spans()
            new = next(after, None)
    yield olds, news


def _judge(address: int, before: Span | None, after: Span | None) -> Kind | None:
    had, has = _state(before), _state(after)
    if had == has:
        return _moved(address, before, after) if before and after and has == "memory" else None
    if has == "swap":
        return Kind.SWAPPED_OUT
    if has == "memory":
        return Kind.SWAPPED_IN if had == "swap" else Kind.NEWLY_RESIDENT
    return Kind.RELEASED if had in ("memory", "swap") else Kind.OTHER


def _moved(address: int, before: Span, after: Span) -> Kind | None:
    """Return the kind of change for pages that are present in both."""
    if before.huge != after.huge:
        return Kind.COLLAPSED if after.huge else Kind.SPLIT
    if before.file_or_shared != after.file_or_shared:
        return Kind.COPIED
    known = before.physical is not None and after.physical is not None
    return Kind.MIGRATED if known and _frame(before, address) != _frame(after, address) else None


def _state(span: Span | None) -> str:
    if span is None:
        return "nothing"
    if span.swapped:
        return "swap"
    return "memory" if span.present and not span.zero else span.state


def _frame(span: Span | None, address: int) -> int | None:
    if span is None or span.physical is None:
        return None
    return span.physical if span.zero and not span.huge else span.physical + (address - span.virtual)


def _pieces(
    before: Iterable[_T], after: Iterable[_T], bounds: Callable[[_T], tuple[int, int]]
) -> Iterator[tuple[int, int, _T | None, _T | None]]:
    """Split two ascending sequences of ranges at each other's bounds; yield start, end, and the value of each."""
    olds, news = iter(before), iter(after)
    old, new = next(olds, None), next(news, None)
    at = 0
    while old is not None or new is not None:
        low, high = bounds(old) if old is not None else (_END, _END)
        start, stop = bounds(new) if new is not None else (_END, _END)
        at = max(at, min(low, start))
        end = min(edge for edge in (low, high, start, stop) if edge > at)
        yield at, end, old if low <= at else None, new if start <= at else None
        at = end
        if old is not None and high <= at:
            old = next(olds, None)
        if new is not None and stop <= at:
            new = next(news, None)


_END = 1 << 65
