/* Included before every extension module (cflags): the limited API of Python 3.11, and what Cython imports for it.

   Under the limited API, Cython 3.3.1 (the newest) imports `inspect` in each extension, to ask it for the flags of
   code objects. It does so even if all of them are defined as here, and no directive or macro of Cython prevents it.
   `inspect` loads `ast`, `dis` and `tokenize` too, which takes a tenth of the start time of the command. Ctrl-C
   during that import is a crash, because the result is not checked. The flags are therefore defined here (they are
   the same in every Python: inspect, "Code Objects Bit Flags"), and PyImport_ImportModule is replaced, only in these
   extensions, by a function that imports `sys`, which is always loaded, instead of `inspect`. */
#ifndef IOBMD_LIMITED_H
#define IOBMD_LIMITED_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#define CO_OPTIMIZED 0x0001
#define CO_NEWLOCALS 0x0002
#define CO_VARARGS 0x0004
#define CO_VARKEYWORDS 0x0008
#define CO_GENERATOR 0x0020
#define CO_COROUTINE 0x0080
#define CO_ASYNC_GENERATOR 0x0200

/* Each extension therefore has a function that nothing calls. */
#pragma GCC diagnostic ignored "-Wunused-function"

#define PyImport_ImportModule(name) PyImport_ImportModule(strcmp((name), "inspect") ? (name) : "sys")

#endif
