# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Copies between this process and a task, with the GIL released: process_vm_readv and /proc/PID/mem."""

from libc.errno cimport EFAULT, EINTR, EIO, ENOMEM, ESRCH, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset, strerror
from posix.fcntl cimport O_RDONLY
from posix.unistd cimport close
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize

from attempt cimport (
    IOBMD_BOUNCE, IOBMD_BOUNCED, IOBMD_COUNTED, IOBMD_DIRECT, IOBMD_RANGES, iobmd_attempt, iobmd_attempt_free,
    iobmd_attempt_new, iobmd_attempt_start, iobmd_attempt_wait,
)
from mman cimport C_MADV_HUGEPAGE, C_MADV_PAGEOUT, C_MADV_POPULATE_WRITE, c_madvise
from pagemap_entry cimport PRESENT_BIT, SWAP_BIT, UFFD_WP_BIT, iobmd_is_swapped
from uio cimport (
    O_CLOEXEC, SYS_pidfd_getfd, SYS_process_madvise, c_open, iovec, pread, process_vm_readv, process_vm_writev,
    pwrite, syscall,
)

cdef enum:
    # Pages whose pagemap entries are read at a time: a huge page of 2 MiB in pages of 4 KiB, or of 32 MiB in 16 KiB,
    # and one more where neither end of a piece lies on a page.
    CHUNK = 2048
    DEFAULT_CHUNK = 512
    VECTORS = 512
    FEW = 17  # pages

cdef enum Kind:
    DIRECT  # can be moved without a page being made in the task, and without waiting for another program
    SWAPPED  # as well, but reading it brings it in
    ABSENT


cdef inline Kind _kind(uint64_t entry, bint write) noexcept nogil:
    """Classify a page. A write to a page that userfaultfd protects waits for its handler: such a page is absent."""
    if write and entry & UFFD_WP_BIT:
        return ABSENT
    if entry & PRESENT_BIT:
        return DIRECT
    if entry & SWAP_BIT:
        if iobmd_is_swapped(entry):
            return DIRECT if write else SWAPPED
        # The marker of a write-protected page that is gone; the call finds out about guard and poisoned pages.
        return ABSENT if entry & UFFD_WP_BIT else DIRECT
    return ABSENT


cdef struct Way:
    int pid, memory, pidfd
    bint write, skip
    size_t page


cdef struct Ranges:
    uint64_t *bounds  # start and end of each
    size_t count, room


cdef int _add(Ranges *ranges, uint64_t start, uint64_t end) noexcept nogil:
    """Add a range, joined to the one before it; -1 without memory."""
    cdef uint64_t *grown
    if ranges.count and ranges.bounds[2 * ranges.count - 1] == start:
        ranges.bounds[2 * ranges.count - 1] = end
        return 0
    if ranges.count == ranges.room:
        grown = <uint64_t *>realloc(ranges.bounds, 32 * (ranges.room or 16))
        if grown == NULL:
            return -1
        ranges.bounds = grown
        ranges.room = 2 * (ranges.room or 16)
    ranges.bounds[2 * ranges.count] = start
    ranges.bounds[2 * ranges.count + 1] = end
    ranges.count += 1
    return 0


cdef list _listed(Ranges *ranges):
    return [(ranges.bounds[2 * index], ranges.bounds[2 * index + 1]) for index in range(ranges.count)]


cdef struct Batch:
    # Ranges here and there, pairwise of the same length, which one call moves.
    iovec ours[VECTORS]
    iovec theirs[VECTORS]
    int count
    # Those whole pages of `theirs` that the call brings in from swap.
    iovec swapped[VECTORS]
    int swaps


cdef ssize_t _call(const Way *way, const iovec *ours, const iovec *theirs, int count) noexcept nogil:
    if way.memory >= 0:
        if way.write:
            return pwrite(way.memory, ours.iov_base, ours.iov_len, <long><uintptr_t>theirs.iov_base)
        return pread(way.memory, ours.iov_base, ours.iov_len, <long><uintptr_t>theirs.iov_base)
    if way.write:
        return process_vm_writev(way.pid, ours, count, theirs, count, 0)
    return process_vm_readv(way.pid, ours, count, theirs, count, 0)


