"""Entry point of the `iobmd` command.

This is a separate package because it is imported first: if it is in `sys.modules`, `import iobmd` does not load the
whole library. A command needs a third of it, and loading the rest was most of the duration of a short command.
"""

import gc
import importlib


def main() -> int:
    """Run the command line of this process and return its exit code."""
    gc.set_threshold(20_000)  # modules are never garbage: collecting during imports took a fifth of the time
    importlib.import_module("iobmd.tools")  # registers its commands

    from iobmd.cli import main as run  # noqa: PLC0415 (after this module is in sys.modules)

    try:
        return run()
    finally:
        gc.freeze()  # no collection at exit either
