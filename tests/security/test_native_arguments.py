"""Impossible numbers are refused by the native layer itself, so that a missing check cannot unmap other memory."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.child import in_child
from support.kernel import PAGE
from support.rawmemory import memfd

from iobmd._native.mapping import Exporter, Mapping

TOP = 1 << 63
HUGE = 2 << 20
ALIGNMENTS = [0, 1 << 63, 3, 12288, PAGE + 1, (1 << 64) - PAGE]
SIZES = [0, 1, PAGE + 1, TOP, (1 << 64) - PAGE, 1 << 64, -PAGE]


def view(pieces: list[tuple[int, int]], *, at: int = 0, guard: int = 0, alignment: int = PAGE) -> Callable[[], None]:
    def attack() -> None:
        with memfd(4 * PAGE) as fd:
            Mapping.view([(fd, *piece) for piece in pieces], at, True, guard, alignment)

    return attack


def exported(offset: int, length: int) -> Callable[[], None]:
    class WrongExporter(Exporter):
        def _exported(self) -> tuple[None, Mapping, int, int, bool]:
            return None, Mapping.anonymous(PAGE, PAGE), offset, length, True

    def attack() -> None:
        memoryview(WrongExporter())

    return attack


def redirected(pieces: list[tuple[int, int]]) -> Callable[[], None]:
    def attack() -> None:
        with memfd(4 * PAGE) as fd:
            mapping = Mapping.view([(fd, 0, 2 * PAGE)], 0, True, 0, PAGE)
            try:
                mapping.redirect([(fd, *piece) for piece in pieces])
            finally:
                mapping.close()

    return attack


ATTACKS: dict[str, Callable[[], object]] = {
    **{f"anonymous, alignment {one:#x}": partial(Mapping.anonymous, PAGE, one) for one in ALIGNMENTS},
    **{f"anonymous, size {one:#x}": partial(Mapping.anonymous, one, HUGE) for one in SIZES},
    **{f"reserve, alignment {one:#x}": partial(Mapping.reserve, PAGE, one) for one in ALIGNMENTS},
    **{f"reserve, size {one:#x}": partial(Mapping.reserve, one, PAGE) for one in SIZES},
    **{f"view, alignment {one:#x}": view([(PAGE, PAGE), (0, PAGE)], alignment=one) for one in ALIGNMENTS},
    **{f"view, piece of {one:#x}": view([(0, PAGE), (0, one)]) for one in SIZES},
    **{f"view, one piece of {one:#x}": view([(0, one)]) for one in SIZES},
    **{f"view, guard {one:#x}": view([(0, PAGE)], guard=one) for one in SIZES[1:]},
    "view, sizes that wrap": view([(0, TOP), (0, TOP), (0, PAGE)]),
    "view, nothing": view([]),
    "view, offset that wraps": view([(TOP, PAGE)]),
    "view, negative offset": view([(-PAGE, PAGE)]),
    "view, at the end": view([(0, PAGE)], at=(1 << 64) - PAGE),
    "view, in two at the end": view([(0, PAGE), (0, PAGE)], at=(1 << 64) - PAGE),
    "redirect, to more": redirected([(0, PAGE), (0, PAGE), (0, PAGE)]),
    "redirect, in parts of pages": redirected([(0, PAGE + 1), (0, PAGE - 1)]),
    "redirect, negative": redirected([(0, 3 * PAGE), (0, -PAGE)]),
    **{f"space, size {one:#x}": partial(Mapping.space, HUGE, one, False) for one in SIZES},
    **{f"space, at {one:#x}": partial(Mapping.space, one, PAGE, True) for one in SIZES},
    "space, end that wraps": partial(Mapping.space, (1 << 64) - PAGE, 2 * PAGE, True),
    "borrow, size that wraps": partial(Mapping.borrow, PAGE, (1 << 64) - PAGE, True),
    "borrow, address that wraps": partial(Mapping.borrow, (1 << 64) - PAGE, 2 * PAGE, True),
    "export, negative offset": exported(-PAGE, PAGE),
    "export, negative length": exported(0, -1),
    "export, sum that wraps": exported(TOP - 1, TOP - 1),
}


def areas() -> set[str]:
    """Return the mappings of this process: address range and contents."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {" ".join((line.split()[0], *line.split()[5:])) for line in lines}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_impossible_numbers(attack: Callable[[], object]) -> None:
    def child() -> tuple[str, set[str]]:
        before = areas()
        try:
            attack()
        except (ValueError, OverflowError, BufferError) as error:
            message = str(error)
        else:
            message = ""
        gone = {area for area in before - areas() if "[" not in area and "/" in area}
        return message, gone

    message, gone = in_child(child)  # which a missing check would kill
    assert message, "it was accepted"
    assert not gone


def test_possible_numbers() -> None:
    """The control of the test above."""
    with memfd(4 * PAGE) as fd:
        os.pwrite(fd, b"second", PAGE)
        mapping = Mapping.view([(fd, PAGE, PAGE), (fd, 0, PAGE)], 0, True, PAGE, HUGE)
        assert mapping.read(0, 6) == b"second"
        mapping.redirect([(fd, 0, 2 * PAGE)])
        assert mapping.read(PAGE, 6) == b"second"
        mapping.close()
    for alignment in (1, PAGE, HUGE, 1 << 40):
        mapping = Mapping.anonymous(PAGE, alignment)
        assert mapping.address % alignment == 0
        mapping.close()


def test_only_reserved_space_is_replaced() -> None:
    mapping, space = Mapping.anonymous(2 * PAGE, PAGE), Mapping.reserve(2 * PAGE, PAGE)
    for at in (mapping.address, HUGE):
        with pytest.raises(FileExistsError):
            Mapping.space(at, PAGE, True)
    with pytest.raises(TypeError):
        mapping.move(None)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="mremap"):  # into space of another size
        mapping.move(Mapping.space(space.address, PAGE, True))
    view = memoryview(Exported(mapping))
    with pytest.raises(ValueError, match="in use"):
        mapping.move(Mapping.space(space.address, 2 * PAGE, True))
    view.release()
    mapping.write(PAGE, b"moved")
    mapping.move(Mapping.space(space.address, 2 * PAGE, True))
    assert mapping.address == space.address
    assert mapping.read(PAGE, 5) == b"moved"
    mapping.close()
    space.close()


class Exported(Exporter):
    """A mapping, exported by the buffer protocol."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping

    def _exported(self) -> tuple[None, Mapping, int, int, bool]:
        return None, self._mapping, 0, PAGE, True
