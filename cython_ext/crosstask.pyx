# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Copies between this process and a task, with the GIL released: process_vm_readv and /proc/PID/mem."""

from libc.errno cimport EFAULT, EINTR, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport strerror
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize

from mman cimport C_MADV_POPULATE_WRITE, c_madvise
from uio cimport SYS_pidfd_getfd, iovec, pread, process_vm_readv, process_vm_writev, pwrite, syscall

# process_vm_readv moves at most 0x7ffff000 bytes a call; smaller pieces let a dying task be seen sooner.
cdef size_t LARGEST_PIECE = 64 << 20


cdef ssize_t _piece(int pid, int fd, bint write, uint64_t theirs, uint64_t ours, size_t size) noexcept nogil:
    cdef iovec local, remote
    if fd >= 0:
        if write:
            return pwrite(fd, <void *><uintptr_t>ours, size, <long>theirs)
        return pread(fd, <void *><uintptr_t>ours, size, <long>theirs)
    local.iov_base = <void *><uintptr_t>ours
    remote.iov_base = <void *><uintptr_t>theirs
    local.iov_len = remote.iov_len = size
    if write:
        return process_vm_writev(pid, &local, 1, &remote, 1, 0)
    return process_vm_readv(pid, &local, 1, &remote, 1, 0)


cdef size_t _move(int pid, int fd, bint write, uint64_t theirs, uint64_t ours, size_t size,
                  size_t huge, size_t page, int *error) noexcept nogil:
    cdef size_t done = 0, piece
    cdef ssize_t moved
    error[0] = 0
    while done < size:
        piece = min(size - done, LARGEST_PIECE)
        if huge:
            # Up to the next huge-page boundary, whose huge page is faulted in by its LAST base page: the
            # kernel clears a huge page so that the touched end comes last, and clearing upwards is a third
            # faster here than clearing downwards (measured, Linux 6.18). A refusal (before 5.14, or no huge
            # page) does no harm: the copy then faults the pages in.
            piece = min(size - done, huge - (ours + done) % huge)
            if piece == huge:
                c_madvise(<void *><uintptr_t>(ours + done + huge - page), page, C_MADV_POPULATE_WRITE)
        moved = _piece(pid, fd, write, theirs + done, ours + done, piece)
        if moved > 0:
            done += moved
        elif moved == 0:
            break
        elif errno != EINTR:
            error[0] = errno
            break
    return done


def read(int pid, int fd, uint64_t source, uint64_t destination, size_t size, size_t huge, size_t page):
    """Copy `size` bytes at `source` of the task to the address `destination` here.

    Parameters
    ----------
    pid, fd
        The task for process_vm_readv or, when `fd` is not negative, its open /proc/PID/mem.
    huge
        Size of the huge pages that the fresh destination may get, 0 when it is not fresh: huge pages are
        then faulted in ahead of the copy.
    page
        The base page size.

    Returns
    -------
    tuple[int, int]
        Bytes copied, and the error number that ended the copy (0: none; short then means end of file).
    """
    cdef int error
    cdef size_t done
    with nogil:
        done = _move(pid, fd, False, source, destination, size, huge, page, &error)
    return done, error


def write(int pid, int fd, uint64_t destination, uint64_t source, size_t size):
    """Copy `size` bytes at the address `source` here to `destination` of the task; as `read`."""
    cdef int error
    cdef size_t done
    with nogil:
        done = _move(pid, fd, True, destination, source, size, 0, 0, &error)
    return done, error


def fresh_bytes(Py_ssize_t size):
    """Return `size` bytes of arbitrary content, for the caller to fill before anybody else sees them."""
    return PyBytes_FromStringAndSize(NULL, size)


cdef class HeldBuffer:
    """The address and size of an object's buffer; the object keeps it in place until `with` is left."""

    cdef Py_buffer view
    cdef bint held
    cdef readonly uint64_t address
    cdef readonly size_t size

    def __cinit__(self, obj, bint writable):
        PyObject_GetBuffer(obj, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.held = True
        self.address = <uintptr_t>self.view.buf
        self.size = self.view.len

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._release()

    cdef _release(self):
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


def fetch_descriptor(int pidfd, int fd):
    """Return a descriptor of this process for what `fd` is in another (pidfd_getfd(2), Linux 5.6)."""
    cdef long fetched
    with nogil:
        fetched = syscall(SYS_pidfd_getfd, pidfd, fd, 0)
    if fetched < 0:
        raise OSError(errno, f"pidfd_getfd: {strerror(errno).decode()}")
    return fetched


def touch(int pid, uint64_t address, size_t size, size_t page):
    """Have another process's pages faulted in for reading, by a byte of each; returns the error number or 0."""
    cdef char byte[512]
    cdef iovec local, remote[512]
    cdef size_t done = 0
    cdef int count
    cdef ssize_t moved
    cdef int error = 0
    with nogil:
        while done < size and not error:
            count = 0
            while count < 512 and done < size:
                remote[count].iov_base = <void *><uintptr_t>(address + done)
                remote[count].iov_len = 1
                done += page
                count += 1
            local.iov_base = byte
            local.iov_len = count
            moved = process_vm_readv(pid, &local, 1, remote, count, 0)
            if moved < count:
                error = errno if moved < 0 else EFAULT
    return error
