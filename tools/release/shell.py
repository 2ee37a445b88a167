"""Shell completions and man pages, generated from the parsers of the commands: `make shell`.

    python -m iobmd.tools.release.shell [--check]

They are in the tree (`tools/share/`), so that a build needs neither the generators nor the package. `tools/lint`
checks that they are current.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

from iobmd._version import __version__
from iobmd.cli import COMMANDS, DESCRIPTION

SHARE = Path(__file__).parents[1] / "share"
COMPLETIONS = {
    "bash": "bash-completion/completions/iobmd",
    "zsh": "zsh/site-functions/_iobmd",
    "fish": "fish/vendor_completions.d/iobmd.fish",
}
_PROCESSES = {"bash": "_iobmd_processes", "zsh": "_pids", "fish": "__fish_complete_pids"}
# Defines the function whose name is in _PROCESSES.
_PREAMBLES = {"bash": '_iobmd_processes() { compgen -W "$(cd /proc && echo [0-9]*) self" -- "$1"; }\n'}
_EXIT_STATUS = (
    "0: success; 1: failure, with the reason on one line of standard error; 2: wrong usage; 130: interrupted."
)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    return {name: importlib.import_module(module).make_parser() for name, (module, _) in COMMANDS.items()}


def whole() -> argparse.ArgumentParser:
    """Return one parser for all commands; `iobmd` itself has none, because it loads only the subcommand to run."""
    parser = argparse.ArgumentParser(prog="iobmd", description=DESCRIPTION)
    parser.add_argument("-V", "--version", action="version", version=__version__, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, own in parsers().items():
        for action in own._actions:
            if action.metavar == "FILE":
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab reads it
            elif action.dest == "pid":
                action.complete = _PROCESSES  # type: ignore[attr-defined]
        commands.add_parser(name, help=COMMANDS[name][1], parents=[own], add_help=False)
    return parser


def pages() -> dict[str, argparse.ArgumentParser]:
    """Return the parser for each man page; that of `iobmd` has the commands as its arguments."""
    overview = argparse.ArgumentParser("iobmd", "iobmd [-h] [--version] COMMAND ...", DESCRIPTION)
    overview.add_argument("-V", "--version", action="store_true", help="print the version")
    commands = overview.add_argument_group("commands")
    for name, (_, summary) in COMMANDS.items():
        commands.add_argument(name, help=summary)
    return {"iobmd": overview} | {f"iobmd-{name}": parser for name, parser in parsers().items()}


def page(name: str, parser: argparse.ArgumentParser, others: list[str]) -> str:
    """Return a man page in the roff macros of man(7)."""
    epilog, parser.epilog = parser.epilog, None
    manual = Manpage(parser, format="single-commands-section")
    manual.prog, manual.source, manual.manual, manual.date = name, f"iobmd {__version__}", "iobmd", ""
    forms = " ".join(manual.synopsis).split(f"{parser.prog} ")[1:]  # a usage may have several
    manual.synopsis = [parser.prog, f"\n.br\n.B {parser.prog}\n".join(forms)]
    command = name.removeprefix("iobmd-")
    manual.description = COMMANDS[command][1] if command in COMMANDS else DESCRIPTION[0].lower() + DESCRIPTION[1:-1]
    for heading, text in (("notes", epilog), ("exit status", _EXIT_STATUS)):
        if text:
            manual.add_section(heading, "=", text.replace("-", r"\-"))
    manual.add_section("see also", "=", ",\n".join(f".BR {other} (1)" for other in others if other != name))
    return str(manual)


def files() -> dict[str, str]:
    """Return the contents of every generated file, by its path below `tools/share`."""
    os.environ["COLUMNS"] = "100"  # argparse wraps lines at the width of the terminal
    parser = whole()
    found = {
        path: shtab.complete(parser, shell, preamble=_PREAMBLES.get(shell, "")) for shell, path in COMPLETIONS.items()
    }
    described = pages()
    return found | {f"man/man1/{name}.1": page(name, parser, [*described]) for name, parser in described.items()}


def main(argv: list[str]) -> int:
    """Write the files; with `--check`, return 1 if one of them is not current."""
    stale = {path: text for path, text in files().items() if not _is(SHARE / path, text)}
    if "--check" in argv:
        for path in stale:
            print(f"tools/share/{path} is not current: run make shell")
        return bool(stale)
    for path, text in stale.items():
        (SHARE / path).parent.mkdir(parents=True, exist_ok=True)
        (SHARE / path).write_text(text)
        print(f"tools/share/{path}")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
