"""Tools built on the package: benchmarks, the pagemap inspector, the soak test. Installed as `iobmd.tools`.

Importing this package adds its commands to those of `iobmd.cli`, which may not import it.
"""

from iobmd.cli import COMMANDS

COMMANDS.update(
    {
        "pagemap": ("iobmd.tools.pagemap", "show the memory layout of a process: frames, huge pages, swap, locks"),
        "bench": ("iobmd.tools.bench", "compare iobmd with the bare system calls"),
        "soak": ("iobmd.tools.soak", "run all operations concurrently, and check the results"),
    }
)
