# cython: language_level=3, auto_pickle=False, autotestdict=False
"""A mapping of this process that is unmapped exactly once, and its export by the buffer protocol; cache line
instructions; locks and uses of file descriptors, which a fork does not preserve."""

from _thread import allocate_lock

cimport cython
from libc.errno cimport EEXIST, EFAULT, EINTR, EINVAL, errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memset, strerror
from posix.unistd cimport _SC_PAGESIZE, close, getpid, sysconf
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetObject, PyErr_WriteUnraisable
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF, PyObject

from cacheline cimport (
    IOBMD_CLFLUSH, IOBMD_CLFLUSHOPT, IOBMD_CLWB, IOBMD_DC, IOBMD_INHIBIT, IOBMD_NONE, IOBMD_WRITE_COMBINE,
    IOBMD_WRITE_THROUGH, iobmd_best, iobmd_copy, iobmd_drop, iobmd_line,
    iobmd_lines, iobmd_write_back,
)
from device_access cimport (
    iobmd_copy_from_device, iobmd_copy_to_device, iobmd_drain, iobmd_load, iobmd_store,
)
from guarded cimport iobmd_guarded
from mman cimport (
    C_F_GET_SEALS, C_F_SEAL_SHRINK, MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_NORESERVE,
    MAP_PRIVATE, MAP_SHARED, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_NONE, PROT_READ, PROT_WRITE, c_fcntl, c_mmap,
    C_MADV_DODUMP, C_MADV_DOFORK, C_MADV_DONTNEED, C_MADV_KEEPONFORK, C_MADV_POPULATE_WRITE, c_madvise, c_mprotect,
    c_mremap, c_munlock, c_munmap,
)
from own_areas cimport iobmd_identity, iobmd_is_dma_buf, iobmd_own_area
from pagemap_entry cimport PFN_MASK, PRESENT_BIT, iobmd_entries
from procmap_query cimport C_VMA_EXECUTABLE, C_VMA_READABLE, C_VMA_SHARED, C_VMA_WRITABLE, iobmd_procmap_query
from uio cimport SYS_process_vm_writev, iovec, process_vm_readv, syscall

cdef size_t PAGE_SIZE = sysconf(_SC_PAGESIZE)

# The limit of sizes and user addresses: the kernel's half of the address space begins here.
cdef size_t MOST = <size_t>1 << 63

# A smaller copy ends before another thread could acquire the GIL.
cdef size_t RELEASE_GIL_FROM = 64 << 10

cdef extern from "<sys/personality.h>" nogil:
    enum: READ_IMPLIES_EXEC
    int personality(unsigned long persona)

# The protection that the kernel uses for PROT_READ.
cdef uint64_t READABLE = C_VMA_READABLE | (C_VMA_EXECUTABLE if personality(0xffffffff) & READ_IMPLIES_EXEC else 0)

cdef enum:
    UNKNOWN  # under construction: nothing else can be mapped there
    PRIVATE
    SHARED

cdef struct Object:
    uint64_t device
    uint64_t inode

cdef int BEST = iobmd_best()
cdef size_t LINE = iobmd_line()

# The instructions that write cache lines back, and those that this processor supports (cpuid).
NO_FLUSH, CLFLUSH, CLFLUSHOPT, CLWB, DC = IOBMD_NONE, IOBMD_CLFLUSH, IOBMD_CLFLUSHOPT, IOBMD_CLWB, IOBMD_DC

BEST_FLUSH = BEST
"""The default instruction of `Mapping`."""

LINE_SIZE = LINE
"""Bytes of a cache line."""

# From this size on, the faster copy outweighs the cost of its child process (measured: see _copy_revocable).
cdef size_t CHILD_FROM = 1 << 20


class FaultError(OSError):
    """Inaccessible memory: `address` is the byte; None if the access could not be attempted (clone(2))."""

    def __init__(self, number, message, address=None):
        super().__init__(number, message)
        self.address = address


class ClosedError(ValueError):
    """A mapping that is closed, or is being closed by another thread."""


cdef struct _Copy:
    void *to
    const void *source
    size_t size
    int mode
    int writing
    int how


cdef void _copy_lines(void *argument) noexcept nogil:
    cdef _Copy *job = <_Copy *>argument
    iobmd_copy(job.to, job.source, job.size, job.mode, job.writing, LINE, job.how)


cdef struct _Lines:
    uintptr_t address
    size_t size
    int how
    bint drop
    size_t count


cdef void _flush_lines(void *argument) noexcept nogil:
    cdef _Lines *job = <_Lines *>argument
    job.count = iobmd_lines(job.address, job.size, LINE, job.how, iobmd_drop if job.drop else iobmd_write_back)


cdef struct _Access:
    void *at
    uint64_t value
    int width
    bint writing


cdef void _access_once(void *argument) noexcept nogil:
    cdef _Access *job = <_Access *>argument
    if job.writing:
        iobmd_store(job.at, job.width, job.value)
    else:
        job.value = iobmd_load(job.at, job.width)


