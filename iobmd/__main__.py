"""`python -m iobmd`."""

import sys

from iobmd.cli import main

if __name__ == "__main__":
    sys.exit(main())
