"""Where the `iobmd` command begins.

A package beside `iobmd`, for it is loaded first: its being there tells `iobmd` to leave the library unloaded. A
command needs a third of it, and most of a short one's time was to load the rest.
"""

import gc
import importlib


def main() -> int:
    """Run the command line of this process and return its exit code."""
    gc.set_threshold(20_000)  # what is loaded stays: looking through it for garbage took a fifth of the time
    importlib.import_module("iobmd.tools")  # adds its commands

    from iobmd.cli import main as run  # noqa: PLC0415 (not before this module is there)

    try:
        return run()
    finally:
        gc.freeze()  # nor is it looked through at the end