def drain():
    """Complete earlier write-combined stores of this thread, which the processor may still hold in its buffers."""
    iobmd_drain()


cdef int _unreachable(uint64_t address) except -1:
    raise FaultError(EFAULT, f"no memory is accessible at {address:#x}", address)


cdef int _guarded(void (*work)(void *) noexcept nogil, void *argument, uintptr_t first) except -1:
    """Process memory from `first` on that may be unmapped at any time. Raises FaultError."""
    cdef uintptr_t fault = 0
    cdef int error
    with nogil:
        error = iobmd_guarded(work, argument, &fault)
    if error < 0:
        # A cache line may begin before the range.
        _unreachable(max(fault, first))
    if error:
        raise FaultError(error, f"clone: {strerror(error).decode()}")
    return 0


cdef size_t _flush_revocable(uintptr_t address, size_t size, bint drop, int how) except? 0:
    cdef _Lines job
    job.address, job.size, job.drop, job.how, job.count = address, size, drop, how, 0
    _guarded(_flush_lines, &job, address)
    return job.count


cdef size_t _move_within(_Copy *job, int *error) noexcept nogil:
    """Copy by the kernel; return the number of bytes copied, and the error number in `error` (0: none)."""
    cdef iovec to, source
    cdef size_t done = 0
    cdef ssize_t moved
    error[0] = 0
    while done < job.size and not error[0]:
        to.iov_base = <char *>job.to + done
        source.iov_base = <char *>job.source + done
        to.iov_len = source.iov_len = job.size - done
        # process_vm_readv(2) pins the source, and the kernel first copies each page that a forked child shares. This
        # call pins only the destination. It fails if the destination is memory of a device, which cannot be pinned:
        # the other call then reads into it. Not by the wrapper, in which the thread sanitizer reports a race with
        # threads that map other memory there.
        moved = syscall(SYS_process_vm_writev, <long>getpid(), &source, <long>1, &to, <long>1, <long>0)
        if moved < 0 and errno == EFAULT and not job.writing:
            moved = process_vm_readv(getpid(), &to, 1, &source, 1, 0)
        if moved > 0:
            done += moved
        elif moved == 0 or errno != EINTR:
            error[0] = errno if moved else EFAULT
    return done


cdef int _open(uint64_t address, size_t size, int protection) noexcept nogil:
    """Unlock a range that was mapped without access, and allow access; returns the error number, 0 for none.

    After mlockall(MCL_FUTURE), mmap(2) itself locks new mappings and faults in accessible ones: in small pages,
    before madvise(2) could be called, and the whole of sparse memory. But the caller decides whether memory is wired.
    """
    c_munlock(<void *><uintptr_t>address, size)
    return errno if c_mprotect(<void *><uintptr_t>address, size, protection) else 0


cdef int _trim(uint64_t start, uint64_t end) noexcept nogil:
    """Unmap the excess, if any; return the error number, because splitting a mapping may exceed vm.max_map_count."""
    return errno if end > start and c_munmap(<void *><uintptr_t>start, end - start) else 0


cdef size_t _whole(size, size_t alignment, guard=0) except 0:
    """Return a size with its guards; raise ValueError or OverflowError if no mapping can have it.

    Callers have validated external input. It is checked again because an error in the arithmetic would be fatal: with
    an alignment of 0, almost the whole address space would be the excess to unmap.
    """
    if not alignment or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment} is not a power of two")
    if size <= 0 or guard < 0 or size % PAGE_SIZE or guard % PAGE_SIZE:
        raise ValueError(f"size {size} with guards of {guard} bytes is not a positive number of pages")
    if size + 2 * guard + alignment > MOST:
        raise OverflowError(f"size {size} with alignment {alignment} exceeds the address space")
    return size + 2 * guard


cdef Mapping _map(size_t size, size_t alignment, int protection, int flags):
    cdef uint64_t start, aligned, end
    cdef size_t span = _whole(size, alignment) + (alignment - PAGE_SIZE if alignment > PAGE_SIZE else 0)
    cdef void *found
    cdef int error
    with nogil:
        found = c_mmap(NULL, span, PROT_NONE, flags, -1, 0)
    if found == MAP_FAILED:
        raise OSError(errno, f"mmap: {strerror(errno).decode()}")
    start = <uintptr_t>found
    end = start + span
    aligned = (start + alignment - 1) & ~<uint64_t>(alignment - 1)
    with nogil:
        error = _trim(start, aligned)
        if not error:
            start = aligned
            error = _trim(aligned + size, end)
        if not error:
            end = aligned + size
            error = _open(aligned, size, protection)
        if error:  # only the part that is still mapped: another thread may have mapped the rest
            c_munmap(<void *><uintptr_t>start, end - start)
    if error:
        raise OSError(error, f"mmap: {strerror(error).decode()}")
    cdef Mapping self = Mapping.__new__(Mapping)
    self.address = aligned
    self.size = size
    self.writable = True  # also reserved space, once memory is mapped there
    return self


