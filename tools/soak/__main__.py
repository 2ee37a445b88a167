"""`python -m iobmd.tools.soak`: the same as `iobmd soak`."""

import sys

from iobmd.cli import main

sys.exit(main(["soak", *sys.argv[1:]]))
