"""Where the `iobmd` command begins.

A package beside `iobmd`, for it is loaded first: its being there tells `iobmd` to leave the library unloaded. A
command needs a third of it, and most of a short one's time was to load the rest.
"""


def main() -> int:
    """Run the command line of this process and return its exit code."""
    from iobmd.cli import main as run  # noqa: PLC0415 (not before this module is there)

    return run()
