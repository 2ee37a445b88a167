# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Memory of this process by address: madvise(2), mlock(2), mincore(2), mremap(2), NUMA nodes; lazily freed memory,
the tracking of writes to it (userfaultfd(2)), and files that are memory (tmpfs, hugetlbfs)."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport strerror
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize

from posix.unistd cimport close

from mman cimport (
    C_MADV_COLD, C_MADV_COLLAPSE, C_MADV_DODUMP, C_MADV_DOFORK, C_MADV_DONTDUMP, C_MADV_DONTFORK, C_MADV_DONTNEED,
    C_MADV_DONTNEED_LOCKED, C_MADV_FREE, C_MADV_HUGEPAGE, C_MADV_KEEPONFORK, C_MADV_NOHUGEPAGE, C_MADV_NORMAL,
    C_MADV_PAGEOUT, C_MADV_POPULATE_READ, C_MADV_POPULATE_WRITE, C_MADV_RANDOM, C_MADV_WIPEONFORK, MAP_FAILED,
    MAP_SHARED, MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_READ, c_fallocate, c_madvise, c_mincore, c_mlock,
    c_mlock2, c_mmap, c_mremap, c_munlock, c_munmap, c_prctl, iobmd_fault_in_huge,
)
from pagemap_scan cimport iobmd_first_lost
from tmpfs cimport (
    FSCONFIG_CMD_CREATE, FSCONFIG_SET_STRING, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs, iobmd_fsconfig, iobmd_fsmount,
    iobmd_fsopen, statfs_t,
)
from userfault cimport (
    iobmd_uffd_hide, iobmd_uffd_open, iobmd_uffd_protect, iobmd_uffd_register, iobmd_uffd_track,
)

cdef extern from * nogil:
    """
    #include <sys/syscall.h>
    #include <unistd.h>
    #define iobmd_mbind(address, length, mode, nodes, most, flags) \\
        syscall(__NR_mbind, address, length, mode, nodes, most, flags)
    #define iobmd_where(count, pages, status) syscall(__NR_move_pages, 0, count, pages, NULL, status, 0)
    """
    long c_mbind "iobmd_mbind"(void *address, unsigned long length, int mode, const uint64_t *nodes,
                               unsigned long most, unsigned flags)
    long c_where "iobmd_where"(unsigned long count, void **pages, int *status)

cdef extern from * nogil:
    """
    static void iobmd_rewrite(char *byte)
    {
        /* Compare and exchange, because "or 0" may be compiled to a mere load. */
        char value = __atomic_load_n(byte, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(byte, &value, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            ;
    }
    """
    void iobmd_rewrite(char *byte)

cdef enum:
    MPOL_PREFERRED = 1
    NODE_WORDS = 16
    MOST_NODES = 1024  # 16 words of 64 bits
    PAGES_A_CALL = 256
    INCORE = 16384  # pages a call

# The calls of `restore`, to identify the one that failed.
cdef enum:
    C_LOCK = 1
    C_SCAN
    C_UNPROTECT
    C_POPULATE

LOCKING = C_LOCK

MADV_COLD = C_MADV_COLD
MADV_DODUMP = C_MADV_DODUMP
MADV_DOFORK = C_MADV_DOFORK
MADV_DONTDUMP = C_MADV_DONTDUMP
MADV_DONTFORK = C_MADV_DONTFORK
MADV_DONTNEED = C_MADV_DONTNEED
MADV_DONTNEED_LOCKED = C_MADV_DONTNEED_LOCKED
MADV_FREE = C_MADV_FREE
MADV_HUGEPAGE = C_MADV_HUGEPAGE
MADV_KEEPONFORK = C_MADV_KEEPONFORK
MADV_NOHUGEPAGE = C_MADV_NOHUGEPAGE
MADV_NORMAL = C_MADV_NORMAL
MADV_PAGEOUT = C_MADV_PAGEOUT
MADV_POPULATE_READ = C_MADV_POPULATE_READ
MADV_POPULATE_WRITE = C_MADV_POPULATE_WRITE
MADV_RANDOM = C_MADV_RANDOM
MADV_COLLAPSE = C_MADV_COLLAPSE
MADV_WIPEONFORK = C_MADV_WIPEONFORK


cdef int _check(int result, str call) except -1:
    if result < 0:
        raise OSError(errno, f"{call}: {strerror(errno).decode()}")
    return result


