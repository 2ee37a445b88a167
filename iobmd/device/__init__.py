"""Devices: their memory, as ranges of files that can be mapped, and their interrupts."""
