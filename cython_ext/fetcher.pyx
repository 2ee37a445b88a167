# cython: language_level=3, auto_pickle=False, autotestdict=False
"""The thread that fetches the contents of a lazy copy (`fetcher.h`)."""

cimport cython
from libc.errno cimport errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport strerror, strncpy
from posix.unistd cimport _SC_PAGESIZE, sysconf

from fetcher cimport (
    IOBMD_BEGINNING, IOBMD_COMPLETE, IOBMD_FETCHING, IOBMD_LOST, IOBMD_REFUSED, IOBMD_STOPPED, iobmd_fetcher,
    iobmd_fetcher_free, iobmd_fetcher_lost, iobmd_fetcher_new, iobmd_fetcher_require, iobmd_fetcher_start,
    iobmd_fetcher_stop, iobmd_fetcher_wait,
)

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef extern from "<pthread.h>" nogil:
    int pthread_atfork(void (*prepare)(), void (*parent)(), void (*child)())

cdef size_t PAGE_SIZE = sysconf(_SC_PAGESIZE)
cdef int SLICE = 50  # milliseconds after which signals are handled
cdef int _generation = 1

FETCHING, COMPLETE, LOST, REFUSED, STOPPED = (
    IOBMD_FETCHING, IOBMD_COMPLETE, IOBMD_LOST, IOBMD_REFUSED, IOBMD_STOPPED
)


cdef void _forked() noexcept nogil:
    global _generation
    _generation += 1


pthread_atfork(NULL, NULL, _forked)


@cython.final
@cython.no_gc
cdef class Fetcher:
    """A thread that fetches the contents of memory as of the moment of `start`, and serves its page faults.

    Parameters
    ----------
    mapping
        The object that owns the destination, which must remain mapped until `stop`.
    destination, size
        Whole pages of private anonymous memory, all absent.
    source
        The address in the snapshot.
    snapshot
        The process with the contents; 0: a child of this process, which the thread creates.
    directory
        The directory of that process in /proc; ignored without one.
    samples
        Numbers of pages that exist in the source. A snapshot without one of them is refused (`ENODATA`).
    moves
        Whether the kernel has transparent huge pages, in which blocks are moved to the destination.
    """

    cdef iobmd_fetcher *_fetcher
    cdef uint64_t *_samples
    cdef object _mapping
    cdef uint64_t _destination
    cdef int _made_in
    cdef bint _runs

    def __cinit__(self, mapping, uint64_t destination, size_t size, uint64_t source, int snapshot=0,
                  bytes directory=b"", samples=(), bint moves=True):
        cdef size_t index
        if not size or size % PAGE_SIZE or destination % PAGE_SIZE:
            raise ValueError("not whole pages")
        self._fetcher = iobmd_fetcher_new(size, PAGE_SIZE)
        if self._fetcher == NULL:
            raise OSError(errno, f"mmap: {strerror(errno).decode()}")
        self._samples = <uint64_t *>calloc(len(samples) + 1, sizeof(uint64_t))
        if self._samples == NULL:
            raise MemoryError()
        for index, number in enumerate(samples):
            self._samples[index] = number
        self._fetcher.samples, self._fetcher.samples_count = self._samples, len(samples)
        self._mapping = mapping
        self._destination = destination
        self._made_in = _generation
        self._fetcher.destination = <char *>destination
        self._fetcher.source, self._fetcher.snapshot, self._fetcher.moves = source, snapshot, moves
        strncpy(self._fetcher.directory, directory, 31)

    def start(self):
        """Start the thread and wait until it serves faults, or has copied all because it cannot serve them.

        Raises
        ------
        OSError
            No thread can be created.
        """
        cdef int state = IOBMD_BEGINNING
        cdef int error = iobmd_fetcher_start(self._fetcher)
        if error:
            raise OSError(error, f"pthread_create: {strerror(error).decode()}")
        self._runs = True
        while state == IOBMD_BEGINNING:
            with nogil:
                state = iobmd_fetcher_wait(self._fetcher, IOBMD_BEGINNING, SLICE)
            PyErr_CheckSignals()

    @property
    def state(self):
        """`FETCHING`, `COMPLETE`, `LOST`: the snapshot ended early, `REFUSED`: see `error`, or `STOPPED`."""
        return self._fetcher.state

    @property
    def error(self):
        """The error number with which the thread refused."""
        return self._fetcher.error

    @property
    def is_lazy(self):
        """Whether page faults are served. If not, all was copied by `start`."""
        return bool(self._fetcher.is_lazy)

    @property
    def serves_kernel(self):
        """Whether page faults of system calls are served too. If not, these fail."""
        return bool(self._fetcher.serves_kernel)

    @property
    def snapshot(self):
        """The process with the contents."""
        return self._fetcher.snapshot

    @property
    def snapshot_ns(self):
        """The duration of the clone(2) of this process, in nanoseconds."""
        return self._fetcher.snapshot_ns

    @property
    def tid(self):
        """The id of the thread."""
        return self._fetcher.tid

    @property
    def fetched(self):
        """The number of bytes whose contents no longer need the snapshot."""
        return (self._fetcher.done_pages - self._fetcher.lost_pages) * PAGE_SIZE

    @property
    def is_inherited(self):
        """Whether this process is a forked child, which has no such thread."""
        return self._made_in != _generation

    def wait(self):
        """Wait until the thread has ended; return its state."""
        cdef int state = IOBMD_FETCHING
        while state <= IOBMD_FETCHING and not self.is_inherited:
            with nogil:
                state = iobmd_fetcher_wait(self._fetcher, IOBMD_FETCHING, SLICE)
            PyErr_CheckSignals()
        return state

    def require(self, size_t offset, size_t length):
        """Wait until a range of bytes is fetched; return the first address that was lost, or None."""
        cdef size_t first = offset // PAGE_SIZE, last = (offset + length + PAGE_SIZE - 1) // PAGE_SIZE, lost
        cdef int done = not length
        if last > self._fetcher.pages or last < first:
            raise ValueError("range past the end of the mapping")
        while not done and not self.is_inherited:
            with nogil:
                done = iobmd_fetcher_require(self._fetcher, first, last, SLICE)
            PyErr_CheckSignals()
        lost = iobmd_fetcher_lost(self._fetcher, first, last) if length else last
        return self._destination + lost * PAGE_SIZE if lost < last else None

    def stop(self):
        """End the thread, and the child of this process; idempotent. Missing pages then read as zeros."""
        if self._runs and not self.is_inherited:
            self._runs = False
            with nogil:
                iobmd_fetcher_stop(self._fetcher)
        self._mapping = None

    def __dealloc__(self):
        if self._fetcher != NULL:
            if self._runs and self._made_in == _generation:
                iobmd_fetcher_stop(self._fetcher)
            iobmd_fetcher_free(self._fetcher)
        free(self._samples)