def advise(uint64_t address, size_t size, int advice):
    """Call madvise(2)."""
    cdef int failed
    with nogil:
        failed = c_madvise(<void *><uintptr_t>address, size, advice)
    _check(failed, "madvise")


def populate(uint64_t address, size_t size, size_t huge, size_t page, bint collapse=False):
    """Fault in a range for writing, by huge pages of `huge` bytes, each by its last base page of `page` bytes.

    With that order the kernel clears a huge page upwards (see mman.pxd). Returns the number of bytes faulted in, and
    the error number that ended it, 0 for none. Where no huge page is available, small pages are used. A memfd gets no
    huge pages by itself: with `collapse`, they are requested after a base page of each exists (MADV_COLLAPSE, Linux
    6.1).
    """
    cdef size_t done = 0, piece
    cdef int failed = 0
    with nogil:
        if collapse:  # at once: each call waits for all processors; if it fails, small pages follow
            while done + huge <= size:
                iobmd_fault_in_huge(address + done, huge, page)
                done += huge
            c_madvise(<void *><uintptr_t>address, done, C_MADV_COLLAPSE)
            done = 0
        while done < size:
            piece = min(size - done, huge - (address + done) % huge)
            if piece == huge and not collapse:
                iobmd_fault_in_huge(address + done, huge, page)
            failed = c_madvise(<void *><uintptr_t>(address + done), piece, C_MADV_POPULATE_WRITE)
            if failed:
                failed = errno
                break
            done += piece
    return done, failed


def populate_downwards(uint64_t address, size_t size, size_t huge, size_t page):
    """As `populate`, for whole aligned huge pages, from the highest to the lowest."""
    cdef size_t left = size
    cdef int failed = 0
    with nogil:
        while left >= huge and not failed:
            left -= huge
            iobmd_fault_in_huge(address + left, huge, page)
            failed = c_madvise(<void *><uintptr_t>(address + left), huge, C_MADV_POPULATE_WRITE)
            if failed:
                failed = errno
                left += huge
    return size - left, failed


def move(uint64_t source, uint64_t destination, size_t size):
    """Move private anonymous pages to another address, replacing the mapping there; `source` remains mapped, but
    empty.

    Uses mremap(2) with MREMAP_DONTUNMAP (Linux 5.7), so that another thread cannot map the emptied range before its
    owner unmaps it.
    """
    cdef void *moved
    with nogil:
        moved = c_mremap(<void *><uintptr_t>source, size, size,
                         MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, <void *><uintptr_t>destination)
    _check(-1 if moved == MAP_FAILED else 0, "mremap")


def punch(int fd, uint64_t offset, size_t size):
    """Free a piece of a memfd (fallocate(2), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)."""
    cdef int failed
    with nogil:
        failed = c_fallocate(fd, 3, offset, size)
    _check(failed, "fallocate")


def allocate_pages(int fd, uint64_t offset, size_t size):
    """Allocate the pages of a piece of a file in memory (fallocate(2)); those of tmpfs are cleared when touched."""
    cdef int failed
    with nogil:
        failed = c_fallocate(fd, 0, offset, size)
    _check(failed, "fallocate")


def lock(uint64_t address, size_t size):
    """Call mlock(2): fault the range in and keep it resident."""
    cdef int failed
    with nogil:
        failed = c_mlock(<void *><uintptr_t>address, size)
    _check(failed, "mlock")


def lock_on_fault(uint64_t address, size_t size):
    """Call mlock2(2) with MLOCK_ONFAULT: lock each page as it is first touched."""
    cdef int failed
    with nogil:
        failed = c_mlock2(<void *><uintptr_t>address, size, 1)
    _check(failed, "mlock2")


def unlock(uint64_t address, size_t size):
    """Call munlock(2)."""
    cdef int failed
    with nogil:
        failed = c_munlock(<void *><uintptr_t>address, size)
    _check(failed, "munlock")


def name(uint64_t address, size_t size, bytes text):
    """Name anonymous memory in /proc/PID/maps (prctl(2), PR_SET_VMA_ANON_NAME, Linux 5.17 if it is built in)."""
    cdef const char *raw = PyBytes_AsString(text)
    cdef int failed
    with nogil:
        failed = c_prctl(0x53564D41, <unsigned long>0, <unsigned long>address, <unsigned long>size, raw)
    _check(failed, "prctl")


