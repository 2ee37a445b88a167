# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Copies between this process and a task, with the GIL released: process_vm_readv and /proc/PID/mem."""

from libc.errno cimport EAGAIN, EFAULT, EINTR, EIO, EMLINK, ENOENT, ENOMEM, ESRCH, errno
from libc.stdint cimport UINT64_MAX, uint64_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset, strerror
from posix.fcntl cimport O_RDONLY
from posix.stat cimport fstat, struct_stat
from posix.unistd cimport close
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize

from attempt cimport (
    IOBMD_BOUNCE, IOBMD_BOUNCED, IOBMD_COUNTED, IOBMD_DIRECT, IOBMD_PAGED_OUT, IOBMD_RANGES, IOBMD_RESIDENT,
    iobmd_attempt, iobmd_attempt_free, iobmd_attempt_new, iobmd_attempt_start, iobmd_attempt_wait, iobmd_has_exited,
)
from mman cimport C_MADV_PAGEOUT, C_MADV_POPULATE_WRITE, C_MS_ASYNC, c_madvise, c_msync, iobmd_fault_in_huge
from pagemap_entry cimport (
    EXCLUSIVE_BIT, FILE_BIT, PRESENT_BIT, SWAP_BIT, UFFD_WP_BIT, iobmd_entries, iobmd_is_swapped,
)
from pagemap_scan cimport (
    C_PAGE_IS_FILE, C_PAGE_IS_PFNZERO, C_PAGE_IS_PRESENT, C_PAGE_IS_SWAPPED, iobmd_page_region, iobmd_scan,
    iobmd_wanted,
)
from procmap_query cimport C_VMA_READABLE, IOBMD_PROCMAP_QUERY, ioctl, iobmd_procmap_query
from uio cimport (
    O_CLOEXEC, SYS_pidfd_getfd, SYS_process_madvise, c_open, iovec, pread, process_vm_readv, process_vm_writev,
    pwrite, syscall,
)

cdef enum:
    # Maximum number of pages found by one read of pagemap: a few huge pages of 2 MiB in pages of 4 KiB, or one of 32
    # MiB in 16 KiB. They are transferred before the next read, so that few have changed since.
    PAGES = 2048
    # Maximum number of ranges of such pages; PAGEMAP_SCAN finds at most this number in one walk.
    RUNS = 512
    # Maximum number of pages of the address range that one PAGEMAP_SCAN walks: mmap calls of the task wait for it,
    # for 0.5 ms if page tables are empty.
    STEP = 1 << 16
    VECTORS = RUNS
    FEW = 17  # pages

cdef enum:
    C_NEEDS_FILE = EMLINK  # which no call of a transfer returns

cdef enum Kind:
    DIRECT  # can be copied without creating a page in the task, and without waiting for another program
    # The same, but an anonymous page that other tasks may map, since a fork or by KSM: the kernel copies it before
    # process_vm_readv(2) pins it, and for a write (see iobmd.task.shared_pages).
    SHARED
    SWAPPED  # as SHARED, but reading the page swaps it in
    ABSENT


cdef inline bint _is_shared(uint64_t entry) noexcept nogil:
    return not entry & (FILE_BIT | EXCLUSIVE_BIT)


cdef inline Kind _kind(uint64_t entry, bint write) noexcept nogil:
    """Classify a page. Writing to a page that userfaultfd protects waits for its handler: it counts as absent."""
    if write and entry & UFFD_WP_BIT:
        return ABSENT
    if entry & PRESENT_BIT:
        return SHARED if _is_shared(entry) else DIRECT
    if entry & SWAP_BIT:
        if iobmd_is_swapped(entry):
            return DIRECT if write else SWAPPED
        # UFFD_WP_BIT: the marker of a write-protected page that no longer exists. For guard and poisoned pages, the
        # transfer fails.
        if entry & UFFD_WP_BIT:
            return ABSENT
        return SHARED if _is_shared(entry) else DIRECT
    return ABSENT


cdef struct Bounds:
    uint64_t *bounds  # the start and the end of each
    size_t count, room


cdef struct Way:
    int pid, memory, pidfd
    bint write, skip
    size_t page
    const Bounds *readable  # where shared pages are read through `memory`; NULL: all pages are, or none


cdef int _add(Bounds *ranges, uint64_t start, uint64_t end) noexcept nogil:
    """Add a range, or extend the previous one if they adjoin; return -1 if no memory is available."""
    cdef uint64_t *grown
    if start >= end:
        return 0
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


