# Locks and uses of file descriptors. They begin and end in C, so that no signal handler intervenes, and a fork does
# not preserve them.

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
    """Return a number that differs in a forked child, whatever its pid."""
    return _generation


cdef class Guard:
    """A lock for a `with` block. Entering it again from inside, as a signal handler may, calls `reentered`.

    In a forked child it is unlocked, even if a thread of the parent held it.
    """

    cdef object _lock
    cdef unsigned long _owner
    cdef int _made_in
    cdef list _deferred

    def __cinit__(self):
        self._deferred = []
        self._renew()

    cdef _renew(self):
        self._lock = allocate_lock()
        self._owner = 0
        self._made_in = _generation

    cdef bint _is_mine(self) noexcept:
        return self._made_in == _generation and self._owner == PyThread_get_thread_ident()

    @property
    def mine(self):
        """Whether this thread is inside."""
        return self._is_mine()

    def reentered(self):
        """Raise the error for a reentry by this thread."""
        raise RuntimeError("entered again by the thread that is inside")

    def enter(self):
        """Enter it, until `leave`; return True. Deferred actions are called first."""
        self._enter()
        return True

    cdef int _enter(self) except -1:
        if self._is_mine():
            self.reentered()
        if self._made_in != _generation:
            self._renew()
        self._lock.acquire()
        self._owner = PyThread_get_thread_ident()
        if self._deferred:
            self._call_all_deferred()
        return 0

    def __enter__(self):
        self._enter()

    def enter_if_free(self):
        """Enter it unless a thread is inside; return whether it was entered, and must be left by `leave`."""
        if self._made_in != _generation:
            self._renew()
        if not self._lock.acquire(False):
            return False
        self._owner = PyThread_get_thread_ident()
        return True

    def leave(self):
        """Leave it, and call the actions that were deferred; does nothing if this thread is not inside."""
        self._leave()

    cdef int _leave(self) except -1:
        if self._is_mine():
            self._release()
            if self._deferred:
                self._call_deferred()
        return 0

    def __exit__(self, *_error):
        self._leave()

    def when_free(self, action):
        """Call `action` from inside, without waiting: now, or as soon as the thread that is inside leaves.

        For destructors, which may interrupt any thread, including the one that is inside.
        """
        self._deferred.append(action)
        self._call_deferred()

    cdef void _release(self):
        self._owner = 0
        self._lock.release()

    cdef _call_deferred(self):
        # Repeatedly, because threads that deferred an action while this one was inside rely on it.
        while self._deferred and self.enter_if_free():
            try:
                self._call_each()
            finally:
                self._release()

    cdef _call_all_deferred(self):
        try:
            self._call_each()
        except BaseException:  # of a signal handler: the block is not entered
            self._release()
            raise

    cdef _call_each(self):
        cdef object action
        while self._deferred:
            action = self._deferred.pop()
            try:
                action()
            except Exception as error:  # it concerns the object that deferred it, not the thread that is inside
                PyErr_SetObject(type(error), error)
                PyErr_WriteUnraisable(action)


cdef class Fd:
    """A file descriptor that several threads use: `close` waits for its users, so that its number is not reused.

    The kernel assigns the lowest free number. A thread that read the number before another one closed it could write
    to the next file that is opened.
    """

    cdef readonly str what
    """A description, for the error of its use after `close`."""
    cdef int _number
    cdef bint _closed
    cdef unsigned int _users
    cdef int _counted_in

    def __cinit__(self, int number, str what):
        self._number = number
        self.what = what
        self._counted_in = _generation

    def refuse(self):
        """Raise the error for a descriptor that is closed."""
        raise ValueError(f"{self.what} is closed")

    @property
    def closed(self):
        """Whether `close` was called."""
        return self._closed

    def fileno(self):
        """Return the number, which another thread may close unless the caller prevents that. Raises as `use`."""
        if self._closed:
            self.refuse()
        return self._number

    def use(self):
        """Return a context manager that yields the number, which remains open until its end. Raises as `refuse`."""
        cdef Use use
        if self._closed:
            self.refuse()
        if self._counted_in != _generation:  # the other users are threads of the parent
            self._users, self._counted_in = 0, _generation
        use = Use.__new__(Use)
        use._fd = self
        use._counted_in = _generation
        self._users += 1
        return use

    def close(self):
        """Close it at the end of the last use; idempotent."""
        self._closed = True
        if not self._users or self._counted_in != _generation:
            self._shut()

    cdef void _shut(self) noexcept:
        cdef int number = self._number
        self._number = -1
        if number >= 0:
            with nogil:
                close(number)

    def __dealloc__(self):
        if self._number >= 0:
            close(self._number)


cdef class Use:
    """One use of a descriptor: from `Fd.use` to the end of `with`, or of this object."""

    cdef Fd _fd
    cdef int _counted_in

    def __enter__(self):
        return self._fd._number

    def __exit__(self, *_error):
        self._end()

    cdef void _end(self) noexcept:
        cdef Fd fd = self._fd
        self._fd = None
        if fd is None or self._counted_in != fd._counted_in:
            return
        fd._users -= 1
        if not fd._users and fd._closed:
            fd._shut()

    def __dealloc__(self):
        # An interrupt occurred before the `with` block.
        if self._fd is not None:
            self._end()