def incore(uint64_t address, size_t pages, size_t page_size):
    """Call mincore(2); return one byte per page, with bit 0 set if the page is resident."""
    cdef bytes vector = PyBytes_FromStringAndSize(NULL, pages)
    cdef unsigned char *raw = <unsigned char *>PyBytes_AsString(vector)
    cdef int failed
    with nogil:
        failed = c_mincore(<void *><uintptr_t>address, pages * page_size, raw)
    _check(failed, "mincore")
    return vector


def prefer_node(uint64_t address, size_t size, unsigned node):
    """Prefer a node for the future pages of an empty range (mbind(2))."""
    cdef uint64_t nodes[NODE_WORDS]
    cdef long failed
    cdef size_t index
    if node >= MOST_NODES:
        raise ValueError(f"there is no node {node}")
    for index in range(NODE_WORDS):
        nodes[index] = 0
    nodes[node // 64] = <uint64_t>1 << node % 64
    with nogil:
        failed = c_mbind(<void *><uintptr_t>address, size, MPOL_PREFERRED, nodes, MOST_NODES, 0)
    _check(failed, "mbind")


def count_off_node(uint64_t address, size_t pages, size_t page_size, int node):
    """Count the pages of a range that are absent or not on a node (move_pages(2))."""
    cdef void *places[PAGES_A_CALL]
    cdef int status[PAGES_A_CALL]
    cdef size_t done = 0, index, count, found = 0
    cdef long failed = 0
    with nogil:
        while done < pages and not failed:
            count = min(pages - done, PAGES_A_CALL)
            for index in range(count):
                places[index] = <void *><uintptr_t>(address + (done + index) * page_size)
            failed = c_where(count, places, status)
            for index in range(count):
                found += status[index] != node
            done += count
    _check(failed, "move_pages")
    return found


def track_writes():
    """Return a userfaultfd(2) that tracks writes without a handler (UFFD_FEATURE_WP_ASYNC); requires no privilege."""
    fd = open_userfaultfd()
    try:
        configure_tracker(fd, False)
    except OSError:
        close(fd)
        raise
    return fd


def open_userfaultfd():
    """Return a userfaultfd(2) of this process, for user-mode page faults; requires no privilege."""
    cdef int fd
    with nogil:
        fd = iobmd_uffd_open()
    return _check(fd, "userfaultfd")


def configure_tracker(int fd, bint accesses):
    """Enable tracking without a handler in a new userfaultfd(2): of writes (UFFD_FEATURE_WP_ASYNC, Linux 6.7), or of
    all `accesses` (UFFD_FEATURE_RWP_ASYNC, Linux 7.3). Raises OSError: EINVAL if the kernel lacks it."""
    cdef int failed
    with nogil:
        failed = iobmd_uffd_track(fd, accesses)
    _check(failed, "ioctl(UFFDIO_API)")


def register_tracked(int fd, uint64_t address, size_t size, bint accesses=False):
    """Track writes to a range, or all `accesses` (UFFDIO_REGISTER), until it is unmapped or the tracker is closed."""
    cdef int failed
    with nogil:
        failed = iobmd_uffd_register(fd, address, size, accesses)
    _check(failed, "ioctl(UFFDIO_REGISTER)")


def await_access(int fd, uint64_t address, size_t size):
    """Detect the next access to each present page of a registered range (UFFDIO_RWPROTECT, Linux 7.3)."""
    cdef int failed
    with nogil:
        failed = iobmd_uffd_hide(fd, address, size)
    _check(failed, "ioctl(UFFDIO_RWPROTECT)")


def first_lost(int pagemap, uint64_t start, uint64_t end):
    """Return the address of the first page that has changed since it was protected, or None.

    Such a page is absent, the zero page (read after its loss), or has been written to.
    """
    cdef uint64_t where = 0
    cdef int found
    with nogil:
        found = iobmd_first_lost(pagemap, start, end, &where)
    _check(found, "ioctl(PAGEMAP_SCAN)")
    return where if found else None


def rewrite(uint64_t address, size_t size, size_t page):
    """Atomically rewrite the first byte of each page, so that its page table entry becomes dirty."""
    cdef size_t offset = 0
    with nogil:
        while offset < size:
            iobmd_rewrite(<char *><uintptr_t>(address + offset))
            offset += page


def restore(int tracker, int pagemap, uint64_t start, uint64_t end):
    """Restore a lazily freed, protected range if all its pages are still present.

    Lock on fault (mlock2: nothing is reclaimed from then on), inspect, lift the protection, populate for writing
    (which cancels the lazy free), unlock.

    Returns
    -------
    tuple[bool, int, int]
        Whether every page was present; otherwise which call failed (`LOCKING`: mlock2; 0: none) and its error number.
    """
    cdef uint64_t where
    cdef size_t size = end - start
    cdef int found = 0, step = C_LOCK, error = 0
    with nogil:
        if c_mlock2(<void *><uintptr_t>start, size, 1):
            error = errno
        else:
            step = C_SCAN
            found = iobmd_first_lost(pagemap, start, end, &where)
            if found < 0:
                error = errno
            elif found == 0:
                step = C_UNPROTECT
                # Not left to the populate call, which would cause one page fault for each page.
                if iobmd_uffd_protect(tracker, start, size, 0):
                    error = errno
                else:
                    step = C_POPULATE
                    if c_madvise(<void *><uintptr_t>start, size, C_MADV_POPULATE_WRITE):
                        error = errno
                        iobmd_uffd_protect(tracker, start, size, 1)  # all present: restore the protection
            c_munlock(<void *><uintptr_t>start, size)
    if error:
        return False, step, error
    return found == 0, 0, 0


def hugetlb_page(int fd):
    """Return the page size of a file of hugetlbfs, 0 for one of tmpfs (a memfd). Raises ValueError for others."""
    cdef statfs_t status
    _check(fstatfs(fd, &status), "fstatfs")
    if status.f_type == HUGETLBFS_MAGIC:
        return status.f_bsize
    if status.f_type != TMPFS_MAGIC:
        raise ValueError("not memory: a file of another file system")
    return 0


def mount_tmpfs(dict options):
    """Return a descriptor of the root of a new tmpfs with mount options as text; it is freed with its last user."""
    cdef int context = _check(iobmd_fsopen("tmpfs"), "fsopen")
    try:
        for name, value in options.items():
            _check(iobmd_fsconfig(context, FSCONFIG_SET_STRING, name.encode(), value.encode()), "fsconfig")
        _check(iobmd_fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL), "fsconfig")
        return _check(iobmd_fsmount(context), "fsmount")
    finally:
        close(context)