cdef size_t _first(const Bounds *ranges, uint64_t address) noexcept nogil:
    """Return the index of the first range that ends above an address."""
    cdef size_t low = 0, high = ranges.count, middle
    while low < high:
        middle = (low + high) // 2
        if ranges.bounds[2 * middle + 1] > address:
            high = middle
        else:
            low = middle + 1
    return low


cdef bint _contains(const Bounds *ranges, uint64_t start, uint64_t *end) noexcept nogil:
    """Return whether ranges contain an address; `end` is lowered to the next address for which that differs."""
    cdef size_t index = _first(ranges, start)
    cdef bint inside = index < ranges.count and ranges.bounds[2 * index] <= start
    if index < ranges.count:
        end[0] = min(end[0], ranges.bounds[2 * index + inside])
    return inside


# Ranges up to 1 << 64 also end here, because nothing is mapped at the last byte.
cdef uint64_t LAST = UINT64_MAX


cdef class Ranges:
    """Disjoint ascending ranges of addresses: a sequence of (start, end).

    Sparse memory may have hundreds of thousands of ranges, and creating tuples for them would take longer than the
    copy.

    Parameters
    ----------
    ranges
        (start, end), ascending; adjacent ones are joined.
    """

    cdef Bounds found

    def __cinit__(self, ranges=()):
        for start, end in ranges:
            self.add(start, end)

    def __dealloc__(self):
        free(self.found.bounds)

    cdef int add(self, uint64_t start, uint64_t end) except -1:
        if _add(&self.found, start, end):
            raise MemoryError()
        return 0

    def __len__(self):
        return self.found.count

    def __getitem__(self, Py_ssize_t index):
        if index < 0:
            index += self.found.count
        if not 0 <= index < <Py_ssize_t>self.found.count:
            raise IndexError(index)
        return self.found.bounds[2 * index], self.found.bounds[2 * index + 1]

    def __iter__(self):
        cdef size_t index
        for index in range(self.found.count):
            yield self.found.bounds[2 * index], self.found.bounds[2 * index + 1]

    @property
    def size(self):
        """The total number of bytes."""
        cdef uint64_t total = 0
        cdef size_t index
        for index in range(self.found.count):
            total += self.found.bounds[2 * index + 1] - self.found.bounds[2 * index]
        return total

    def between(self, uint64_t start, end):
        """Return the parts of the ranges between two addresses."""
        cdef Ranges part = Ranges()
        cdef size_t index = _first(&self.found, start)
        cdef uint64_t stop = min(end, LAST)
        while index < self.found.count and self.found.bounds[2 * index] < stop:
            part.add(max(start, self.found.bounds[2 * index]), min(stop, self.found.bounds[2 * index + 1]))
            index += 1
        return part

    def outside(self, uint64_t start, end):
        """Return the ranges between two addresses that are in none of these."""
        cdef Ranges part = Ranges()
        cdef size_t index = _first(&self.found, start)
        cdef uint64_t stop = min(end, LAST)
        while index < self.found.count and self.found.bounds[2 * index] < stop:
            part.add(start, self.found.bounds[2 * index])
            start = max(start, self.found.bounds[2 * index + 1])
            index += 1
        part.add(start, stop)
        return part

    def whole(self, uint64_t theirs, uint64_t ours, size_t unit):
        """Return the whole units of `unit` bytes in the ranges, as (start, end), moved from `theirs` to `ours`."""
        cdef uint64_t start, end, shift = ours - theirs
        cdef size_t index
        parts = []
        for index in range(self.found.count):
            start = self.found.bounds[2 * index] + shift
            end = self.found.bounds[2 * index + 1] + shift
            start += (unit - start % unit) % unit
            end -= end % unit
            if start < end:
                parts.append((start, end))
        return parts

    def cuts(self, uint64_t start, size_t most, size_t unit):
        """Return where to divide the addresses from `start` on into parts with about `most` bytes of the ranges.

        The results are offsets from `start`, in multiples of `unit`, which is less than `most`; the first is 0.
        """
        cdef uint64_t at, end, last = 0, left = most
        cdef size_t index
        offsets = [0]
        for index in range(self.found.count):
            at, end = self.found.bounds[2 * index] - start, self.found.bounds[2 * index + 1] - start
            while end - at > left:
                at += left
                last = at - at % unit
                offsets.append(last)
                left = most
            left -= end - at
        return offsets

    @staticmethod
    def joined(parts, end):
        """Return the parts of several disjoint Ranges that are below an address."""
        cdef Ranges whole = Ranges()
        cdef uint64_t stop = min(end, LAST)
        cdef Ranges part
        cdef size_t index
        for part in sorted(parts, key=_start):
            for index in range(part.found.count):
                if part.found.bounds[2 * index] < stop:
                    whole.add(part.found.bounds[2 * index], min(stop, part.found.bounds[2 * index + 1]))
        return whole


