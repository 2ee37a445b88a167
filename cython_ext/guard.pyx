# cython: language_level=3, auto_pickle=False, autotestdict=False
"""A lock that is taken and given back in C: no signal handler comes between, and no fork carries it over."""

from _thread import allocate_lock

cdef extern from "<pthread.h>" nogil:
    int pthread_atfork(void (*prepare)(), void (*parent)(), void (*child)())

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident()

cdef int _generation = 1


cdef void _forked() noexcept nogil:
    global _generation
    _generation += 1


pthread_atfork(NULL, NULL, _forked)


def generation():
    """Return a number that is another one in a forked child, whatever its pid."""
    return _generation


cdef class Guard:
    """Keeps other threads out of a `with`. Entering it again from inside, as a signal handler may, calls `reentered`.

    In a forked child it is free, whoever of the parent held it.
    """

    cdef object _lock
    cdef unsigned long _owner
    cdef int _made_in

    def __cinit__(self):
        self._renew()

    cdef _renew(self):
        self._lock = allocate_lock()
        self._owner = 0
        self._made_in = _generation

    @property
    def mine(self):
        """Whether this thread is inside."""
        return self._made_in == _generation and self._owner == PyThread_get_thread_ident()

    def reentered(self):
        """Raise what tells that it is entered already by this thread."""
        raise RuntimeError("entered again by the thread that is inside")

    def enter(self):
        """Enter it, to be left by `leave`; returns True."""
        if self.mine:
            self.reentered()
        if self._made_in != _generation:
            self._renew()
        self._lock.acquire()
        self._owner = PyThread_get_thread_ident()
        return True

    def __enter__(self):
        self.enter()

    def enter_if_free(self):
        """Enter it unless somebody is inside; returns whether it was entered, and is then to be left by `leave`."""
        if self._made_in != _generation:
            self._renew()
        if not self._lock.acquire(False):
            return False
        self._owner = PyThread_get_thread_ident()
        return True

    def leave(self):
        """Let others in; nothing where this thread is not inside."""
        if self.mine:
            self._owner = 0
            self._lock.release()

    def __exit__(self, *_error):
        self.leave()
