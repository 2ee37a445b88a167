"""The `iobmd` command. Each subcommand is one module, imported only when it runs.

The module has `main(argv) -> int`, and `make_parser()`, from which the completions and man pages are generated.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from iobmd._version import __version__
from iobmd.cli import encoding, folding
from iobmd.errors import IOReturnError
from iobmd.printable import printable

COMMANDS = {
    "demo": ("iobmd.cli.demo.command", "copy memory from another process, and verify the copies"),
    "copy": ("iobmd.cli.copy", "copy a range of a process's memory to a file"),
    "core": ("iobmd.cli.core", "write a core file of a running process, for debuggers"),
    "share": ("iobmd.cli.share", "map memory into another process, until interrupted"),
    "alloc": ("iobmd.cli.alloc", "allocate wired, contiguous or masked memory, and report its location"),
    "doctor": ("iobmd.cli.doctor", "report what this host supports, and how to enable the rest"),
}
"""Subcommands: the name of the module that runs each, and its summary.

`iobmd.tools` adds its own when it is imported.
"""

DESCRIPTION = "Allocate, copy and inspect wired memory on Linux."

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: iobmd [-h] [--version] COMMAND ...\n\n"
        f"{DESCRIPTION}\n\n"
        f"commands:\n{commands}\n\n"
        "`iobmd COMMAND --help` describes the options of a command."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit code.

    0: success; 1: failure, with the reason on stderr, on one line, which is folded for a terminal; 2: wrong usage;
    130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"iobmd {__version__}")
        return EXIT_OK
    if arguments[:1] in (["-h"], ["--help"]):
        print(_usage())
        return EXIT_OK
    if not arguments or arguments[0] not in COMMANDS:
        wrong = f"iobmd: unknown command {arguments[0]!r}\n" if arguments else ""
        print(f"{wrong}{_usage()}", file=sys.stderr)
        return EXIT_USAGE
    return _run(arguments[0], arguments[1:])


def _run(name: str, arguments: list[str]) -> int:
    try:
        _open_standard_streams()
        encoding.substitute_missing_signs()
        code: int = importlib.import_module(COMMANDS[name][0]).main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has exited. The interpreter's last flush must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        what = error if isinstance(error, IOReturnError) else f"{error.filename or 'error'}: {error.strerror}"
        folding.show(f"iobmd {name}: {printable(str(what))}", folding.terminal_width(sys.stderr), file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"iobmd {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as leave:  # argparse: --help or wrong usage
        return leave.code if isinstance(leave.code, int) else EXIT_USAGE
    return code


def _open_standard_streams() -> None:
    """Open /dev/null in place of each standard stream that the parent process has closed.

    Otherwise the next file to be opened would get its number: an output file could receive the messages that are
    written to standard error.
    """
    while (opened := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        pass
    os.close(opened)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
