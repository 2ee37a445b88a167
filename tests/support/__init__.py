"""Helpers of the tests: other processes to inspect, independent readers of the kernel's files, requirements."""
