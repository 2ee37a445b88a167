"""Processes and access to their memory: `Task`, the copy engine, and the causes of failed access."""
