"""`iobmd soak`: all operations concurrently, with each event checked against the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run `iobmd soak`."""
    # Workers import this package too, and need none of it.
    import json  # noqa: PLC0415

    from iobmd.cli import EXIT_FAILED, EXIT_OK  # noqa: PLC0415
    from iobmd.cli.folding import terminal_width  # noqa: PLC0415
    from iobmd.cli.signals import terminable  # noqa: PLC0415

    from . import options, report, supervisor  # noqa: PLC0415

    chosen = options.parse(argv)
    with terminable():
        result = supervisor.Supervisor(chosen).run()
    print(report.text(result, terminal_width()))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    return EXIT_FAILED if any(result["faults"].values()) else EXIT_OK


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `iobmd soak`."""
    from . import options  # noqa: PLC0415

    return options.make_parser()