cdef int _move(const Way *way, Batch *batch, uint64_t *stopped, Ranges *bad) noexcept nogil:
    """Move a batch; returns the error number that ended it, and in `stopped` the address where it did.

    With `skip` pages that cannot be read are listed as `bad`, and passed over.
    """
    cdef int first = 0
    cdef ssize_t moved
    cdef size_t step
    cdef uint64_t at
    while first < batch.count:
        moved = _call(way, &batch.ours[first], &batch.theirs[first], batch.count - first)
        if moved <= 0:
            if moved < 0 and errno == EINTR:
                continue
            at = <uintptr_t>batch.theirs[first].iov_base
            if not way.skip or (moved < 0 and errno != EFAULT and errno != EIO):
                stopped[0] = at
                return errno if moved < 0 else ESRCH
            moved = min(batch.theirs[first].iov_len, way.page - at % way.page)
            if _add(bad, at, at + moved):
                return ENOMEM
        while moved > 0:
            step = min(<size_t>moved, batch.theirs[first].iov_len)
            batch.ours[first].iov_base = <char *>batch.ours[first].iov_base + step
            batch.theirs[first].iov_base = <char *>batch.theirs[first].iov_base + step
            batch.ours[first].iov_len -= step
            batch.theirs[first].iov_len -= step
            moved -= step
            if not batch.theirs[first].iov_len:
                first += 1
    if batch.swaps:
        # Back to swap, as they were: the task is not to pay for having been read. It needs CAP_SYS_NICE.
        syscall(SYS_process_madvise, way.pidfd, batch.swapped, <long>batch.swaps, C_MADV_PAGEOUT, 0)
    batch.count = batch.swaps = 0
    return 0


cdef struct Piece:
    uint64_t theirs, ours
    size_t size


cdef int _chunk(const Way *way, Piece piece, const uint64_t *entries, size_t count, Batch *batch, uint64_t *stopped,
                Ranges *absent, Ranges *bad) noexcept nogil:
    """Move those pages of a piece that its pagemap entries show as movable, and list the absent ones; as `_move`."""
    cdef size_t index = 0, last
    cdef uint64_t start, end, page = piece.theirs - piece.theirs % way.page
    cdef Kind kind
    cdef int error
    while index < count:
        kind = _kind(entries[index], way.write)
        last = index + 1
        while last < count and _kind(entries[last], way.write) == kind:
            last += 1
        start = max(piece.theirs, page + index * way.page)
        end = min(piece.theirs + piece.size, page + last * way.page)
        if kind == ABSENT:
            if _add(absent, start, end):
                stopped[0] = start
                return ENOMEM
        else:
            batch.theirs[batch.count].iov_base = <void *><uintptr_t>start
            batch.ours[batch.count].iov_base = <void *><uintptr_t>(piece.ours + (start - piece.theirs))
            batch.theirs[batch.count].iov_len = batch.ours[batch.count].iov_len = end - start
            batch.count += 1
            if kind == SWAPPED and way.pidfd >= 0:
                batch.swapped[batch.swaps].iov_base = <void *><uintptr_t>(page + index * way.page)
                batch.swapped[batch.swaps].iov_len = (last - index) * way.page
                batch.swaps += 1
            if batch.count == VECTORS or way.memory >= 0:
                error = _move(way, batch, stopped, bad)
                if error:
                    return error
        index = last
    return _move(way, batch, stopped, bad)


cdef int _transfer(const Way *way, int pagemap, Piece all, size_t huge, bint mark, int *marked, uint64_t *stopped,
                   Ranges *absent, Ranges *bad) noexcept nogil:
    cdef uint64_t entries[CHUNK + 1]
    cdef Batch batch
    cdef Piece piece
    cdef size_t done = 0, first, count, index, chunk = DEFAULT_CHUNK * way.page
    cdef ssize_t got
    cdef int error
    cdef bint whole, follows = False
    batch.count = batch.swaps = 0
    if huge > CHUNK * way.page:
        huge = 0
    while done < all.size:
        piece.theirs, piece.ours = all.theirs + done, all.ours + done
        piece.size = min(all.size - done, huge - piece.ours % huge if huge else chunk)
        first = piece.theirs // way.page
        count = (piece.theirs + piece.size - 1) // way.page - first + 1
        if pagemap < 0:
            for index in range(count):
                entries[index] = PRESENT_BIT
        else:
            got = pread(pagemap, entries, count * 8, <long>(first * 8))
            if got < 8:
                # Past the end of all address spaces, or the memory is gone.
                stopped[0] = piece.theirs
                return errno if got < 0 else EFAULT if pread(pagemap, entries, 8, 0) == 8 else ESRCH
            if <size_t>got // 8 < count:
                count = <size_t>got // 8
                piece.size = (first + count) * way.page - piece.theirs
        if huge and piece.size == huge:
            whole = True
            for index in range(count):
                if _kind(entries[index], way.write) == ABSENT:
                    whole = False
                    break
            if whole:
                if mark:
                    c_madvise(<void *><uintptr_t>piece.ours, huge, C_MADV_HUGEPAGE)
                    marked[0] += not follows
                # A huge page is faulted in by its LAST base page: the kernel clears a huge page so that the touched
                # end comes last, and clearing upwards is a third faster here than clearing downwards (measured,
                # Linux 6.18). A refusal (before 5.14, or no huge page) does no harm: the copy faults the pages in.
                c_madvise(<void *><uintptr_t>(piece.ours + huge - way.page), way.page, C_MADV_POPULATE_WRITE)
            follows = whole
        error = _chunk(way, piece, entries, count, &batch, stopped, absent, bad)
        if error:
            return error
        done += piece.size
    return 0


