"""Memory of this process: locked, pinned, faulted in, of a NUMA node, shared with others."""
