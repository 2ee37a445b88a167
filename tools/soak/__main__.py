"""`python -m iobmd.tools.soak`: the same as `iobmd soak`."""

import sys

from iobmd.cli import main

if __name__ == "__main__":
    sys.exit(main(["soak", *sys.argv[1:]]))
