"""Compiled modules (sources in `cython_ext/`): thin system calls and hot loops, no policy."""

# The modules import it as they are loaded, and crash when that is interrupted (Cython 3.3 in the limited API).
import inspect  # noqa: F401
