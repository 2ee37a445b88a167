"""Tables on stdout, by rich, which is loaded only if one is printed."""

import sys
from collections.abc import Iterable, Sequence


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> None:
    """Print a table on stdout.

    Parameters
    ----------
    title : str
        Printed above the table.
    columns : sequence of str
        The headings.
    rows : iterable of sequences
        Cells, converted to text.
    right : iterable of int
        Indices of right-aligned columns.
    """
    from rich.console import Console  # noqa: PLC0415 (rich takes longer to load than most commands to run)
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table()
    for index, heading in enumerate(columns):
        table.add_column(heading, justify="right" if index in set(right) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    # In a file or a pipe, lines are not folded.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(Text(title))
    console.print(table)
