"""Memory of this process: locking, pinning, populating, NUMA nodes, shared objects."""