def transfer(int pid, int memory, int pagemap, int pidfd, bint write, bint skip, uint64_t theirs, uint64_t ours,
             size_t size, size_t page, size_t huge=0, bint mark=False):
    """Copy between the address `theirs` of a task and the address `ours` here what needs no page to be made there.

    Parameters
    ----------
    pid, memory
        The task for process_vm_readv and process_vm_writev or, when `memory` is not negative, its open /proc/PID/mem.
    pagemap, pidfd
        Its open pagemap, and its pidfd. Without a pagemap (-1) every page counts as present. What had to be read from
        swap is returned there by process_madvise(2) on the pidfd.
    write
        From here into the task, instead of from the task to here.
    skip
        Pass over pages that cannot be read, and list them.
    page
        The base page size.
    huge
        Size of the huge pages that the fresh destination may get, 0 when it is not fresh: a huge page is faulted in
        ahead of the copy where all of its bytes are going to be copied.
    mark
        Such a range is first given MADV_HUGEPAGE.

    Returns
    -------
    tuple[int, int, list[tuple[int, int]], list[tuple[int, int]], int]
        The address in the task that the copy reached, the error number that ended it (0: none), the ranges before
        that address whose pages are absent, those that could not be read, and how many separate ranges were marked.
    """
    cdef Way way
    cdef Piece all
    cdef Ranges absent, bad
    cdef uint64_t stopped = theirs + size
    cdef int error, marked = 0
    way.pid, way.memory, way.pidfd, way.write, way.skip, way.page = pid, memory, pidfd, write, skip, page
    all.theirs, all.ours, all.size = theirs, ours, size
    absent.bounds = bad.bounds = NULL
    absent.count = bad.count = absent.room = bad.room = 0
    try:
        with nogil:
            error = _transfer(&way, pagemap, all, huge, mark, &marked, &stopped, &absent, &bad)
        return stopped, error, _listed(&absent), _listed(&bad), marked
    finally:
        free(absent.bounds)
        free(bad.bounds)


def move_present(const char *pagemap, int pid, bint write, uint64_t theirs, uint64_t ours, size_t size, size_t page):
    """As `transfer`, of a few pages; says whether all of it was moved. `pagemap` is the path of that file.

    False: a page is not present, and nothing was moved, or an error ended it.
    """
    cdef uint64_t entries[FEW]
    cdef uint64_t first = theirs // page
    cdef size_t count = (theirs + size - 1) // page - first + 1, index
    cdef iovec here, there
    cdef int fd
    cdef bint moved = False
    if count > FEW:
        return False
    with nogil:
        fd = c_open(pagemap, O_RDONLY | O_CLOEXEC)
        if fd >= 0:
            if pread(fd, entries, count * 8, <long>(first * 8)) == <ssize_t>(count * 8):
                moved = True
                for index in range(count):
                    if not entries[index] & PRESENT_BIT or (write and entries[index] & UFFD_WP_BIT):
                        moved = False
                        break
            close(fd)
        if moved:
            here.iov_base, there.iov_base = <void *><uintptr_t>ours, <void *><uintptr_t>theirs
            here.iov_len = there.iov_len = size
            if write:
                moved = process_vm_writev(pid, &here, 1, &there, 1, 0) == <ssize_t>size
            else:
                moved = process_vm_readv(pid, &here, 1, &there, 1, 0) == <ssize_t>size
    return moved


