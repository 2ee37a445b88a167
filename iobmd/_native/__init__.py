"""Compiled modules (sources in `cython_ext/`): thin system calls and hot loops, no policy."""