cdef extern from * nogil:
    """
    /* linux/mman.h since 6.5; the number is the same on all architectures of this package. */
    #ifndef __NR_cachestat
    #define __NR_cachestat 451
    #endif
    struct iobmd_cachestat_range {
        unsigned long long offset, length;
    };
    struct iobmd_cachestat {
        unsigned long long cached, dirty, writeback, evicted, recently_evicted;
    };
    static long iobmd_cachestat(int fd, struct iobmd_cachestat_range *range, struct iobmd_cachestat *found)
    {
        return syscall(__NR_cachestat, fd, range, found, 0);
    }
    """
    struct iobmd_cachestat_range:
        unsigned long long offset, length
    struct iobmd_cachestat_t "iobmd_cachestat":
        unsigned long long cached, dirty, writeback, evicted, recently_evicted
    long c_cachestat "iobmd_cachestat"(int fd, iobmd_cachestat_range *range, iobmd_cachestat_t *found)


def cachestat(int fd, uint64_t offset, uint64_t length):
    """Count the pages of a range of a file in the page cache (cachestat(2), Linux 6.5); nothing is read or mapped.

    Returns
    -------
    tuple[int, int, int, int]
        Pages that are cached, dirty, being written back, and recently evicted.
    """
    cdef iobmd_cachestat_range asked
    cdef iobmd_cachestat_t found
    cdef long failed
    asked.offset, asked.length = offset, length
    with nogil:
        failed = c_cachestat(fd, &asked, &found)
    _check(failed, "cachestat")
    return found.cached, found.dirty, found.writeback, found.recently_evicted


def file_incore(int fd, uint64_t offset, uint64_t length, size_t page_size):
    """Count the pages of a range of a file in the page cache, by mapping it without access (mincore(2)).

    mmap(2) changes the file's access time, unless it was opened with O_NOATIME.
    """
    cdef unsigned char there[INCORE]
    cdef uint64_t found = 0, step, index
    cdef void *start
    cdef int failed = 0
    with nogil:
        while length and not failed:
            step = min(length, INCORE * page_size)
            start = c_mmap(NULL, step, PROT_READ, MAP_SHARED, fd, offset)
            failed = -1
            if start == MAP_FAILED:
                break
            failed = c_mincore(start, step, there)
            c_munmap(start, step)
            if failed:
                break
            for index in range((step + page_size - 1) // page_size):
                found += there[index] & 1
            offset += step
            length -= step
    _check(failed, "mincore of a file")
    return found
