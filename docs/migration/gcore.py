"""gcore: a core file of a running process, for debuggers.

Before: `gcore -o core PID`, which stops the process until gdb has written all of its memory. The command `iobmd core`
does the same as this program.
"""

import sys

import iobmd

pid, path = int(sys.argv[1]), sys.argv[2]
with iobmd.snapshot(pid) as snapshot:
    written = snapshot.core(path)
print(f"{written.written} bytes, stopped for {snapshot.stopped_ns / 1e6:.2f} ms; threads: {written.threads}")
