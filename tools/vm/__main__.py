"""`python -m iobmd.tools.vm`: run tests in guests, or open a shell in one."""

import argparse
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from iobmd.cli import EXIT_INTERRUPTED
from iobmd.cli.signals import terminable

from . import kernels, machine, runs, shell, table
from .architecture import ARCHITECTURES, Architecture, of_host
from .profiles import ALONE, CI, FULL, PARTLY, PROFILES, profile


def main(argv: list[str] | None = None) -> int:
    """Return 0 if every guest passed, 1 if one failed, 2 if none could be run, 130 if interrupted."""
    args = _arguments(argv)
    architecture = ARCHITECTURES[args.architecture]
    if missing := machine.missing(architecture):
        remedy = f"as root, `tools/prepare-vm {architecture.name}` installs them"
        print(f"programs are missing to run guests: {missing}; {remedy}", file=sys.stderr)
        return 2
    if args.command == "shell":
        return shell.open_in(kernels.kernel(architecture, args.kernel), profile(args.profile).machine)
    try:
        with terminable():  # so that guests are ended, and disks and archives removed
            return _run(architecture, args)
    except KeyboardInterrupt:
        print("interrupted: the guests were ended", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(architecture: Architecture, args: argparse.Namespace) -> int:
    begin = time.monotonic()
    pairs = _wanted(architecture, args.kernels.split(), args.profiles.split())
    done = runs.run_all(architecture, pairs, args.tests, args.jobs, args.verbose)
    failed = sum(bool(run.outcome.failure) for run in done)
    print(f"{len(done)} guests in {time.monotonic() - begin:.0f} s, {failed} failed", *table.totals(done), sep="; ")
    if args.table and not failed:
        table.write(architecture, done, args.table)
    return 1 if failed else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m iobmd.tools.vm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the tests in guests")
    listed = "; ".join(f"{one.name}: {' '.join(one.series)}" for one in ARCHITECTURES.values())
    run.add_argument("--kernels", default="", help=f"by series (default: all of {listed})")
    run.add_argument(
        "--profiles", default="", help=f"of {' '.join(PROFILES)}, or ci; joined by +: one guest (default: all)"
    )
    run.add_argument("--tests", default="", help="arguments of pytest (default: the tests of each profile)")
    run.add_argument("--jobs", type=int, default=2, help="number of guests that run at a time")
    run.add_argument("--table", type=Path, help="a page of the documentation whose table is updated")
    run.add_argument("--verbose", action="store_true", help="also show the output of guests that pass")
    shell_command = commands.add_parser("shell", help="open a shell in a guest; `poweroff -f` ends it")
    shell_command.add_argument("--kernel", default="newest", help="its series")
    shell_command.add_argument("--profile", default=next(iter(PROFILES)), choices=PROFILES, help="its hardware")
    for command in (run, shell_command):
        command.add_argument(
            "--architecture",
            default=of_host().name,
            choices=ARCHITECTURES,
            help="of the guests (default: the host's)",
        )
    args = parser.parse_args(argv)
    for each in args.profiles.split() if args.command == "run" else ():
        names = each.split("+")
        if unknown := {*names} - ({*PROFILES, "ci"} if len(names) == 1 else {*PROFILES}):
            parser.error(f"no such profile: {' '.join(unknown)}; there are {' '.join(PROFILES)} ci")
        if len(names) > 1 and (alone := {*names} & ALONE):
            parser.error(f"{' '.join(alone)}: only possible in a separate guest")
    return args


def _wanted(architecture: Architecture, series: list[str], profiles: list[str]) -> list[tuple[kernels.Kernel, str]]:
    """Return which profiles to run on which kernels, each kernel once."""
    names = [name for name in profiles if name != "ci"] or FULL[architecture.name]
    only: Mapping[str, Collection[str]] = {}
    if "ci" in profiles:
        only = CI[architecture.name]
        series = series or [*only]
    elif not series:
        partly = PARTLY[architecture.name].items()
        only = {each: tested for each, differing in partly if (tested := differing & {*names})}
        series = [*architecture.series, *only]
    found: dict[str, kernels.Kernel] = {}
    for each in series:
        kernel = kernels.kernel(architecture, each)
        version = each.partition("-")[0]
        other = (
            "" if version == "newest" or kernel.release.startswith(f"{version}.") else ": the mirror has none of it"
        )
        print(f"{each}: {kernel.release}{other}", flush=True)
        found.setdefault(str(kernel.modules), kernel)
    pairs = [(kernel, name) for kernel in found.values() for name in only.get(kernel.series, names)]
    return sorted(pairs, key=lambda pair: -pair[1].count("+"))  # long ones first: none runs alone at the end


if __name__ == "__main__":
    sys.exit(main())
