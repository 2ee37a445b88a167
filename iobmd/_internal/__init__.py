"""Mechanisms below every subject: what a fork does not inherit, work in chunks, weak references, files."""
