BEST: int
CLFLUSH: int
CLFLUSHOPT: int
CLWB: int
DC: int
LINE_SIZE: int
NONE: int