def absent(int pagemap, uint64_t theirs, size_t size, size_t page):
    """Return the ranges of a task whose pages are absent, by its open pagemap."""
    cdef uint64_t entries[CHUNK]
    cdef Ranges found
    cdef uint64_t at = theirs - theirs % page, end = theirs + size
    cdef ssize_t got
    cdef size_t index
    cdef int error = 0
    found.bounds = NULL
    found.count = found.room = 0
    try:
        with nogil:
            while at < end and not error:
                got = pread(pagemap, entries, min(<uint64_t>CHUNK, (end - at + page - 1) // page) * 8,
                            <long>(at // page * 8))
                if got <= 0:
                    break
                for index in range(<size_t>got // 8):
                    if _kind(entries[index], False) == ABSENT:
                        error = _add(&found, max(at, theirs), min(at + page, end))
                    at += page
        if error:
            raise MemoryError()
        return _listed(&found)
    finally:
        free(found.bounds)


def zero(uint64_t ours, size_t size):
    """Set bytes of this process to zero."""
    with nogil:
        memset(<void *><uintptr_t>ours, 0, size)


def copy_here(uint64_t ours, uint64_t source, size_t size):
    """Copy bytes of this process."""
    with nogil:
        memcpy(<void *><uintptr_t>ours, <void *><uintptr_t>source, size)


MOST_RANGES = IOBMD_RANGES


cdef class Attempt:
    """A transfer by a child process that shares this address space and may be killed alone.

    A call that waits for another program (a fault handler, a file's server) sleeps until the page comes or the
    process is killed: the child makes it, on memory of its own. A file that a task maps is opened by the child alone,
    because this process would lose its POSIX locks on that file when it closed it.

    Parameters
    ----------
    ranges
        Offsets in the file and lengths, at most `MOST_RANGES`.
    task
        The task whose addresses the offsets are, by process_vm_readv and process_vm_writev.
    file
        In its place its open /proc/PID/mem, which does not wait for a handler of userfaultfd: that is an error there.
    write
        To there, instead of from there.
    paths, inode, device
        In place of `file`: the first of these paths is opened that leads to a regular file with that inode number
        and, if that is not 0, of that device.
    ours
        The address here of each range of a file of a memory file system (tmpfs, hugetlbfs): a read of that waits for
        no other program, so that the child writes where the bytes belong. It allocates nothing in the file.
    count
        Only count the bytes of such a file that are not in holes, as those moved.
    page, fresh, holes
        The page size here; the destination is zero, and stays untouched where the file has holes; the file answers
        SEEK_DATA (hugetlbfs does not, and a read of it returns zeros for a hole).
    """

    cdef iobmd_attempt *job

    def __cinit__(self, ranges, *, int task=0, int file=-1, bint write=False, paths=(), uint64_t inode=0,
                  uint64_t device=0, ours=None, bint count=False, size_t page=0, bint fresh=False, bint holes=True):
        cdef bytes joined = b"".join([path + b"\0" for path in paths]) + b"\0" if paths else b""
        cdef size_t length, room = IOBMD_BOUNCE if ours is not None else 0
        cdef uint64_t at
        cdef uintptr_t here
        if len(ranges) > IOBMD_RANGES:
            raise ValueError("too many ranges")
        if ours is None and not count:
            room = sum([length for _at, length in ranges])
        self.job = iobmd_attempt_new(len(ranges), room, joined, len(joined))
        if self.job == NULL:
            raise OSError(errno, f"mmap: {strerror(errno).decode()}")
        self.job.mode = IOBMD_COUNTED if count else IOBMD_BOUNCED if ours is None else IOBMD_DIRECT
        self.job.task, self.job.file, self.job.writing = task, file, write
        self.job.inode, self.job.device = inode, device
        self.job.page, self.job.fresh, self.job.holes = page, fresh, holes
        for at, length in ranges:
            self.job.ranges[self.job.count].at = at
            self.job.ranges[self.job.count].size = length
            self.job.size += length
            self.job.count += 1
        if ours is not None:
            for length, here in enumerate(ours):
                self.job.ranges[length].ours = <char *>here

    @property
    def address(self):
        """The address of the bytes to write, or of those that were read."""
        return <uintptr_t>self.job.bytes

    @property
    def moved(self):
        """How many bytes have been moved."""
        return self.job.moved

    @property
    def error(self):
        """The error number that ended it, 0 for none; ECANCELED where another process killed the child."""
        return self.job.error

    @property
    def opened(self):
        """Of the file that was opened: the index of its path, its device, length, and type of file system."""
        return self.job.chosen, self.job.opened_device, self.job.length, self.job.filesystem

    def start(self):
        """Begin. Raises OSError where no process can be made."""
        cdef int error = iobmd_attempt_start(self.job)
        if error:
            raise OSError(error, f"clone: {strerror(error).decode()}")

    def wait(self, int milliseconds):
        """Wait at most so long; says whether it is over."""
        cdef int over
        with nogil:
            over = iobmd_attempt_wait(self.job, milliseconds)
        return bool(over)

    def end(self):
        """End it, and release its memory; idempotent."""
        cdef iobmd_attempt *job = self.job
        self.job = NULL
        if job != NULL:
            with nogil:
                iobmd_attempt_free(job)

    def __dealloc__(self):
        if self.job != NULL:
            iobmd_attempt_free(self.job)


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
    cdef iovec local
    cdef iovec remote[512]
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