def _start(Ranges part):
    return part.found.bounds[0] if part.found.count else 0


cdef struct Batch:
    # Ranges of the task and of this process, pairwise of the same length, which one call transfers.
    iovec ours[VECTORS]
    iovec theirs[VECTORS]
    bint by_file[VECTORS]
    int count
    # The whole pages of `theirs` that the call swaps in.
    iovec swapped[VECTORS]
    int swaps


cdef ssize_t _call(const Way *way, const Batch *batch, int first) noexcept nogil:
    """Transfer from the range with the index `first` on: this range, or as many as one call can."""
    cdef const iovec *ours = &batch.ours[first]
    cdef const iovec *theirs = &batch.theirs[first]
    cdef int count = 0
    if batch.by_file[first]:
        if way.write:
            return pwrite(way.memory, ours.iov_base, ours.iov_len, <long><uintptr_t>theirs.iov_base)
        return pread(way.memory, ours.iov_base, ours.iov_len, <long><uintptr_t>theirs.iov_base)
    while first + count < batch.count and not batch.by_file[first + count]:
        count += 1
    if way.write:
        return process_vm_writev(way.pid, ours, count, theirs, count, 0)
    return process_vm_readv(way.pid, ours, count, theirs, count, 0)


cdef int _move(const Way *way, Batch *batch, uint64_t *stopped, Bounds *bad) noexcept nogil:
    """Transfer a batch; return the error number that ended it, and in `stopped` the address at which it ended.

    With `skip`, pages that cannot be read are listed in `bad` and skipped.
    """
    cdef int first = 0
    cdef ssize_t moved
    cdef size_t step
    cdef uint64_t at
    while first < batch.count:
        if not batch.by_file[first] and iobmd_has_exited(way.pidfd):
            stopped[0] = <uintptr_t>batch.theirs[first].iov_base
            return ESRCH
        moved = _call(way, batch, first)
        if moved <= 0:
            if moved < 0 and errno == EINTR:
                continue
            if batch.by_file[first] and way.readable != NULL:
                # The page has disappeared since. The call waits for a new one, or returns the reason.
                batch.by_file[first] = False
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
        # Return the pages to swap, so that reading the task does not increase its memory. Requires CAP_SYS_NICE.
        syscall(SYS_process_madvise, way.pidfd, batch.swapped, <long>batch.swaps, C_MADV_PAGEOUT, 0)
    batch.count = batch.swaps = 0
    return 0


cdef struct Run:
    uint64_t start, end
    Kind kind


cdef struct Look:
    # Pages of a task that are not absent, as its open pagemap shows them.
    int pagemap
    bint write
    bint scans  # whether to try PAGEMAP_SCAN
    bint divided  # whether shared pages have separate runs
    size_t page
    Run runs[RUNS]  # ascending
    int count
    iobmd_page_region regions[RUNS]
    uint64_t entries[PAGES]


cdef bint _is_full(Look *look, uint64_t start, uint64_t end, Kind kind) noexcept nogil:
    """Add a run, or extend the previous one; return True if there is no room for it."""
    cdef Run *last
    if look.count:
        last = &look.runs[look.count - 1]
        if last.end == start and last.kind == kind:
            last.end = end
            return False
    if look.count == RUNS:
        return True
    look.runs[look.count].start, look.runs[look.count].end, look.runs[look.count].kind = start, end, kind
    look.count += 1
    return False


