"""Tools that stand on the package: benchmarks, the pagemap inspector, the soak test. Installed as `iobmd.tools`.

Importing it adds their commands to those of `iobmd.cli`, which stands below and names none of them.
"""

from iobmd.cli import COMMANDS

COMMANDS.update(
    {
        "pagemap": ("iobmd.tools.pagemap", "show where a process's memory lies: frames, huge pages, swap, locks"),
        "bench": ("iobmd.tools.bench", "measure iobmd against the bare kernel calls"),
        "soak": ("iobmd.tools.soak", "use everything at once for a while, and check each event against the kernel"),
    }
)
