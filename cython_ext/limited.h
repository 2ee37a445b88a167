/* Comes before every extension module: the limited API of Python 3.11, and what Cython imports for it.

   Cython 3.3 asks `inspect` for the flags of code objects, which loads `ast`, `dis` and `tokenize` too: a tenth of the
   time in which the command starts; and Ctrl-C meanwhile is a crash, for it takes the module without a look. The flags
   are the same in every Python (inspect, "Code Objects Bit Flags"): they are given here, and what is imported in place
   of the module is always there. */
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

/* So it has a function that nothing calls. */
#pragma GCC diagnostic ignored "-Wunused-function"

#define PyImport_ImportModule(name) PyImport_ImportModule(strcmp((name), "inspect") ? (name) : "sys")

#endif
