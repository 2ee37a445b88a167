"""IOKit's classes: memory descriptors, their maps, and the memory that they represent."""
