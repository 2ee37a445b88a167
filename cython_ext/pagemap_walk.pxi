# Walking the pages of an address space, by /proc/PID/pagemap and, if it saves reading, PAGEMAP_SCAN. The result is a
# list of spans: contiguous pages of one state whose frames, if known, are contiguous too. Everything is read in
# steps, and no step holds the lock of the address space for long.

cdef enum:
    # Of a span.
    C_PRESENT = 1
    C_SWAPPED = 2
    C_FILE = 4
    C_ZERO = 8
    C_GUARD = 16
    C_MARKER = 32
    C_HUGE = 64
    FEW_REGIONS = 32
    HUGE_STEP = 16384  # after a step with only huge pages, because a huge page takes as long as a small one
    SPARSE_STEP = 65536  # pages per step through addresses that may be empty
    NEAR = 128  # maximum gap between two ranges, in pages, that costs less to read than another call
    MOST_PATIENCE = 64  # steps until the next check whether scanning pays

PRESENT, SWAPPED, FILE, ZERO = C_PRESENT, C_SWAPPED, C_FILE, C_ZERO
GUARD, MARKER, HUGE = C_GUARD, C_MARKER, C_HUGE
AHEAD = ENTRIES  # maximum number of pages read by `Walk.read_ahead`

cdef struct Span:
    uint64_t virtual
    uint64_t physical
    uint64_t length
    uint64_t flags


cdef inline bint _are_all(const uint64_t *entries, uint64_t one) noexcept nogil:
    """Return whether eight entries are equal."""
    return not (
        (entries[0] ^ one) | (entries[1] ^ one) | (entries[2] ^ one) | (entries[3] ^ one)
        | (entries[4] ^ one) | (entries[5] ^ one) | (entries[6] ^ one) | (entries[7] ^ one)
    )


@cython.final
cdef class Tally:
    """The sums of a walk, in bytes, and the number and order of the physically contiguous runs."""

    cdef readonly uint64_t present
    cdef readonly uint64_t hidden
    cdef readonly uint64_t swapped
    cdef readonly uint64_t file
    cdef readonly uint64_t zero
    cdef readonly uint64_t exclusive
    cdef readonly uint64_t soft_dirty
    cdef readonly uint64_t guard
    cdef readonly uint64_t marker
    cdef readonly uint64_t huge
    cdef readonly uint64_t huge_zero
    cdef readonly uint64_t runs
    cdef readonly uint64_t largest
    cdef readonly uint64_t ascending
    cdef readonly uint64_t descending