cdef uint64_t _map_at(uint64_t at, size_t size, int fd, uint64_t offset, int protection, int flags) except 0:
    cdef void *found
    with nogil:
        found = c_mmap(<void *><uintptr_t>at, size, protection, MAP_SHARED | flags, fd, offset)
    if found == MAP_FAILED:
        raise OSError(errno, f"mmap: {strerror(errno).decode()}")
    return <uintptr_t>found


cdef _total(pieces):
    """Return the total size of pieces of files; raise ValueError unless each consists of whole pages."""
    for _fd, offset, length in pieces:
        if offset < 0 or length <= 0 or offset % PAGE_SIZE or length % PAGE_SIZE or offset + length > MOST:
            raise ValueError(f"{length} bytes from {offset} on are not whole pages of a file")
    return sum(length for _fd, _offset, length in pieces)


cdef bint _can_shrink(int fd) noexcept nogil:
    """Return whether an object can be truncated by a process with a descriptor of it.

    The size of a dma-buf is fixed, and that of a memfd if it is sealed.
    """
    cdef int seals = c_fcntl(fd, C_F_GET_SEALS)
    return not iobmd_is_dma_buf(fd) if seals < 0 else not seals & C_F_SEAL_SHRINK


cdef Mapping _set_aside(uint64_t at, size_t size, size_t alignment):
    """Reserve address space, at `at` if that is not 0 and free, otherwise at a multiple of `alignment`."""
    cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    cdef void *found
    cdef Mapping self
    if not at:
        return _map(size, alignment, PROT_NONE, flags)
    self = Mapping.__new__(Mapping)
    with nogil:
        found = c_mmap(<void *><uintptr_t>at, size, PROT_NONE, flags | MAP_FIXED_NOREPLACE, -1, 0)
    if found == MAP_FAILED:
        raise OSError(errno, f"mmap: {strerror(errno).decode()}")
    with nogil:
        _open(<uintptr_t>found, size, PROT_NONE)
    self.address = <uintptr_t>found
    self.size = size
    return self


cdef int _move_area(uint64_t *place, uint64_t *stop, uint64_t end, uint64_t further) noexcept:
    """Move the area at `place`, up to `end`, and advance; return the error number. mremap(2) moves one area.

    `stop` is the end of that area, also after an error.
    """
    cdef iobmd_procmap_query area
    cdef int error
    stop[0] = end
    if iobmd_own_area(place[0], &area) > 0 and area.vma_start <= place[0]:
        stop[0] = min(area.vma_end, end)
    with nogil:
        error = errno if c_mremap(
            <void *><uintptr_t>place[0], stop[0] - place[0], stop[0] - place[0], MREMAP_MAYMOVE | MREMAP_FIXED,
            <void *><uintptr_t>(place[0] + further),
        ) == MAP_FAILED else 0
    if not error:
        place[0] = stop[0]
    return error


cdef uint64_t _unreserved(uint64_t place, uint64_t end) noexcept:
    """Return the first address outside of inaccessible private anonymous areas, at most `end`."""
    cdef iobmd_procmap_query area
    while place < end:
        if iobmd_own_area(place, &area) <= 0 or area.vma_start > place or area.vma_flags != 0 or (
            area.inode or area.dev_major or area.dev_minor
        ):
            return place
        place = area.vma_end
    return end


cdef int _reserve_free(uint64_t at, size_t size) noexcept nogil:
    """Reserve a range where nothing is mapped; return the error number, EEXIST if something is."""
    cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    cdef void *found = c_mmap(<void *><uintptr_t>at, size, PROT_NONE, flags, -1, 0)
    if found == MAP_FAILED:
        return errno
    if <uintptr_t>found != at:  # before 4.17 the address is only a hint
        c_munmap(found, size)
        return EEXIST
    return 0


cdef int _give_back(uint64_t start, size_t size, bint reserved) noexcept nogil:
    """Unmap a range, or replace it atomically by reserved address space."""
    cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
    if reserved:
        return -1 if c_mmap(<void *><uintptr_t>start, size, PROT_NONE, flags, -1, 0) == MAP_FAILED else 0
    return c_munmap(<void *><uintptr_t>start, size)


