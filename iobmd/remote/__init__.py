"""System calls in another task, which is stopped briefly for them (ptrace(2))."""
