"""`python -m iobmd.tools.release`: build the sdist and a wheel for each platform, and check all of them."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from . import build, checks


def main(argv: list[str] | None = None) -> int:
    """Return 0 if every file was built and passed every check; otherwise the failed command raises."""
    parser = argparse.ArgumentParser(prog="python -m iobmd.tools.release", description=__doc__)
    parser.add_argument("--tools", type=Path, default=Path("build/release"), help="virtual environment of the tools")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="directory of the results (default: dist)")
    parser.add_argument(
        "--only", nargs="+", choices=build.TARGETS, default=[*build.TARGETS], metavar="TARGET", help="these wheels"
    )
    arguments = parser.parse_args(argv)
    tools, output = (path.absolute() for path in (arguments.tools, arguments.output))
    with tempfile.TemporaryDirectory(prefix="iobmd-release.") as folder:
        work = Path(folder)
        sdist = build.sdist(tools, output)
        print(f"{sdist.name}: {sdist.stat().st_size >> 10:,} KiB", flush=True)
        checks.of_metadata(tools, sdist)
        for name in arguments.only:
            begin = time.monotonic()
            wheel = build.wheel(tools, sdist, build.TARGETS[name], work / name, output)
            checks.of_metadata(tools, wheel)
            checks.of_contents(wheel)
            checks.of_symbols(tools, wheel)
            loaded = checks.loaded(wheel, build.TARGETS[name], work / name)
            seconds = time.monotonic() - begin
            print(f"{wheel.name}: {wheel.stat().st_size >> 10:,} KiB; {loaded}; {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
