"""IOKit's classes of memory: descriptors, their mappings, and the memory they stand for."""
