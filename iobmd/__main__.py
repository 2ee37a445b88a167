"""`python -m iobmd`."""

import importlib
import sys

from iobmd.cli import main

if __name__ == "__main__":
    importlib.import_module("iobmd.tools")  # adds its commands
    sys.exit(main())