@cython.final  # whose methods are then called without a table
@cython.cdivision(True)
cdef class Walk:
    """Walks through address ranges in ascending order.

    Parameters
    ----------
    fd : int
        An open pagemap, which the caller keeps open.
    page, huge : int
        The sizes in bytes of a page, and of a huge page as the page tables map it (0: no huge pages).
    zero, huge_zero : int
        The frame number of the zero page, and the first of the huge zero page; 0 if unknown.
    thorough : bool
        Whether to scan everything, so that huge pages and zero pages are recognized even if frame numbers are hidden,
        or if a range begins or ends inside one.
    scan : bool
        Whether PAGEMAP_SCAN may be used.
    """

    cdef int fd
    cdef uint64_t page, huge, zero, huge_zero
    cdef bint thorough
    cdef public bint swapless
    """Whether nothing can be in swap: swap entries are then markers; hiding frame numbers also hides their kind."""
    cdef readonly bint scans
    """Whether PAGEMAP_SCAN is used: without it, huge pages and hidden zero pages are not recognized."""
    cdef uint64_t *entries
    cdef iobmd_page_region *regions
    cdef Tally tally
    # The current run of pages: `pages` entries from `at` on that are all equal to `entry`, or count up from it.
    cdef uint64_t at, pages, entry, expected, stride, extra
    cdef Span open  # not yet added to the spans
    cdef Span run
    cdef uint64_t last_physical
    cdef Span *spans
    cdef size_t room
    cdef readonly size_t count
    cdef int patience, skip
    cdef uint64_t most  # pages found in the next scan
    cdef bint keeps  # the spans found
    cdef bint present_only
    cdef uint64_t low, high  # physical addresses of spans that are kept
    cdef uint64_t ahead_from, ahead_to  # whose entries were read ahead

    def __cinit__(
        self, int fd, uint64_t page, uint64_t huge, uint64_t zero, uint64_t huge_zero, bint thorough, bint scan
    ):
        self.fd, self.page, self.huge, self.zero, self.huge_zero = fd, page, huge, zero, huge_zero
        self.thorough, self.scans, self.keeps = thorough, scan, True
        self.high = ~<uint64_t>0
        self.most = STEP
        self.tally = Tally.__new__(Tally)
        self.entries = <uint64_t *>malloc(ENTRIES * 8)
        self.regions = <iobmd_page_region *>malloc(REGIONS * sizeof(iobmd_page_region))
        if self.entries == NULL or self.regions == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.entries)
        free(self.regions)
        free(self.spans)

    def __len__(self):
        return self.count

    def __getitem__(self, size_t index):
        if index >= self.count:
            raise IndexError(index)
        cdef Span *span = &self.spans[index]
        return span.virtual, span.physical, span.length, span.flags

    def clear(self):
        """Remove the spans found so far, except the open one."""
        self.count = 0

    def raw(self):
        """Return the spans found so far as bytes: virtual, physical, length and flags of each, 64 bits each."""
        return (<char *>self.spans)[:self.count * sizeof(Span)]

    def within(self, uint64_t low, uint64_t high):
        """From now on keep only spans that overlap the physical addresses `low`…`high`."""
        self.low, self.high, self.present_only = low, high, True

    def collect(self):
        """Return the `Tally` since the last call, and reset it."""
        cdef Tally tally = self.tally
        self.tally = Tally.__new__(Tally)
        return tally

    def step(self, uint64_t start, uint64_t end):
        """Continue the walk from `start` towards `end`, by at most one step; return the address at which it stopped.

        Call `finish` at the end of a range. Raises OSError: the kernel's, or ENODATA if the address space ends.
        """
        cdef uint64_t until = 0
        cdef int error
        with nogil:
            error = self._step(start, end, &until)
        if error:
            raise OSError(error, f"read of pagemap: {strerror(error).decode()}")
        return until

    def total(self, uint64_t start, uint64_t end):
        """Walk from `start` to `end` and finish, without recording spans; return the same as `collect`."""
        cdef int error = 0
        self.keeps = False
        with nogil:
            while start < end and not error:
                error = self._step(start, end, &start)
            if not error:
                error = self._finish()
        self.keeps = True
        if error:
            raise OSError(error, f"read of pagemap: {strerror(error).decode()}")
        return self.collect()

    def totals(self, list ranges):
        """Return the result of `total` for each of several ranges (start, end), extended to whole pages.

        Entries are read ahead if possible, so that small ranges near each other are fastest.
        """
        cdef uint64_t start, end
        self.read_ahead(ranges)
        tallies = []
        try:
            for start, end in ranges:
                tallies.append(self.total(start // self.page * self.page, -(-end // self.page) * self.page))
        finally:
            self.ahead_to = 0  # the next request reads them again
        return tallies

    def read_ahead(self, list ranges):
        """Read the entries of small ranges (start, end) in one call, as far as there is room."""
        cdef ssize_t got
        cdef uint64_t start, end
        if len(ranges) < 2:
            return
        start, end = ranges[0][0] // self.page * self.page, ranges[-1][1]
        with nogil:
            got = iobmd_entries(
                self.fd, start // self.page, self.entries, min((end - start) // self.page, <uint64_t>ENTRIES)
            )
        self.ahead_from = start
        self.ahead_to = start + (<uint64_t>got * self.page if got > 0 else 0)

    def finish(self):
        """Close the last span and the last run."""
        cdef int error
        with nogil:
            error = self._finish()
        if error:
            raise OSError(error, f"read of pagemap: {strerror(error).decode()}")

    cdef int _finish(self) noexcept nogil:
        cdef int error = self._settle()
        if not error:
            error = self._close_span()
        self._close_run()
        self.last_physical = 0
        self.most = STEP
        return error

    cdef int _step(self, uint64_t start, uint64_t end, uint64_t *until) noexcept nogil:
        cdef uint64_t stop
        cdef int error
        # Entries that were read ahead belong to small areas: reading their pages is faster than scanning them.
        if not self.scans or (
            not self.thorough and (self.skip > 0 or (self.ahead_from <= start and end <= self.ahead_to))
        ):
            stop = start + min(end - start, STEP * self.page)
            until[0] = stop
            error = self._read(start, stop, 0)
            if self.skip:
                self.skip -= 1
                if not self.entry and self.pages * self.page >= stop - start:  # empty: scanning saves time again
                    self.skip = self.patience = 0
            return error
        return self._scan(start, end, until)

    cdef int _scan(self, uint64_t start, uint64_t end, uint64_t *until) noexcept nogil:
        cdef uint64_t here = start, read = 0, first, last, kind, walked
        cdef uint64_t stop = start + min(end - start, SPARSE_STEP * self.page)
        cdef iobmd_wanted wanted = _that_are(0, 0)
        cdef int found, index = 0, error
        wanted.max_pages = self.most
        wanted.anyof = C_PAGE_IS_PRESENT | C_PAGE_IS_SWAPPED
        wanted.reported = C_PAGE_IS_PRESENT | C_PAGE_IS_SWAPPED | C_PAGE_IS_HUGE | C_PAGE_IS_PFNZERO
        found = iobmd_scan(self.fd, start, stop, &wanted, self.regions, REGIONS, &walked)
        if found < 0:  # try again, or continue without scanning
            self.scans = errno == EINTR
            until[0] = start
            return 0
        until[0] = walked if walked > start else stop
        self.most = HUGE_STEP if found else STEP
        while index < found:
            first, last = self.regions[index].start, self.regions[index].end
            kind = self.regions[index].categories
            index += 1
            error = self._absent(here, first)
            if error:
                return error
            if not kind & C_PAGE_IS_HUGE:
                self.most = STEP
            if kind & C_PAGE_IS_HUGE and self.huge:
                error = self._read_huge(first, last, C_HUGE | (C_ZERO if kind & C_PAGE_IS_PFNZERO else 0))
            elif kind & C_PAGE_IS_PFNZERO:
                read += (last - first) // self.page
                error = self._read(first, last, C_ZERO)
            else:
                while index < found and self.regions[index].start - last <= NEAR * self.page and not (
                    self.regions[index].categories & (C_PAGE_IS_HUGE | C_PAGE_IS_PFNZERO)
                ):
                    last = self.regions[index].end
                    index += 1
                read += (last - first) // self.page
                error = self._read(first, last, 0)
            if error:
                return error
            here = last
        if read * self.page * 2 > until[0] - start:
            self.patience = min(self.patience * 2 + 1, MOST_PATIENCE)
            self.skip = self.patience
        else:
            self.patience = 0
        return self._absent(here, until[0])

    cdef int _absent(self, uint64_t start, uint64_t end) noexcept nogil:
        cdef int error
        if start >= end:
            return 0
        error = self._settle()
        self._begin(start, 0, 0)
        self.pages = (end - start) // self.page
        return error

    cdef int _read_huge(self, uint64_t start, uint64_t end, uint64_t extra) noexcept nogil:
        """Read a range of huge pages: one entry describes all pages of a page-table entry; one read covers two."""
        cdef uint64_t two[2]
        cdef uint64_t middle, stop, before
        cdef ssize_t got
        cdef int error
        while start < end:
            middle = min(end, (start // self.huge + 1) * self.huge)
            stop = min(end, middle + self.huge)
            # The last page before the boundary, and the first after it.
            got = iobmd_entries(self.fd, middle // self.page - 1, two, 2 if stop > middle else 1)
            if got < 1:
                return errno if got < 0 else ENODATA
            before = (middle - start) // self.page - 1
            if two[0] & PFN_MASK >= before:
                two[0] -= before
            elif two[0] & PFN_MASK:  # too low to belong to the same huge page
                two[0] = 0
            error = self._add_huge(start, middle, two[0], extra)
            start = middle
            if not error and got == 2:
                error = self._add_huge(middle, stop, two[1], extra)
                start = stop
            if error:
                return error
        return 0

    cdef int _add_huge(self, uint64_t start, uint64_t stop, uint64_t entry, uint64_t extra) noexcept nogil:
        """Count the pages of a huge page, or of a part of one, whose first page has this entry."""
        cdef uint64_t pages = (stop - start) // self.page, frame = entry & PFN_MASK
        cdef int error
        # Part or all of it may have been freed or replaced in the meantime: a huge page is aligned to its size.
        if not entry & PRESENT_BIT or (frame and (frame * self.page ^ start) & (self.huge - 1)):
            return self._read(start, stop, 0)
        if self.pages and entry == self.expected and extra == self.extra and frame:
            self.pages += pages
            self.expected += pages
            return 0
        error = self._settle()
        self._begin(start, entry, extra)
        self.pages = pages
        self.expected = entry + self.stride * pages
        return error

    cdef int _read(self, uint64_t start, uint64_t end, uint64_t extra) noexcept nogil:
        cdef uint64_t entry, expected, stride, pages
        cdef uint64_t *entries
        cdef ssize_t got
        cdef size_t index, many
        cdef int error
        if extra != self.extra:
            error = self._settle()
            if error:
                return error
        while start < end:
            entries = self.entries
            if self.ahead_from <= start and end <= self.ahead_to:
                entries += (start - self.ahead_from) // self.page
                many = (end - start) // self.page
            else:
                self.ahead_to = 0
                got = iobmd_entries(
                    self.fd, start // self.page, entries, min((end - start) // self.page, <uint64_t>ENTRIES)
                )
                if got < 1:
                    return errno if got < 0 else ENODATA
                many = got
            index = 0
            while index < many:
                # Most pages follow the previous one, as in a large folio, or are absent like the previous one.
                expected, stride, pages = self.expected, self.stride, self.pages
                if pages:
                    # Absent pages mostly occur in long runs: skip eight entries at once.
                    while not stride and index + 8 <= many and _are_all(entries + index, expected):
                        pages += 8
                        index += 8
                    while index < many and entries[index] == expected:
                        expected += stride
                        pages += 1
                        index += 1
                    self.expected, self.pages = expected, pages
                    if index == many:
                        break
                    error = self._settle()
                    if error:
                        return error
                entry = entries[index]
                self._begin(start + index * self.page, entry, extra)
                self.pages = 1
                self.expected += self.stride
                index += 1
            start += many * self.page
        return 0

    cdef void _begin(self, uint64_t at, uint64_t entry, uint64_t extra) noexcept nogil:
        """Begin a run at the page `at`, whose entry is `entry`; the caller counts the page."""
        self.at, self.entry, self.expected, self.extra = at, entry, entry, extra
        self.stride = 1 if entry & PRESENT_BIT and entry & PFN_MASK else 0

    cdef int _settle(self) noexcept nogil:
        """Count the pages of the current run, and add them to a span."""
        cdef uint64_t entry = self.entry, length = self.pages * self.page, flags = self.extra, frame
        cdef uint64_t at = self.at
        if not length:
            return 0
        self.pages = 0
        self.at += length
        frame = entry & PFN_MASK
        if entry & PRESENT_BIT:
            flags |= C_PRESENT
            self.tally.present += length
            if entry & EXCLUSIVE_BIT:
                self.tally.exclusive += length
            if entry & FILE_BIT:
                flags |= C_FILE
                self.tally.file += length
            if not frame:
                self.tally.hidden += length
            elif frame == self.zero:
                flags |= C_ZERO
            elif self.huge_zero and frame - self.huge_zero < self.huge // self.page:
                flags |= C_ZERO | C_HUGE
        elif entry & SWAP_BIT:
            if entry & GUARD_BIT:
                flags |= C_GUARD
                self.tally.guard += length
            elif self.swapless or iobmd_is_marker(entry):
                flags |= C_MARKER
                self.tally.marker += length
            else:
                flags |= C_SWAPPED
                self.tally.swapped += length
            frame = 0
        else:
            return self._close_span()
        if entry & SOFT_DIRTY_BIT:
            self.tally.soft_dirty += length
        frame *= self.page
        if (
            self.open.length and self.open.virtual + self.open.length == at and self.open.flags == flags
            and self._follows(&self.open, frame)
        ):
            self.open.length += length
            return 0
        cdef int error = self._close_span()
        self.open = Span(at, frame, length, flags)
        return error

    cdef bint _follows(self, Span *span, uint64_t physical) noexcept nogil:
        """Return whether the next page, in the frame `physical` and with the same flags, belongs to the span."""
        if not span.physical or (span.flags & C_ZERO and not span.flags & C_HUGE):  # the same frame repeatedly
            return span.physical == physical
        return span.physical + span.length == physical

    cdef int _close_span(self) noexcept nogil:
        """Add the open span to those found, split if huge pages map only a part of it."""
        cdef Span span = self.open
        cdef uint64_t first, last, here, stop
        cdef iobmd_page_region regions[FEW_REGIONS]
        cdef iobmd_wanted wanted = _that_are(C_PAGE_IS_PRESENT | C_PAGE_IS_HUGE, 0)
        cdef uint64_t walked
        cdef int found, index, error
        self.open.length = 0
        if not span.length:
            return 0
        if span.length < self.huge or not (self.scans and self.huge and span.physical) or span.flags & C_HUGE:
            return self._add(span.virtual, span.physical, span.length, span.flags)
        first = (span.virtual + self.huge - 1) // self.huge * self.huge
        last = (span.virtual + span.length) // self.huge * self.huge
        if first >= last or (span.virtual ^ span.physical) & (self.huge - 1):
            return self._add(span.virtual, span.physical, span.length, span.flags)
        wanted.reported |= C_PAGE_IS_PFNZERO
        here = span.virtual
        while first < last:
            found = iobmd_scan(
                self.fd, first, first + min(last - first, STEP * self.page), &wanted, regions, FEW_REGIONS, &walked
            )
            if found < 0:
                break
            for index in range(found):
                self.skip = self.patience = 0
                stop = regions[index].end
                error = self._add_part(&span, here, regions[index].start, 0)
                if not error:
                    error = self._add_part(
                        &span, regions[index].start, stop,
                        C_HUGE | (C_ZERO if regions[index].categories & C_PAGE_IS_PFNZERO else 0),
                    )
                if error:
                    return error
                here = stop
            first = max(walked, first + self.huge)
        return self._add_part(&span, here, span.virtual + span.length, 0)

    cdef int _add_part(self, Span *span, uint64_t start, uint64_t end, uint64_t extra) noexcept nogil:
        if start >= end:
            return 0
        return self._add(start, span.physical + (start - span.virtual), end - start, span.flags | extra)

    cdef int _add(self, uint64_t virtual, uint64_t physical, uint64_t length, uint64_t flags) noexcept nogil:
        cdef Span *more
        cdef Span *last
        if flags & C_HUGE:
            self.tally.huge += length
            if flags & C_ZERO:
                self.tally.huge_zero += length
        if flags & C_ZERO:
            self.tally.zero += length
            if flags & C_FILE:  # as reported for the huge zero page
                self.tally.file -= length
                flags &= ~<uint64_t>C_FILE
        if flags & C_ZERO and physical and not flags & C_HUGE:
            self._close_run()
            self._count_runs(length // self.page, self.page)
        elif physical:
            if self.run.virtual + self.run.length == virtual and self.run.physical + self.run.length == physical:
                self.run.length += length
            else:
                self._close_run()
                self.run = Span(virtual, physical, length, 0)
        cdef uint64_t frames = self.page if flags & C_ZERO and not flags & C_HUGE else length
        if not self.keeps or physical >= self.high or physical + frames <= self.low:
            return 0
        if self.present_only and not flags & C_PRESENT:  # swapped pages have no physical address
            return 0
        if self.count:
            last = &self.spans[self.count - 1]
            if (
                last.flags == flags and last.virtual + last.length == virtual and self._follows(last, physical)
            ):
                last.length += length
                return 0
        if self.count == self.room:
            more = <Span *>realloc(self.spans, (self.room * 2 + 64) * sizeof(Span))
            if more == NULL:
                return errno
            self.spans = more
            self.room = self.room * 2 + 64
        self.spans[self.count] = Span(virtual, physical, length, flags)
        self.count += 1
        return 0

    cdef void _count_runs(self, uint64_t many, uint64_t length) noexcept nogil:
        self.tally.runs += many
        self.tally.largest = max(self.tally.largest, length)

    cdef void _close_run(self) noexcept nogil:
        if not self.run.length:
            return
        self._count_runs(1, self.run.length)
        if self.last_physical:
            if self.run.physical > self.last_physical:
                self.tally.ascending += 1
            elif self.run.physical < self.last_physical:
                self.tally.descending += 1
        self.last_physical = self.run.physical
        self.run.length = 0