cdef int _read_entries(Look *look, uint64_t start, uint64_t end, uint64_t *reached) noexcept nogil:
    """As `_look`, by reading the entries of pages."""
    cdef size_t count = min((end - start) // look.page, <uint64_t>PAGES), index
    cdef ssize_t got = iobmd_entries(look.pagemap, start // look.page, look.entries, count)
    cdef Kind kind
    if got < 1:
        # Past the end of the user address space, or the memory no longer exists.
        return errno if got < 0 else EFAULT if iobmd_entries(look.pagemap, 0, look.entries, 1) == 1 else ESRCH
    for index in range(<size_t>got):
        kind = _kind(look.entries[index], look.write)
        if kind != ABSENT and _is_full(look, start, start + look.page, kind):
            break
        start += look.page
    reached[0] = start
    return 0


cdef int _scan(Look *look, uint64_t start, uint64_t end, uint64_t *reached) noexcept nogil:
    """As `_look`, by PAGEMAP_SCAN (Linux 6.7), which skips ranges without page tables."""
    cdef iobmd_wanted wanted
    cdef iobmd_page_region region
    cdef uint64_t pages = 0, stop = start + min(end - start, STEP * look.page), walked
    cdef uint64_t direct = C_PAGE_IS_FILE | C_PAGE_IS_PFNZERO if look.divided else C_PAGE_IS_PRESENT
    cdef int found, index, error
    memset(&wanted, 0, sizeof(wanted))
    wanted.max_pages = PAGES
    wanted.anyof = wanted.reported = C_PAGE_IS_PRESENT | C_PAGE_IS_SWAPPED
    if look.divided:
        wanted.reported |= direct
    found = iobmd_scan(look.pagemap, start, stop, &wanted, look.regions, RUNS, &walked)
    if found < 0:
        look.scans = errno == EINTR
        return _read_entries(look, start, end, reached)
    reached[0] = stop
    for index in range(found):
        region = look.regions[index]
        pages += (region.end - region.start) // look.page
        # Only its entry shows whether a page is shared, or is not really in swap (`_kind`).
        if not region.categories & C_PAGE_IS_PRESENT or not region.categories & direct:
            error = _read_entries(look, region.start, region.end, reached)
            if error or reached[0] < region.end:
                return error
            reached[0] = stop
        elif _is_full(look, region.start, region.end, DIRECT):
            reached[0] = region.start
            return 0
    if found == RUNS or pages >= PAGES:
        reached[0] = look.regions[found - 1].end
    return 0


cdef int _look(Look *look, uint64_t start, uint64_t end, uint64_t *reached) noexcept nogil:
    """Find the pages of a range that are not absent, up to the address `reached`; return an error number."""
    look.count = 0
    if look.pagemap < 0:
        _is_full(look, start, end, DIRECT)
        reached[0] = end
        return 0
    return (_scan if look.scans else _read_entries)(look, start, end, reached)


cdef struct Piece:
    uint64_t theirs, ours
    size_t size


cdef bint _is_by_file(const Way *way, Kind kind, uint64_t start, uint64_t *end) noexcept nogil:
    """Return whether an address is read through `memory`; `end` is lowered to the next one for which that differs.

    /proc/PID/mem ignores protections. Where the task itself cannot read, the call is made, which returns the error.
    """
    if way.readable == NULL:
        return way.memory >= 0
    return kind != DIRECT and _contains(way.readable, start, end)


cdef int _move_run(const Way *way, const Piece *all, uint64_t start, uint64_t end, Kind kind, bint by_file,
                   Batch *batch, uint64_t *stopped, Bounds *bad) noexcept nogil:
    """Add part of a run to the batch, and transfer the batch when it is full, as `_move`."""
    batch.theirs[batch.count].iov_base = <void *><uintptr_t>start
    batch.ours[batch.count].iov_base = <void *><uintptr_t>(all.ours + (start - all.theirs))
    batch.theirs[batch.count].iov_len = batch.ours[batch.count].iov_len = end - start
    batch.by_file[batch.count] = by_file
    batch.count += 1
    if kind == SWAPPED and way.pidfd >= 0:
        start -= start % way.page
        batch.swapped[batch.swaps].iov_base = <void *><uintptr_t>start
        batch.swapped[batch.swaps].iov_len = (end - start + way.page - 1) // way.page * way.page
        batch.swaps += 1
    return _move(way, batch, stopped, bad) if batch.count == VECTORS else 0


cdef int _move_runs(const Way *way, const Piece *all, const Run *runs, uint64_t start, uint64_t end, size_t huge,
                    Batch *batch, uint64_t *stopped, Bounds *bad) noexcept nogil:
    """Like `_move_run`, for adjacent runs; the first contains `start`. Huge pages are faulted in beforehand.

    Ends with `NEEDS_FILE` at the first shared page for which `memory` is missing.
    """
    cdef uint64_t until, stop, shift = all.ours - all.theirs
    cdef bint whole, by_file
    cdef int error
    while start < end:
        until, whole = end, False
        if huge:
            until = min(end, start + (huge - (start + shift) % huge))
            whole = until - start == huge
        if whole:
            error = _move(way, batch, stopped, bad)
            if error:
                return error
            iobmd_fault_in_huge(start + shift, huge, way.page)
        while start < until:
            if way.readable != NULL and way.memory < 0 and runs.kind != DIRECT:
                error = _move(way, batch, stopped, bad)
                if not error:
                    stopped[0] = start
                return error or C_NEEDS_FILE
            stop = min(until, runs.end)
            by_file = _is_by_file(way, runs.kind, start, &stop)
            error = _move_run(way, all, start, stop, runs.kind, by_file, batch, stopped, bad)
            if error:
                return error
            start = stop
            runs += start == runs.end
    return 0


cdef int _transfer(const Way *way, int pagemap, Piece all, size_t huge, uint64_t *stopped, Bounds *absent,
                   Bounds *bad) noexcept nogil:
    cdef Look look
    cdef Batch batch
    cdef uint64_t at = all.theirs, end = all.theirs + all.size, known = at, start, stop, reached, cut
    cdef int first, last, error
    look.pagemap, look.write, look.scans, look.page = pagemap, way.write, not way.write, way.page
    look.divided = way.readable != NULL
    batch.count = batch.swaps = 0
    if huge > PAGES * way.page:
        huge = 0
    if end < at:  # nothing is mapped at the end of the address space
        stopped[0] = at
        return EFAULT
    while at < end:
        error = _look(&look, at - at % way.page, end + (way.page - end % way.page) % way.page, &reached)
        if error:
            stopped[0] = at
            return ENOMEM if _add(absent, known, at) else error
        last = 0
        while last < look.count:
            first = last
            stop = look.runs[first].end
            last += 1
            while last < look.count and look.runs[last].start == stop:
                stop = look.runs[last].end
                last += 1
            start, stop = max(look.runs[first].start, at), min(stop, end)
            if huge and last == look.count and stop == reached and reached < end:
                # The run may continue: the next scan finds the rest of a huge page together with its beginning.
                cut = max(start, stop - min(stop, (stop + all.ours - all.theirs) % huge))
                if cut > at:
                    stop = reached = cut
            if _add(absent, known, start):
                stopped[0] = known
                return ENOMEM
            known = stop
            error = _move_runs(way, &all, &look.runs[first], start, stop, huge, &batch, stopped, bad)
            if error:
                return error
        error = _move(way, &batch, stopped, bad)
        if error:
            return error
        at = reached
    if _add(absent, known, end):
        stopped[0] = known
        return ENOMEM
    return 0


NEEDS_FILE = C_NEEDS_FILE


def transfer(int pid, int memory, int pagemap, int pidfd, bint write, bint skip, uint64_t theirs, uint64_t ours,
             size_t size, size_t page, size_t huge=0, Ranges readable=None):
    """Copy the bytes that require no new page in a task, between `theirs` in the task and `ours` in this process.

    Parameters
    ----------
    pid, memory
        The task for process_vm_readv and process_vm_writev or, if `memory` is not negative, its open /proc/PID/mem.
    pagemap, pidfd
        Its open pagemap, and its pidfd. Without a pagemap (-1) every page counts as present. Pages read from swap are
        returned there by process_madvise(2) on the pidfd, which also serves to check before each call that the pid
        still belongs to the task.
    write
        Whether to copy to the task instead of from it.
    skip
        Whether to skip pages that cannot be read, and list them.
    page
        The base page size.
    huge
        Size of the huge pages that the fresh destination may have, 0 if it is not fresh: a huge page is faulted in
        before the copy if all of its bytes will be copied.
    readable
        None, or the addresses at which shared pages (`Kind`) may be read through `memory`, because the task itself
        may read there: all others are then read by the call.

    Returns
    -------
    tuple[int, int, Ranges, Ranges]
        The address in the task that the copy reached, the error number that ended it (0: none; `NEEDS_FILE`: with
        `readable` but without `memory`, the page there is shared), the ranges of absent pages before that address,
        and the ranges that could not be read.
    """
    cdef Way way
    cdef Piece all
    cdef Ranges absent = Ranges(), bad = Ranges()
    cdef uint64_t stopped = theirs + size
    cdef int error
    way.pid, way.memory, way.pidfd, way.write, way.skip, way.page = pid, memory, pidfd, write, skip, page
    way.readable = NULL if readable is None else &readable.found
    all.theirs, all.ours, all.size = theirs, ours, size
    with nogil:
        error = _transfer(&way, pagemap, all, huge, &stopped, &absent.found, &bad.found)
    return stopped, error, absent, bad


cdef bint _is_unmapped(int pagemap, const char *maps, uint64_t address, size_t page) noexcept nogil:
    """Return whether the kernel reports no area at an address, whose page is absent."""
    cdef iobmd_wanted anything
    cdef iobmd_page_region region
    cdef uint64_t walked, start = address - address % page
    cdef iobmd_procmap_query arg
    cdef int failed, found, fd
    # A scan (Linux 6.7) reports the absent pages of an area, except of device memory (VM_PFNMAP), which cannot be
    # read. Opening maps instead would take a third of the time of all calls for the page.
    memset(&anything, 0, sizeof(anything))
    found = iobmd_scan(pagemap, start, start + page, &anything, &region, 1, &walked)
    if found >= 0:
        return not found
    fd = c_open(maps, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return False
    memset(&arg, 0, sizeof(arg))
    arg.size = sizeof(arg)
    arg.query_addr = address
    failed = ioctl(fd, IOBMD_PROCMAP_QUERY, &arg)
    failed = failed and errno == ENOENT
    close(fd)
    return failed


cdef ssize_t _read_unpinned(const char *maps, const char *memory, const iovec *ours, uint64_t theirs) noexcept nogil:
    """Read bytes through /proc/PID/mem; return their number, -1 unless the task itself may read all of them."""
    cdef iobmd_procmap_query area
    cdef uint64_t at = theirs
    cdef ssize_t moved = -1
    cdef int fd = c_open(maps, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return -1
    while at < theirs + ours.iov_len:
        memset(&area, 0, sizeof(area))
        area.size = sizeof(area)
        area.query_addr, area.query_flags = at, C_VMA_READABLE
        if ioctl(fd, IOBMD_PROCMAP_QUERY, &area):  # it is not mapped readable; or before Linux 6.11
            break
        at = area.vma_end
    close(fd)
    if at >= theirs + ours.iov_len:
        fd = c_open(memory, O_RDONLY | O_CLOEXEC)
        if fd >= 0:
            moved = pread(fd, ours.iov_base, ours.iov_len, <long>theirs)
            close(fd)
    return moved


def move_present(bytes folder, uint64_t device, int pid, int pidfd, bint write, bint fresh, uint64_t theirs,
                 uint64_t ours, size_t size, size_t page):
    """As `transfer`, for a few pages that are present, with as few calls as possible.

    Parameters
    ----------
    folder, device
        The directory of the task in /proc, and the device number of /proc; no other file system is accepted.
    pidfd
        Used before and after a call to verify that the pid still belongs to the task; -1 for this process.
    fresh
        Whether the destination is new: its pages are then faulted in by one call beforehand.
    pid, write, theirs, ours, size, page
        As for `transfer`.

    Returns
    -------
    int
        0: all bytes were copied. EFAULT: nothing is mapped at the first byte. Any other number: use `transfer`.
    """
    cdef uint64_t entries[FEW]
    cdef uint64_t first = theirs // page
    cdef size_t count = (theirs + size - 1) // page - first + 1, index
    cdef bytes pagemap = folder + b"/pagemap", maps = folder + b"/maps", memory = folder + b"/mem"
    cdef const char *path = pagemap
    cdef const char *areas = maps
    cdef const char *contents = memory
    cdef bint shared = False
    cdef struct_stat mounted
    cdef iovec here, there
    cdef int fd, error = EAGAIN
    cdef ssize_t moved
    if count > FEW:
        return EAGAIN
    with nogil:
        fd = c_open(path, O_RDONLY | O_CLOEXEC)
        if fd >= 0:
            if not fstat(fd, &mounted) and <uint64_t>mounted.st_dev == device:
                if iobmd_entries(fd, first, entries, count) == <ssize_t>count:
                    error = 0
                    for index in range(count):
                        if not entries[index] & PRESENT_BIT or (write and entries[index] & UFFD_WP_BIT):
                            error = EAGAIN
                            break
                        shared |= not write and _is_shared(entries[index])
                    if error and not index and not entries[0] and _is_unmapped(fd, areas, theirs, page):
                        error = EFAULT
            close(fd)
        if not error and iobmd_has_exited(pidfd):
            error = EAGAIN
        if not error:
            if fresh and count > 1:
                # A failure (before Linux 5.14) has no effect.
                c_madvise(<void *><uintptr_t>(ours - ours % page), (size + ours % page + page - 1) // page * page,
                          C_MADV_POPULATE_WRITE)
            here.iov_base, there.iov_base = <void *><uintptr_t>ours, <void *><uintptr_t>theirs
            here.iov_len = there.iov_len = size
            if write:
                moved = process_vm_writev(pid, &here, 1, &there, 1, 0)
            elif shared:
                moved = _read_unpinned(areas, contents, &here, theirs)
            else:
                moved = process_vm_readv(pid, &here, 1, &there, 1, 0)
            if moved != <ssize_t>size:
                error = EAGAIN
        if error != EAGAIN and iobmd_has_exited(pidfd):
            error = EAGAIN
    return error


def absent(int pagemap, uint64_t theirs, size_t size, size_t page):
    """Return the ranges of a task's absent pages, by its open pagemap; pages that it omits count as present."""
    cdef Ranges found = Ranges()
    cdef Look look
    cdef uint64_t at = theirs - theirs % page, end = theirs + size, known = theirs, reached
    cdef int failed = 0, index
    look.pagemap, look.write, look.scans, look.divided, look.page = pagemap, False, True, False, page
    with nogil:
        while at < end and not failed:
            if _look(&look, at, end + (page - end % page) % page, &reached):
                break
            for index in range(look.count):
                failed |= _add(&found.found, known, look.runs[index].start)
                known = max(known, look.runs[index].end)
            at = reached
        failed |= _add(&found.found, known, min(at, end))
    if failed:
        raise MemoryError()
    return found


def count_shared(int pagemap, uint64_t theirs, size_t size, size_t page):
    """Return the bytes of a task's present pages that other tasks may map, by its open pagemap."""
    cdef uint64_t entries[PAGES]
    cdef uint64_t first = theirs // page, end = (theirs + size - 1) // page + 1
    cdef ssize_t got = 1, index
    cdef size_t count = 0
    with nogil:
        while first < end and got > 0:
            got = iobmd_entries(pagemap, first, entries, min(end - first, <uint64_t>PAGES))
            for index in range(got):
                if entries[index] & PRESENT_BIT and _is_shared(entries[index]):
                    count += 1
            first += max(got, 0)
    return count * page


def by_kind(bytes entries, uint64_t start, uint64_t end, bint write, size_t page):
    """Divide addresses of a task by the entries of pagemap for their pages, the first for that of `start`.

    Returns
    -------
    tuple[Ranges, Ranges, Ranges, bool]
        The parts that can be copied directly, the whole pages of these that a read swaps in, the absent parts, and
        whether some pages are shared (`Kind`).
    """
    cdef Ranges present = Ranges(), swapped = Ranges(), absent = Ranges()
    cdef bint shared = False
    cdef const char *data = entries
    cdef size_t index
    cdef uint64_t entry, at = start - start % page
    cdef Kind kind
    for index in range(len(entries) // sizeof(entry)):
        memcpy(&entry, data + index * sizeof(entry), sizeof(entry))
        kind = _kind(entry, write)
        (absent if kind == ABSENT else present).add(max(start, at), min(end, at + page))
        if kind == SWAPPED:
            swapped.add(at, at + page)
        shared |= kind == SHARED or kind == SWAPPED
        at += page
    return present, swapped, absent, bool(shared)


def is_mapped(uint64_t address, size_t size, size_t page):
    """Return whether a range of this process is completely mapped.

    Uses msync(2), which walks areas, not pages, and has no other effect with MS_ASYNC (mm/msync.c).
    """
    cdef int failed
    with nogil:
        failed = c_msync(<void *><uintptr_t>(address - address % page), size + address % page, C_MS_ASYNC)
    return not failed


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
    """A transfer by a child process that shares this address space and can be killed separately.

    A call that waits for another program (a fault handler, a file's server) sleeps until the page arrives or the
    process is killed. It is therefore made by the child, on separate memory. A file that a task maps is opened only
    by the child, because this process would lose its POSIX locks on that file when it closed it.

    Parameters
    ----------
    ranges
        Offsets in the file and lengths, at most `MOST_RANGES`.
    task
        The task, for process_vm_readv and process_vm_writev; the offsets are then addresses in the task.
    pidfd
        Its pidfd, or -1. With a pidfd, a pid that no longer belongs to the task is not used.
    file
        Used instead of `task`: its open /proc/PID/mem, which fails instead of waiting for a userfaultfd handler.
    write
        Whether to write to the task or file instead of reading from it.
    paths, inode, device
        Used instead of `file`: the first of these paths that leads to a regular file with that inode number, and on
        that device unless it is 0, is opened.
    opened
        Whether the file is opened. False: it is only found, and its server is not called for its length.
    ours
        The destination in this process of each range of a file of an in-memory file system (tmpfs, hugetlbfs).
        Reading such a file waits for no other program, so that the child writes directly to the destination. It
        allocates nothing in the file.
    count
        Whether only to count the bytes of such a file that are not in holes, in `moved`.
    resident
        Whether only to count the bytes of a file, in whole pages, that are resident, in `moved`.
    page_out
        Whether only to swap out the pages of the ranges, which are addresses of the task of `pidfd`.
    page, fresh, holes
        The page size of this process; whether the destination is zero, so that it is not touched for holes of the
        file; whether the file supports SEEK_DATA (hugetlbfs does not, and a read returns zeros for a hole).
    room
        The bytes of the largest transfer, if others follow (`again`).
    """

    cdef iobmd_attempt *job
    cdef size_t most, room

    def __cinit__(self, ranges, *, int task=0, int pidfd=-1, int file=-1, bint write=False, paths=(),
                  uint64_t inode=0, uint64_t device=0, bint opened=True, ours=None, bint count=False,
                  bint resident=False, bint page_out=False, size_t page=0, bint fresh=False, bint holes=True,
                  size_t room=0):
        cdef bytes joined = b"".join([path + b"\0" for path in paths]) + b"\0" if paths else b""
        cdef size_t length
        cdef uintptr_t here
        if len(ranges) > IOBMD_RANGES:
            raise ValueError("too many ranges")
        self.most, self.room = IOBMD_RANGES if room else len(ranges), IOBMD_BOUNCE if ours is not None else 0
        if ours is None and not (count or resident or page_out):
            self.room = max(room, sum([length for _at, length in ranges]))
        self.job = iobmd_attempt_new(self.most, self.room, joined, len(joined))
        if self.job == NULL:
            raise OSError(errno, f"mmap: {strerror(errno).decode()}")
        self.job.mode = IOBMD_BOUNCED if ours is None else IOBMD_DIRECT
        if count or resident:
            self.job.mode = IOBMD_COUNTED if count else IOBMD_RESIDENT
        elif page_out:
            self.job.mode = IOBMD_PAGED_OUT
        self.job.task, self.job.task_pidfd, self.job.file, self.job.writing = task, pidfd, file, write
        self.job.inode, self.job.device, self.job.found_only = inode, device, not opened
        self.job.page, self.job.fresh, self.job.holes = page, fresh, holes
        self._assign(ranges)
        if ours is not None:
            for length, here in enumerate(ours):
                self.job.ranges[length].ours = <char *>here

    cdef _assign(self, ranges):
        cdef size_t length
        cdef uint64_t at
        self.job.count, self.job.size = 0, 0
        for at, length in ranges:
            self.job.ranges[self.job.count].at = at
            self.job.ranges[self.job.count].size = length
            self.job.size += length
            self.job.count += 1

    def again(self, ranges):
        """Prepare the transfer of other ranges, of at most `room` bytes, after its child has ended.

        Newly mapped memory would have to be faulted in and cleared by each child, which costs as much as the
        transfer.
        """
        if len(ranges) > self.most or sum([length for _at, length in ranges]) > self.room or self.job.child > 0:
            raise ValueError("the ranges exceed the room of the attempt, or its child has not ended")
        self._assign(ranges)

    @property
    def address(self):
        """The address of the bytes to write, or of the bytes that were read."""
        return <uintptr_t>self.job.bytes

    @property
    def moved(self):
        """The number of bytes transferred, or counted."""
        return self.job.moved

    @property
    def data(self):
        """The bytes that were read so far."""
        return PyBytes_FromStringAndSize(self.job.bytes, self.job.moved)

    @property
    def error(self):
        """The error number that ended it, 0 for none; ECANCELED if another process killed the child."""
        return self.job.error

    @property
    def opened(self):
        """Of the opened file: the index of its path, its device, its length, and the type of its file system."""
        return self.job.chosen, self.job.opened_device, self.job.length, self.job.filesystem

    def start(self):
        """Start it. Raises OSError if no process can be created."""
        cdef int error = iobmd_attempt_start(self.job)
        if error:
            raise OSError(error, f"clone: {strerror(error).decode()}")

    def wait(self, int milliseconds):
        """Wait at most `milliseconds`; return whether it has ended."""
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
    """Return `size` bytes of arbitrary content, which the caller must fill before it uses them."""
    return PyBytes_FromStringAndSize(NULL, size)


cdef class HeldBuffer:
    """The address and size of an object's buffer, which remain valid until the end of the `with` block."""

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
    """Return a copy, in this process, of the descriptor `fd` of another process (pidfd_getfd(2), Linux 5.6)."""
    cdef long fetched
    with nogil:
        fetched = syscall(SYS_pidfd_getfd, pidfd, fd, 0)
    if fetched < 0:
        raise OSError(errno, f"pidfd_getfd: {strerror(errno).decode()}")
    return fetched


def has_exited(int pidfd):
    """Return whether the process of a pidfd has exited; False for -1."""
    return bool(iobmd_has_exited(pidfd))


def touch(int pid, int pidfd, uint64_t address, size_t size, size_t page):
    """Fault in pages of another process by reading a byte of each; return the error number or 0."""
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
            if iobmd_has_exited(pidfd):
                error = ESRCH
                break
            moved = process_vm_readv(pid, &local, 1, remote, count, 0)
            if moved < count:
                error = errno if moved < 0 else EFAULT
    return error
