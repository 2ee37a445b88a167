"""vmtouch: how much of files is in the page cache, and which parts.

Before: `vmtouch -v FILE...`, which maps the files and calls mincore(2).
"""

import sys

from iobmd import pagemap

for path in sys.argv[1:]:
    cache = pagemap.file_cache(path, parts=40)
    parts = "".join("O" if part else " " for part in cache.parts)
    print(f"{cache.cached >> 10:8} KiB {cache.share:5.0%}  [{parts}]  {path}")
