"""System calls inside another task, for which it is stopped a moment (ptrace(2), by the extra `remote`)."""
