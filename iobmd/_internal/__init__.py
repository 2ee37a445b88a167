"""Shared mechanisms: process-local resources, chunked work, weak registries, atomic files, pid namespaces."""
