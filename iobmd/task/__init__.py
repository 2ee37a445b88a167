"""Processes as memory has them: `Task`, the copy engine, and why access to a task failed."""
