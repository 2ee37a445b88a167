"""Search for physically contiguous, aligned or masked memory."""
