"""Physically contiguous, aligned or masked memory: found, put in order, and the rest given back."""
