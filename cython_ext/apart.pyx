# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Running a function apart: in an OS thread of its own, and there in a process of its own that shares everything.

What the kernel ties to a process, the traced threads of ptrace(2) and the reports of their stops, are then nothing of
ours: no wait of another thread sees them. If this process is killed, what is under way is still finished, unless one
of our threads had the GIL at that moment.
"""

from cpython.ref cimport PyObject

from _thread import start_new_thread

from apart cimport (
    iobmd_exit, iobmd_interrupted, iobmd_order, iobmd_orphan, iobmd_prolong, iobmd_run_apart, iobmd_set_current,
    iobmd_shield,
)
from libc.errno cimport errno
from libc.string cimport strerror
from orphan cimport (
    iobmd_janitor, iobmd_janitor_end, iobmd_janitor_start, iobmd_leftover, iobmd_take_away,
)

cdef extern from "Python.h":
    ctypedef void *PyThread_type_lock
    ctypedef enum PyLockStatus:
        PY_LOCK_ACQUIRED
    PyThread_type_lock PyThread_allocate_lock()
    void PyThread_free_lock(PyThread_type_lock lock) nogil
    int PyThread_acquire_lock(PyThread_type_lock lock, int wait) nogil
    PyLockStatus PyThread_acquire_lock_timed(PyThread_type_lock lock, long long microseconds, int intr_flag) nogil
    void PyThread_release_lock(PyThread_type_lock lock) nogil
    int PyErr_CheckSignals() except -1
    int PyGC_Disable()
    int PyGC_Enable()
    void Py_FatalError(const char *message)


class NoThreadError(Exception):
    """No thread can be started."""


cdef class Job:
    """A function that is run apart: from `run`, or between `start` and `finish`, with a part in which it holds on."""

    cdef PyThread_type_lock over
    """Free when it is over."""
    cdef PyThread_type_lock held
    """Free when it holds on, or is over."""
    cdef PyThread_type_lock through
    """Free when it need not hold on any more."""
    cdef bint holds
    cdef iobmd_order order
    cdef object body
    cdef object result
    cdef object error

    def __cinit__(self, body):
        self.body = body
        self.order.cancelled = self.order.shielded = 0
        self.over = PyThread_allocate_lock()
        self.held = PyThread_allocate_lock()
        self.through = PyThread_allocate_lock()
        if not (self.over and self.held and self.through):
            raise MemoryError()
        PyThread_acquire_lock(self.held, 1)
        PyThread_acquire_lock(self.through, 1)

    def __dealloc__(self):
        if self.over:
            PyThread_free_lock(self.over)
        if self.held:
            PyThread_free_lock(self.held)
        if self.through:
            PyThread_free_lock(self.through)

    def cancel(self):
        """Cancel its waits: `interrupted` is true there from now on."""
        self.order.cancelled = 1

    cdef _begin(self, bint in_process):
        PyThread_acquire_lock(self.over, 1)
        try:
            start_new_thread(_run, (self, in_process))
        except RuntimeError as error:
            PyThread_release_lock(self.over)
            raise NoThreadError(str(error)) from None

    def run(self, bint in_process):
        """Return what the function returned, or raise what it raised; in a process of its own if possible.

        Signals are handled during that. When a handler raises, as that of Ctrl-C does, the job is cancelled, and the
        exception goes on when the job is over: its caller never goes on before. Raises NoThreadError.
        """
        self._begin(in_process)
        self._wait_for(self.over)
        return self._outcome()

    def start(self, bint in_process):
        """Begin it as `run`, and return when it holds on, True, or is over, False."""
        self._begin(in_process)
        self._wait_for(self.held)
        return self.holds

    def finish(self):
        """End what it holds, and return or raise as `run` when it is over; to be called once."""
        with nogil:  # it goes on at once, and needs the GIL even if this process is killed here
            PyThread_release_lock(self.through)
        self._wait_for(self.over)
        return self._outcome()

    cdef _wait_for(self, PyThread_type_lock lock):
        # Woken by signals only, not by a clock: this process may be killed at any moment, and the job ends as it
        # should only if no thread holds the GIL then.
        cdef PyLockStatus got
        with nogil:
            got = PyThread_acquire_lock_timed(lock, -1, 1)
        try:
            while got != PY_LOCK_ACQUIRED:
                PyErr_CheckSignals()
                with nogil:
                    got = PyThread_acquire_lock_timed(lock, -1, 1)
        except BaseException:
            self.cancel()
            with nogil:
                PyThread_acquire_lock(lock, 1)
            raise
        finally:
            PyThread_release_lock(lock)

    cdef _outcome(self):
        self.body = None  # which may refer to this
        if self.error is not None:
            raise self.error
        return self.result


cdef void _do(void *argument) noexcept:
    cdef Job job = <Job><PyObject *>argument
    iobmd_set_current(&job.order)
    # Garbage of the program must not be collected here: its finalizers may ask which process they are in.
    cdef int collected = PyGC_Disable()
    try:
        job.result = job.body()
    except BaseException as error:
        job.error = error
    if collected:
        PyGC_Enable()
    iobmd_set_current(NULL)


def _run(Job job, bint in_process):
    cdef int failed = 1
    if in_process:
        failed = iobmd_run_apart(<void *>_do, <void *><PyObject *>job)
        if failed < 0:  # whether it had the GIL cannot be known
            Py_FatalError("the process that traces another for iobmd was killed")
    if failed:
        _do(<void *><PyObject *>job)
    if not job.holds:
        PyThread_release_lock(job.held)
    PyThread_release_lock(job.over)


def hold(Job job, leftover):
    """Return, in the job, when its caller is through, or it is cancelled.

    If this process is killed during that, whichever thread holds the GIL, the remains in the other task are
    taken away without Python: `leftover` is the task, its pidfd or -1, a process made by a guest, the guest, its
    number there, the address of a system call instruction, and the options to trace the task with.
    """
    cdef iobmd_leftover left
    left.task, left.pidfd, left.child, left.guest, left.guest_there, left.instruction, left.options = leftover
    job.holds = True
    PyThread_release_lock(job.held)
    with nogil:
        while PyThread_acquire_lock_timed(job.through, 50000, 0) != PY_LOCK_ACQUIRED:
            if iobmd_orphan():
                iobmd_take_away(&left)
                iobmd_exit()
            if iobmd_interrupted():
                break


cdef class Janitor:
    """Has a task wait for a guest, as `hold` does, if this process is killed between `watch` and `end`.

    To be used by one OS thread. Raises OSError where no process can be made.
    """

    cdef iobmd_janitor *janitor

    def __cinit__(self):
        self.janitor = iobmd_janitor_start()
        if self.janitor == NULL:
            raise OSError(errno, f"clone: {strerror(errno).decode()}")

    def watch(self, leftover):
        """Begin; `leftover` is as for `hold`."""
        cdef iobmd_leftover left
        left.task, left.pidfd, left.child, left.guest, left.guest_there, left.instruction, left.options = leftover
        self.janitor.left = left

    def end(self):
        """End it; idempotent."""
        cdef iobmd_janitor *janitor = self.janitor
        self.janitor = NULL
        if janitor != NULL:
            with nogil:
                iobmd_janitor_end(janitor)

    def __dealloc__(self):
        if self.janitor != NULL:
            iobmd_janitor_end(self.janitor)


def prolong():
    """Have the full time once more, if this process was killed: no thread that is stopped must be left in between."""
    iobmd_prolong()


def interrupted():
    """Say whether what waits in the job of this thread is to give up: it is cancelled, or our process was killed."""
    return bool(iobmd_interrupted())


def shield(int more):
    """Make `interrupted` false in the job of this thread (1), for steps that must not be skipped; -1 ends that."""
    iobmd_shield(more)
