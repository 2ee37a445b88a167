# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Running a function apart: in an OS thread of its own, and there in a process of its own that shares everything.

What the kernel ties to a process, the traced threads of ptrace(2) and the reports of their stops, are then nothing of
ours: no wait of another thread sees them. If this process is killed, what is under way is still finished, unless one
of our threads had the GIL at that moment.
"""

from cpython.ref cimport PyObject

from _thread import start_new_thread

from apart cimport iobmd_run_apart

cdef extern from "Python.h":
    ctypedef void *PyThread_type_lock
    PyThread_type_lock PyThread_allocate_lock()
    void PyThread_free_lock(PyThread_type_lock lock) nogil
    int PyThread_acquire_lock(PyThread_type_lock lock, int wait) nogil
    void PyThread_release_lock(PyThread_type_lock lock) nogil
    int PyGC_Disable()
    int PyGC_Enable()
    void Py_FatalError(const char *message)


class NoThreadError(Exception):
    """No thread is to be had."""


cdef class _Job:
    """What is to be done, what came of it, and a lock that is free when it is over."""

    cdef PyThread_type_lock over
    cdef object body
    cdef object result
    cdef object error

    def __cinit__(self, body):
        self.body = body
        self.over = PyThread_allocate_lock()
        if not self.over:
            raise MemoryError()
        PyThread_acquire_lock(self.over, 1)

    def __dealloc__(self):
        PyThread_free_lock(self.over)


cdef void _do(void *argument) noexcept:
    cdef _Job job = <_Job><PyObject *>argument
    # Garbage of the program must not be collected here: its finalizers may ask which process they are in.
    cdef int collected = PyGC_Disable()
    try:
        job.result = job.body()
    except BaseException as error:
        job.error = error
    if collected:
        PyGC_Enable()


def _run(_Job job, bint in_process):
    cdef int failed = 1
    if in_process:
        failed = iobmd_run_apart(<void *>_do, <void *><PyObject *>job)
        if failed < 0:  # whether it had the GIL nobody knows
            Py_FatalError("the process that traces another for iobmd was killed")
    if failed:
        _do(<void *><PyObject *>job)
    PyThread_release_lock(job.over)


def run_apart(body, bint in_process):
    """Return what `body` does, apart; with `in_process` in a process of its own, where one is to be had.

    Signals that come meanwhile are handled afterwards: whoever calls this never goes on before `body` is over. Raises
    NoThreadError.
    """
    cdef _Job job = _Job(body)
    try:
        start_new_thread(_run, (job, in_process))
    except RuntimeError as error:
        raise NoThreadError(str(error)) from None
    with nogil:
        PyThread_acquire_lock(job.over, 1)
    if job.error is not None:
        raise job.error
    return job.result