cdef class Mapping:
    """A range of this process's address space; `close()` or collection unmaps it, once.

    `users` counts the buffer views and copies that keep it mapped. `cache` selects how copies treat the processor
    caches: 1: flush lines before reads and after writes, 2: write lines back after writes, 4: non-temporal stores,
    otherwise nothing. `instruction` selects the cache line instruction, 0 for the best. `revocable` memory can be
    unmapped or truncated by others: accesses by these methods then raise `FaultError` instead of SIGSEGV or SIGBUS.
    A mapping with `holes` contains guard pages, at which every access faults. While it is `denied`, all accesses
    fault.
    Memory of a `device` is copied by aligned accesses, each byte once.
    `concealed` memory is inaccessible while it has no users.
    """

    cdef readonly uint64_t address
    cdef readonly size_t size
    cdef readonly int users
    cdef readonly bint writable
    cdef readonly bint revocable
    cdef readonly bint holes
    cdef readonly bint denied
    cdef readonly bint device
    cdef readonly bint concealed
    cdef public int cache
    cdef public int instruction
    cdef bint sealed
    cdef bint borrowed
    cdef public bint reserved
    cdef int only_in  # the process (`generation`) whose forked children lack it; 0: they inherit it
    cdef size_t margin
    cdef int kind
    cdef Object *objects
    cdef size_t count
    cdef object __weakref__

    @staticmethod
    def anonymous(size_t size, size_t alignment, bint sparse=False):
        """Map `size` bytes (whole pages) of private zeroed memory at a multiple of `alignment`.

        `sparse` memory does not count against the overcommit limit until it is touched (MAP_NORESERVE).
        """
        cdef Mapping self = _map(size, alignment, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | (MAP_NORESERVE if sparse else 0))
        self.kind = PRIVATE
        return self

    @staticmethod
    def guarded(size_t size, size_t guard):
        """Map `size` bytes (whole pages) of private zeroed memory with `guard` inaccessible bytes on each side."""
        cdef Mapping self = _map(_whole(size, PAGE_SIZE, guard), PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS)
        self.address += guard
        self.size = size
        self.margin = guard
        self._permit(PROT_READ | PROT_WRITE)
        self.kind = PRIVATE
        return self

    cdef int _permit(self, int protection) except -1:
        # With the GIL held: between a change of `users` and this call, no other thread may begin or end a use.
        if c_mprotect(<void *><uintptr_t>self.address, self.size, protection):
            raise OSError(errno, f"mprotect: {strerror(errno).decode()}")
        return 0

    def conceal(self):
        """Make private memory inaccessible whenever it has no users: no view, copy or `hold`."""
        self.concealed = True
        if not self.users:
            self._permit(PROT_NONE)

    cdef int _begin_use(self) except -1:
        """Count a user, which `_end_use` removes."""
        if self.concealed and not self.users:
            self._permit(PROT_READ | PROT_WRITE)
        self.users += 1
        return 0

    cdef void _end_use(self) noexcept:
        self.users -= 1
        if self.concealed and not self.users:
            self._permit(PROT_NONE)

    @staticmethod
    def reserve(size_t size, size_t alignment):
        """Reserve `size` bytes of inaccessible address space."""
        return _map(size, alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

    def withhold(self, bint withheld):
        """Declare that forked children lack it (MADV_DONTFORK), until this is undone.

        A child unmaps nothing, because it may have mapped other memory at these addresses.
        """
        self.only_in = _generation if withheld else 0

    cdef bint _is_elsewhere(self) noexcept:
        """Return whether this is a forked child without the mapping."""
        return self.only_in != 0 and self.only_in != _generation

    def filled(self):
        """Declare that private memory has been moved to the whole reserved range."""
        self.kind = PRIVATE

    @staticmethod
    def borrow(uint64_t address, size_t size, bint writable):
        """Return a mapping that represents existing memory, which its owner may unmap at any time."""
        cdef Mapping self = Mapping.__new__(Mapping)
        if size > MOST or address > MOST - size:
            raise OverflowError(f"{size} bytes at {address:#x} exceed the address space")
        self.address = address
        self.size = size
        self.writable = writable
        self.borrowed = self.revocable = True
        return self

    @staticmethod
    def view(
        pieces, uint64_t at, bint writable, size_t guard, size_t alignment, bint overwrite=False, bint device=False,
    ):
        """Map pieces of files contiguously and shared; each is (descriptor, offset, length), in whole pages.

        Pieces with the descriptor -1 are inaccessible. `at` is the address, at which nothing may be mapped
        (FileExistsError), or 0 for any multiple of `alignment`, with `guard` inaccessible bytes on each side. With
        `overwrite` the range at `at` must be reserved instead, as for `space`, and is reserved again at the end.
        `device`: whether they include memory of devices.
        """
        cdef size_t whole = _whole(_total(pieces), alignment, guard), size = whole - 2 * guard
        cdef uint64_t wanted = at
        cdef Mapping self
        cdef object shown = pieces
        if at > MOST - whole:
            raise OverflowError(f"{size} bytes at {at:#x} exceed the address space")
        if overwrite:
            self = Mapping.space(at, whole, True)
            self.borrowed = False
        elif guard or len(pieces) > 1 or pieces[0][0] < 0 or (alignment > PAGE_SIZE and not at):
            self = _set_aside(at, whole, alignment)
            at = self.address
        else:
            self = Mapping.__new__(Mapping)
            fd, offset, _length = pieces[0]
            self.address = _map_at(at, size, fd, offset, PROT_NONE, MAP_FIXED_NOREPLACE if at else 0)
            at = self.address
            pieces = ()
        self.size = size
        self.margin = guard
        self.writable = writable
        self.device = device
        self.address = at + guard
        if wanted and self.address != wanted:  # before Linux 4.17 the address is only a hint
            raise FileExistsError(EEXIST, "mmap: something is mapped there")
        self._show(pieces, PROT_NONE)
        self._shows(shown)
        self.kind = SHARED
        self._open_pieces(shown)
        return self

    cdef _open_pieces(self, pieces):
        """Allow access to consecutive pieces at once: to the whole mapping, unless it has holes."""
        cdef uint64_t start = self.address, end = self.address, length
        cdef int fd, error
        for fd, _offset, length in (*pieces, (-1, 0, 0)):
            if fd >= 0:
                end += length
                continue
            if end > start:
                with nogil:
                    error = _open(start, end - start, self._protection())
                if error:
                    raise OSError(error, f"mmap: {strerror(error).decode()}")
            start = end = end + length

    cdef int _protection(self) noexcept nogil:
        return PROT_READ | (PROT_WRITE if self.writable else 0)

    cdef _shows(self, pieces):
        """Record the objects of the pieces, and whether any of them may be truncated."""
        cdef Object one
        cdef Object *more
        cdef int last = -1
        for fd, _offset, _length in pieces:
            if fd < 0:
                self.holes = True
            if fd == last or fd < 0:
                continue
            last = fd
            self.revocable = self.revocable or (not self.device and _can_shrink(last))
            if iobmd_identity(last, &one.device, &one.inode):
                raise OSError(errno, f"fstat: {strerror(errno).decode()}")
            more = <Object *>realloc(self.objects, (self.count + 1) * sizeof(Object))
            if more == NULL:
                raise MemoryError
            self.objects = more
            self.objects[self.count] = one
            self.count += 1

    cdef _show(self, pieces, int protection):
        """Map pieces of files over the existing mapping, which is inaccessible where a piece has no file."""
        cdef uint64_t place = self.address
        cdef size_t length
        cdef uint64_t offset
        cdef int fd
        for fd, offset, length in pieces:
            if fd >= 0:
                _map_at(place, length, fd, offset, protection, MAP_FIXED)
            place += length

    def redirect(self, pieces, bint device=False):
        """Map pieces of other files at the same addresses, each atomically (MAP_FIXED). Parameters as `view`."""
        self._check(0, self.size)
        if _total(pieces) != self.size:
            raise ValueError("the size differs from that of the mapping")
        self.users += 1
        self.device = device
        try:
            self._shows(pieces)
            # Immediately accessible, but locked after mlockall(MCL_FUTURE): make it as pageable as before.
            self._show(pieces, self._protection())
            c_munlock(<void *><uintptr_t>self.address, self.size)
        finally:
            self.users -= 1

    def keep(self, size_t offset, size_t size):
        """Unmap all but `size` bytes at `offset`, in whole pages."""
        cdef size_t end = offset + size
        if self.users or not size or end < size or end > self.size:
            raise ValueError("not a part of the mapping, or in use")
        if end < self.size:
            c_munmap(<void *><uintptr_t>(self.address + end), self.size - end)
        if offset:
            c_munmap(<void *><uintptr_t>self.address, offset)
        self.address += offset
        self.size = size

    @staticmethod
    def space(uint64_t at, size_t size, bint overwrite):
        """Return address space at `at` for `move`.

        Nothing may be mapped there, and it is reserved now. With `overwrite` it must already be reserved, by private
        anonymous areas without access (FileExistsError), and is reserved again at the end. Until then it belongs to
        the caller: closing the space changes nothing there.
        """
        cdef Mapping self = Mapping.__new__(Mapping)
        cdef uint64_t first
        cdef int error
        _whole(size, PAGE_SIZE)
        if not at or at % PAGE_SIZE or at > MOST - size:
            raise ValueError(f"no mapping of {size} bytes can begin at {at:#x}")
        if overwrite:
            first = _unreserved(at, at + size)
            if first < at + size:
                raise FileExistsError(EEXIST, f"not reserved at {first:#x}", f"{first:#x}")
        else:
            with nogil:
                error = _reserve_free(at, size)
            if error:
                raise OSError(error, f"mmap: {strerror(error).decode()}")
        self.address, self.size, self.reserved, self.borrowed = at, size, overwrite, overwrite
        return self

    def move(self, Mapping space not None):
        """Move the mapping's page tables to other addresses: the pages remain in their frames, locked and pinned.

        Afterwards the space belongs to this mapping. After an error, some pages may be lost, and the mapping can only
        be closed; the space is closed, and reserved or unmapped as before `space`.
        """
        cdef uint64_t start = self.address, end = start + self.size, place = start, stop = start
        cdef int error = EINVAL if self.size != space.size else 0
        if self.users or self.borrowed or self.margin or not start:
            raise ValueError("the mapping is in use, or its memory belongs to another object")
        while not error and place < end:
            error = _move_area(&place, &stop, end, space.address - start)
        if error:
            space._undo_move(space.address + (place - start), space.address + (stop - start))
            # Not moved back, because another thread may have mapped memory at the addresses that became free.
            self.address, self.size = place, end - place
            raise OSError(error, f"mremap: {strerror(error).decode()}")
        self.address, self.reserved = space.address, space.reserved
        space.address = space.size = 0

    cdef void _undo_move(self, uint64_t moved, uint64_t tried) noexcept:
        """Close a space after an error: pages were moved to it up to `moved`, and were to be moved up to `tried`.

        mremap(2) unmaps its destination before it can fail. Another thread may have mapped memory there since, which
        is not replaced.
        """
        cdef uint64_t start = self.address, end = start + self.size
        self.address = self.size = 0
        if moved > start:
            with nogil:
                _give_back(start, moved - start, self.reserved)
        if self.reserved:
            if tried > moved:
                with nogil:
                    _reserve_free(moved, tried - moved)
            return
        if tried > moved and _unreserved(moved, tried) == tried:
            with nogil:
                c_munmap(<void *><uintptr_t>moved, tried - moved)
        if end > tried:
            with nogil:
                c_munmap(<void *><uintptr_t>tried, end - tried)

    def deny(self, bint denied):
        """Make it inaccessible, or accessible again. Raises OSError."""
        cdef int protection = PROT_NONE if denied else self._protection()
        cdef int error
        self._check(0, 0)
        with nogil:
            error = errno if c_mprotect(<void *><uintptr_t>self.address, self.size, protection) else 0
        if error:
            raise OSError(error, f"mprotect: {strerror(error).decode()}")
        self.denied = denied

    def hold(self):
        """Keep it mapped until `release`, as a copy in progress does. Raises as `read`."""
        self._check(0, 0)
        self._begin_use()

    def release(self):
        """Undo `hold`."""
        self._end_use()

    def __enter__(self):
        """Return it, for blocks in which other memory is mapped temporarily; it remains mapped after the block."""
        return self

    def __exit__(self, *_error):
        pass

    def seal(self):
        """Prevent new uses; raise BufferError while a view exists or a copy is in progress."""
        if self.users:
            raise BufferError(f"{self.users} users")
        self.sealed = True

    def unseal(self):
        """Undo `seal`."""
        self.sealed = False

    def renew(self):
        """Return another mapping with this one's memory, and close this one, which others may still reference."""
        cdef Mapping other = Mapping.__new__(Mapping)
        self.seal()
        if self.borrowed or self.margin or self.kind != PRIVATE:
            raise ValueError("only private memory that this object owns can have a new mapping object")
        other.address, other.size, other.writable, other.kind = self.address, self.size, self.writable, self.kind
        self.address = self.size = 0
        return other

    def lost(self):
        """Return the first address where the mapping was removed or replaced, or None (see `close`)."""
        cdef uint64_t start, end, from_, to = self.address
        if not self.address or self.borrowed or self.kind == UNKNOWN:
            return None
        start, end = self.address, self.address + self.size
        if not self._next(start, end, &from_, &to) or from_ > start:
            return start
        return to if to < end else None

    def close(self, ranges=None):
        """Seal and unmap; idempotent.

        Unmaps only areas that still belong to this mapping: areas of the mapped object, or private anonymous areas
        with the original protection. Memory that the program has unmapped or replaced is not touched. `ranges` of
        (address, length) are those that certainly belong to it, if the caller can determine them.
        """
        self.seal()
        cdef uint64_t address = self.address - self.margin
        cdef uint64_t end = self.address + self.size + self.margin
        # A bint is an int, which cannot hold a high address.
        cdef bint mapped = self.address != 0 and not self.borrowed
        cdef uint64_t start, length
        cdef int failed = 0
        if not mapped or self._is_elsewhere():
            self.address = self.size = 0
            return
        if ranges is None:
            failed = self._unmap(address, end)
        else:
            if self.margin:
                failed = self._unmap_margins()
            self.address = self.size = 0
            for start, length in ranges:
                with nogil:
                    failed = _give_back(start, length, self.reserved) or failed
        self.address = self.size = 0
        if failed:
            raise OSError(errno, f"munmap: {strerror(errno).decode()}")

    cdef int _unmap(self, uint64_t start, uint64_t end) noexcept:
        """Unmap its own areas of a range that includes the margins."""
        cdef uint64_t first = self.address, last = self.address + self.size
        # Cleared first, so that no other thread starts to use memory that is about to be unmapped.
        self.address = self.size = 0
        return self._unmap_own(start, end, first, last)

    cdef int _unmap_margins(self) noexcept:
        cdef uint64_t first = self.address, last = self.address + self.size
        cdef int failed = self._unmap_own(first - self.margin, first, first, last)
        return self._unmap_own(last, last + self.margin, first, last) or failed

    cdef int _unmap_own(self, uint64_t start, uint64_t end, uint64_t first, uint64_t last) noexcept:
        """Unmap its own areas of a range; its memory is `first` to `last`."""
        cdef uint64_t from_, to
        cdef int failed = 0
        while start < end and self._next_of(start, end, first, last, &from_, &to):
            with nogil:
                failed = _give_back(from_, to - from_, self.reserved) or failed
            start = to
        return failed

    cdef bint _next(self, uint64_t start, uint64_t end, uint64_t *from_, uint64_t *to) noexcept:
        return self._next_of(start, end, start, end, from_, to)

    cdef bint _next_of(
        self, uint64_t start, uint64_t end, uint64_t first, uint64_t last, uint64_t *from_, uint64_t *to,
    ) noexcept:
        """Find the first part of a range that belongs to this mapping; its objects are `first` to `last`."""
        cdef iobmd_procmap_query area
        cdef int found = self.kind
        from_[0] = to[0] = start
        if self.kind == UNKNOWN:
            to[0] = end
            return True
        while to[0] < end:
            found = iobmd_own_area(to[0], &area)
            if found < 0:  # the kernel does not report what is mapped
                to[0] = end
                break
            if not found or area.vma_start >= end:
                break
            if area.vma_start > to[0]:
                if to[0] > from_[0]:
                    break
                from_[0] = to[0] = area.vma_start
            if self._owns(&area, to[0], first, last):
                # The margins are separate areas.
                to[0] = min(area.vma_end, end)
            elif to[0] > from_[0]:
                break
            else:
                from_[0] = to[0] = min(area.vma_end, end)
        return to[0] > from_[0]

    cdef bint _owns(self, iobmd_procmap_query *area, uint64_t at, uint64_t first, uint64_t last) noexcept:
        """Return whether an area may belong to this mapping at an address."""
        cdef size_t index
        cdef uint64_t access = READABLE | (C_VMA_WRITABLE if self.writable else 0)
        cdef uint64_t device = <uint64_t>area.dev_major << 32 | area.dev_minor
        cdef bint anonymous = not (device or area.inode)
        if at < first or at >= last:
            return anonymous and area.vma_flags == 0
        if self.denied:
            access = 0
        if self.kind == PRIVATE:
            return anonymous and (area.vma_flags == access or (self.concealed and area.vma_flags == 0))
        if self.holes and anonymous and area.vma_flags == 0:
            return True
        if area.vma_flags != (C_VMA_SHARED | access):
            return False
        for index in range(self.count):
            if self.objects[index].device == device and self.objects[index].inode == area.inode:
                return True
        return False

    def read(self, size_t offset, size_t length):
        """Return `length` bytes, starting at `offset`."""
        self._check(offset, length)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, length)
        self._copy(PyBytes_AsString(data), <void *><uintptr_t>(self.address + offset), length, False)
        return data

    def read_into(self, size_t offset, buffer):
        """Fill the writable `buffer` with the bytes at `offset`."""
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            self._check(offset, view.len)
            self._copy(view.buf, <void *><uintptr_t>(self.address + offset), view.len, False)
        finally:
            PyBuffer_Release(&view)

    def write(self, size_t offset, data):
        """Copy the whole of `data` to `offset`."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self._check(offset, view.len)
            if not self.writable:
                raise ValueError("the mapping is read-only")
            self._copy(<void *><uintptr_t>(self.address + offset), view.buf, view.len, True)
        finally:
            PyBuffer_Release(&view)

    def write_back(self, size_t offset, size_t length, bint drop):
        """Write the cache lines of a range back to memory, and `drop` them if requested; return their number."""
        cdef uintptr_t address = self.address + offset
        cdef int how = self.instruction or BEST
        cdef size_t count
        self._check(offset, length)
        self._begin_use()
        try:
            if self.revocable or self.denied:
                count = _flush_revocable(address, length, drop, how)
            else:
                with nogil:
                    count = iobmd_lines(address, length, LINE, how, iobmd_drop if drop else iobmd_write_back)
        finally:
            self._end_use()
        return count

    def load(self, size_t offset, int width):
        """Return a number of 1, 2, 4 or 8 bytes, little-endian, by one aligned load of exactly that width."""
        cdef _Access job
        self._check(offset, width)
        job.at, job.width, job.writing, job.value = <void *><uintptr_t>(self.address + offset), width, False, 0
        self._access(&job)
        return job.value

    def store(self, size_t offset, int width, uint64_t value):
        """Store a number of 1, 2, 4 or 8 bytes, little-endian, by one aligned store of exactly that width."""
        cdef _Access job
        self._check(offset, width)
        if not self.writable:
            raise ValueError("the mapping is read-only")
        job.at, job.width, job.writing, job.value = <void *><uintptr_t>(self.address + offset), width, True, value
        self._access(&job)

    cdef _access(self, _Access *job):
        # The GIL is not released: no other thread unmaps the memory during the access.
        if job.width not in (1, 2, 4, 8) or <uintptr_t>job.at % job.width:
            raise ValueError(f"no aligned access of {job.width} bytes at {<uintptr_t>job.at:#x}")
        if self.concealed:
            self._begin_use()
            try:
                _access_once(job)
            finally:
                self._end_use()
        elif (self.revocable or self.denied or self.holes) and not self.device:
            _guarded(_access_once, job, <uintptr_t>job.at)
        else:
            _access_once(job)

    cdef _check(self, size_t offset, size_t length):
        if self.sealed:
            raise ClosedError("the mapping is closed")
        if offset > self.size or length > self.size - offset:
            raise ValueError("range past the end of the mapping")

    cdef _copy(self, void *destination, void *source, size_t length, bint writing):
        cdef _Copy job
        job.to, job.source, job.size = destination, source, length
        job.mode, job.writing, job.how = self.cache, writing, self.instruction or BEST
        if self.device:
            self._copy_device(&job)
            return
        if length < RELEASE_GIL_FROM and not (self.revocable or self.denied or self.concealed):
            _copy_lines(&job)
            return
        self._begin_use()
        try:
            if self.revocable or self.denied:
                self._copy_revocable(&job)
            else:
                with nogil:
                    _copy_lines(&job)
        finally:
            self._end_use()

    cdef int _copy_device(self, _Copy *job) except -1:
        self.users += 1
        try:
            with nogil:  # an uncached load takes up to a microsecond
                if job.writing:
                    iobmd_copy_to_device(job.to, job.source, job.size)
                else:
                    iobmd_copy_from_device(job.to, job.source, job.size)
        finally:
            self.users -= 1
        return 0

    cdef int _copy_revocable(self, _Copy *job) except -1:
        """Copy from or to memory that may be unmapped at any time.

        process_vm_writev(2) to this process never faults, stops at the first inaccessible page, and copies 13 GB/s
        (measured in the second-level cache; memmove copies 46 GB/s); a child process takes 23 µs.
        """
        cdef uintptr_t first = <uintptr_t>(job.to if job.writing else job.source), fault
        cdef size_t done = 0
        cdef int mode = job.mode, error
        job.mode = 0
        if mode == IOBMD_INHIBIT and not job.writing:
            _flush_revocable(first, job.size, True, job.how)
        with nogil:
            error = -1 if job.size < CHILD_FROM else iobmd_guarded(_copy_lines, job, &fault)
            if error:  # also after a fault: memmove may access the end of a range before its start
                done = _move_within(job, &error)
        if error == EFAULT:
            return _unreachable(first + done)
        if error:  # a seccomp profile without these calls
            _guarded(_copy_lines, job, first)
        if job.writing and mode in (IOBMD_INHIBIT, IOBMD_WRITE_THROUGH, IOBMD_WRITE_COMBINE):
            _flush_revocable(first, job.size, mode != IOBMD_WRITE_THROUGH, job.how)
        return 0

    def __dealloc__(self):
        if self.address and not self.borrowed and not self._is_elsewhere():
            self._unmap(self.address - self.margin, self.address + self.size + self.margin)
        free(self.objects)


cdef class Exporter:
    """Base of Python classes that export a `Mapping` by the buffer protocol, even before Python 3.12.

    The subclass defines `_exported()`, which returns `(keeper, mapping, offset, length, writable)` or raises. Each
    view holds the keeper, the object that owns the memory, and not only the mapping: the memory remains unchanged,
    and pinned if it was, until the last view ends, even if this object has released the owner. `exports` counts the
    existing views.
    """

    cdef readonly int exports
    cdef object __weakref__  # here, because with the limited API Cython loses one of this and `__dict__` in one class

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef Mapping mapping
        cdef Py_ssize_t offset, length
        cdef bint writable
        keeper, mapping, offset, length, writable = self._exported()
        if mapping.sealed:
            raise BufferError("the mapping is closed")
        if offset < 0 or length < 0 or <size_t>offset > mapping.size or <size_t>length > mapping.size - offset:
            raise BufferError(f"{length} bytes at {offset} are not within the mapping")
        writable = writable and mapping.writable
        PyBuffer_FillInfo(view, self, <void *><uintptr_t>(mapping.address + offset), length, not writable, flags)
        mapping._begin_use()
        self.exports += 1
        cdef tuple held = (keeper, mapping)
        Py_INCREF(held)
        view.internal = <void *>held

    def __releasebuffer__(self, Py_buffer *view):
        cdef tuple held = <tuple>view.internal
        cdef Mapping mapping = held[1]
        mapping._end_use()
        self.exports -= 1
        Py_DECREF(held)


include "mapping_guard.pxi"
include "mapping_slab.pxi"
