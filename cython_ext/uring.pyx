# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Registered buffers of io_uring: the only long-term page pins that are available without a device.

A `Table` is a ring with its table of registered buffers, and a `Slot` is one pin in it. Slots are acquired and
released in C, between two bytecodes: no thread, signal handler or garbage collection can intervene, so that no pin is
leaked or released twice. A `Ring` is the descriptor of a ring.
"""

cimport cython
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport strerror
from posix.unistd cimport close

from io_uring cimport (
    iobmd_uring_register, iobmd_uring_setup, iobmd_uring_sparse, iobmd_uring_update,
)


cdef extern from "<pthread.h>" nogil:
    int pthread_atfork(void (*prepare)(), void (*parent)(), void (*child)())

cdef struct _Link:
    int number
    _Link *next

cdef _Link *_open_rings = NULL


cdef void _close_in_child() noexcept nogil:
    cdef _Link *link = _open_rings
    while link != NULL:
        if link.number >= 0:
            close(link.number)
        link.number = -1
        link = link.next


# Also in a child that C code forks without Python's knowledge. vfork(2), clone(2) and posix_spawn(3) call no
# handlers; their children call execve(2), which closes the rings.
pthread_atfork(NULL, NULL, _close_in_child)


@cython.final
@cython.no_gc
cdef class Ring:
    """The descriptor of a ring. A forked child closes its copy, which would keep the pins alive."""

    cdef _Link *_link

    def __cinit__(self, int number):
        """Own a descriptor, even if the constructor fails."""
        global _open_rings
        self._link = <_Link *>malloc(sizeof(_Link))
        if self._link == NULL:
            close(number)
            raise MemoryError()
        self._link.number, self._link.next = number, _open_rings
        _open_rings = self._link

    @property
    def number(self):
        """The number, -1 once it is closed."""
        return self._link.number

    def close(self):
        """Close this process's descriptor of the ring; the pins end when no process has one. Idempotent."""
        cdef int number = self._link.number
        self._link.number = -1
        if number >= 0:
            with nogil:
                close(number)

    def __dealloc__(self):
        global _open_rings
        cdef _Link *before = _open_rings
        if self._link == NULL:
            return
        if before == self._link:
            _open_rings = self._link.next
        else:
            while before.next != self._link:
                before = before.next
            before.next = self._link.next
        if self._link.number >= 0:
            close(self._link.number)
        free(self._link)


cdef int _check(int result, str call) except -1:
    if result < 0:
        raise OSError(errno, f"{call}: {strerror(errno).decode()}")
    return result


@cython.final
@cython.no_gc
cdef class Table:
    """A ring, and the free slots of its table."""

    cdef Ring _ring
    cdef readonly uint32_t slots
    cdef uint32_t *_free
    cdef uint32_t _count

    def __cinit__(self, uint32_t slots):
        """Create a ring with a sparse table (IORING_RSRC_REGISTER_SPARSE, Linux 5.19), or with one slot (5.1)."""
        cdef uint32_t slot
        cdef int result
        self.slots = slots
        self._free = <uint32_t *>malloc(slots * sizeof(uint32_t))
        if not self._free:
            raise MemoryError()
        for slot in range(slots):
            self._free[slot] = slots - 1 - slot
        self._count = slots
        with nogil:
            result = iobmd_uring_setup(1)
        self._ring = Ring(_check(result, "io_uring_setup"))
        cdef int ring = self._ring._link.number
        if slots > 1:
            with nogil:
                result = iobmd_uring_sparse(ring, slots)
            _check(result, "io_uring_register")

    @property
    def ring(self):
        """Its descriptor, -1 once it is closed."""
        return self._ring._link.number

    def pin(self, uint64_t address, size_t size):
        """Pin a range of up to 1 GiB; return its `Slot`, or None if no slot is free."""
        if not self._count:
            return None
        cdef Slot slot = Slot.__new__(Slot)
        cdef int result, ring = self._ring._link.number
        self._count -= 1
        slot._index = self._free[self._count]
        slot._table = self
        with nogil:
            if self.slots > 1:
                result = iobmd_uring_update(ring, slot._index, address, size)
            else:
                result = iobmd_uring_register(ring, address, size)
        if result < 0:
            self._give_back(slot)
        _check(result, "io_uring_register")
        return slot

    cdef void _give_back(self, Slot slot) noexcept:
        # errno belongs to the caller, which reports it.
        slot._table = None
        self._free[self._count] = slot._index
        self._count += 1

    def close(self):
        """Close the ring, as `Ring.close`."""
        self._ring.close()

    def __dealloc__(self):
        free(self._free)


@cython.final
@cython.no_gc
cdef class Slot:
    """One pin, which ends with `release`, or with this object."""

    cdef Table _table
    cdef uint32_t _index

    def release(self):
        """Unpin; idempotent. Does nothing if the table is closed (in a forked child)."""
        cdef Table table = self._table
        cdef int ring
        self._table = None
        if table is None or table._ring._link.number < 0:
            return
        if table.slots == 1:
            table.close()
            return
        ring = table._ring._link.number
        with nogil:
            iobmd_uring_update(ring, self._index, 0, 0)
        self._table = table
        table._give_back(self)

    def __dealloc__(self):
        if self._table is not None:
            self.release()
