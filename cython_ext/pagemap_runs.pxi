# Physically contiguous runs of pages, read from pagemap into plain arrays, and segments split from them

cdef enum:
    LOOKS = 10000


cdef struct Run:
    uint64_t virtual
    uint64_t physical
    uint64_t length


cdef class PhysicalSegment:
    """Physically contiguous bytes: `address` and `length`, in bytes. Unpacks like a pair."""

    cdef readonly uint64_t address
    cdef readonly uint64_t length

    def __init__(self, uint64_t address, uint64_t length):
        self.address = address
        self.length = length

    def __iter__(self):
        return iter((self.address, self.length))

    def __eq__(self, other):
        if not isinstance(other, PhysicalSegment):
            return NotImplemented
        return self.address == (<PhysicalSegment>other).address and self.length == (<PhysicalSegment>other).length

    def __hash__(self):
        return hash((self.address, self.length))

    def __repr__(self):
        return f"PhysicalSegment(address={self.address:#x}, length={self.length:#x})"


def joined(list pieces):
    """Return a list of `PhysicalSegment`s in which those that continue the previous one are joined with it."""
    cdef PhysicalSegment piece, last = None
    cdef list found = []
    for piece in pieces:
        if last is not None and last.address + last.length == piece.address:
            piece = PhysicalSegment(last.address, last.length + piece.length)
            found.pop()
        found.append(piece)
        last = piece
    return found


def bounds(list pieces):
    """Describe a list of `PhysicalSegment`s by the limits that it meets.

    Returns
    -------
    tuple
        The total length; the longest length; the highest address of a byte; the bitwise OR of all addresses but the
        first, and of all lengths but the last: a power of two divides all of them if it divides these.
    """
    cdef uint64_t total = 0, longest = 0, highest = 0, addresses = 0, lengths = 0
    cdef PhysicalSegment piece
    cdef size_t index, last = len(pieces) - 1 if pieces else 0
    for index, piece in enumerate(pieces):
        total += piece.length
        longest = max(longest, piece.length)
        highest = max(highest, piece.address + piece.length - 1)
        if index:
            addresses |= piece.address
        if index < last:
            lengths |= piece.length
    return total, longest, highest, addresses, lengths


cdef class RunTable:
    """The runs of a range of virtual addresses, ascending, broken at every page that is absent or not adjacent."""

    cdef Run *runs
    cdef size_t room
    cdef readonly size_t count
    cdef readonly uint64_t pages
    """The number of present pages."""
    cdef readonly uint64_t hidden
    """The number of present pages whose frame the kernel hides; they are in no run."""

    def __len__(self):
        return self.count

    def __getitem__(self, size_t index):
        if index >= self.count:
            raise IndexError(index)
        return self.runs[index].virtual, self.runs[index].physical, self.runs[index].length

    cdef int _add(self, uint64_t virtual, uint64_t physical, uint64_t length) except -1 nogil:
        cdef Run *last
        cdef Run *more
        if self.count:
            last = &self.runs[self.count - 1]
            if last.virtual + last.length == virtual and last.physical + last.length == physical:
                last.length += length
                return 0
        if self.count == self.room:
            more = <Run *>realloc(self.runs, (self.room * 2 + 64) * sizeof(Run))
            if more == NULL:
                with gil:
                    raise MemoryError
            self.runs = more
            self.room = self.room * 2 + 64
        self.runs[self.count] = Run(virtual, physical, length)
        self.count += 1
        return 0

    def count_from(self, uint64_t old, uint64_t new):
        """Rebase the runs from the virtual address `old` to `new`."""
        cdef size_t index
        for index in range(self.count):
            self.runs[index].virtual += new - old

    def difference(self, RunTable other):
        """Return the first virtual address at which `other` differs, None if both are equal."""
        cdef size_t index
        cdef Run *ours
        cdef Run *theirs
        cdef RunTable longer
        # Without runs there are no arrays, and memcmp(3) requires valid pointers.
        if self.count == other.count and (
            not self.count or not memcmp(self.runs, other.runs, self.count * sizeof(Run))
        ):
            return None
        for index in range(min(self.count, other.count)):
            ours, theirs = &self.runs[index], &other.runs[index]
            if ours.virtual != theirs.virtual or ours.physical != theirs.physical:
                return min(ours.virtual, theirs.virtual)
            if ours.length != theirs.length:
                return ours.virtual + min(ours.length, theirs.length)
        longer = self if self.count > other.count else other
        return longer[min(self.count, other.count)][0]

    def holds(self, int fd, size_t page):
        """Return whether an open pagemap now shows exactly these frames at these addresses."""
        cdef uint64_t entries[512]
        cdef uint64_t address, end
        cdef size_t run = 0, index, wanted
        if not self.count:
            return False
        address = self.runs[0].virtual
        end = self.runs[self.count - 1].virtual + self.runs[self.count - 1].length
        with nogil:
            while address < end:
                wanted = min((end - address) // page, <uint64_t>512)
                if iobmd_entries(fd, address // page, entries, wanted) != <ssize_t>wanted:
                    break
                for index in range(wanted):
                    if address >= self.runs[run].virtual + self.runs[run].length:
                        run += 1
                    if (
                        address < self.runs[run].virtual or not entries[index] & PRESENT_BIT
                        or (entries[index] & PFN_MASK) * page
                        != self.runs[run].physical + (address - self.runs[run].virtual)
                    ):
                        break
                    address += page
                else:
                    continue
                break
        return address >= end

    def common(self, RunTable other):
        """Return the ranges in which both have the same frames, as (virtual address, length), ascending."""
        cdef size_t index = 0, its = 0
        cdef uint64_t start, end
        cdef Run *ours
        cdef Run *theirs
        found = []
        while index < self.count and its < other.count:
            ours, theirs = &self.runs[index], &other.runs[its]
            start = max(ours.virtual, theirs.virtual)
            end = min(ours.virtual + ours.length, theirs.virtual + theirs.length)
            if start < end and ours.physical - ours.virtual == theirs.physical - theirs.virtual:
                if found and sum(found[-1]) == start:
                    found[-1] = found[-1][0], end - found[-1][0]
                else:
                    found.append((start, end - start))
            if ours.virtual + ours.length <= theirs.virtual + theirs.length:
                index += 1
            else:
                its += 1
        return found

    def highest(self):
        """Return the bitwise OR of the addresses of all bytes."""
        cdef uint64_t bits = 0, first, last, spread
        cdef size_t index
        for index in range(self.count):
            first = self.runs[index].physical
            last = first + self.runs[index].length - 1
            bits |= first | last
            # Between first and last every lower bit below the highest that differs takes both values.
            spread = first ^ last
            while spread:
                bits |= spread
                spread >>= 1
        return bits

    cdef size_t _find(self, uint64_t virtual) noexcept nogil:
        """Return the index of the last run that does not start above `virtual`."""
        cdef size_t low = 0, high = self.count, middle
        while high - low > 1:
            middle = (low + high) // 2
            if self.runs[middle].virtual <= virtual:
                low = middle
            else:
                high = middle
        return low

    def segment(self, uint64_t virtual, uint64_t length):
        """Return (physical address, contiguous bytes), at most `length`; (0, 0) if there is no run."""
        if not self.count:
            return 0, 0
        cdef Run *run = &self.runs[self._find(virtual)]
        if virtual < run.virtual or virtual >= run.virtual + run.length:
            return 0, 0
        return run.physical + (virtual - run.virtual), min(length, run.virtual + run.length - virtual)

    def segments(self, uint64_t virtual, uint64_t length):
        """Return the `PhysicalSegment`s of a range that runs cover, in order; consecutive ones are never adjacent."""
        cdef uint64_t end = virtual + length, start, stop
        cdef PhysicalSegment segment
        cdef size_t index
        cdef Run *run
        cut = []
        if not self.count or not length:
            return cut
        for index in range(self._find(virtual), self.count):
            run = &self.runs[index]
            if run.virtual >= end:
                break
            start, stop = max(virtual, run.virtual), min(end, run.virtual + run.length)
            if start < stop:
                segment = PhysicalSegment.__new__(PhysicalSegment)
                segment.address = run.physical + (start - run.virtual)
                segment.length = stop - start
                cut.append(segment)
        return cut

    def __dealloc__(self):
        free(self.runs)


def concatenated(tables, uint64_t virtual):
    """Return the runs of consecutive ranges from `virtual` on; each is (table, address in it, length).

    A range may begin and end anywhere in a page.
    """
    cdef RunTable joined = RunTable.__new__(RunTable)
    cdef RunTable table
    cdef uint64_t address, end, start, stop, length
    cdef size_t index
    cdef Run *run
    for table, address, length in tables:
        end = address + length
        joined.pages += table.pages
        joined.hidden += table.hidden
        for index in range(table._find(address), table.count):
            run = &table.runs[index]
            if run.virtual >= end:
                break
            start, stop = max(address, run.virtual), min(end, run.virtual + run.length)
            if start < stop:
                joined._add(virtual + start - address, run.physical + (start - run.virtual), stop - start)
        virtual += length
    return joined


def listed(ranges):
    """Return the runs of physical ranges, each (address, length), as if they were consecutive from address 0 on."""
    cdef RunTable table = RunTable.__new__(RunTable)
    cdef uint64_t virtual = 0, address, length
    for address, length in ranges:
        if length:
            table._add(virtual, address, length)
            virtual += length
    return table


cdef int _return(int fd, uint64_t address, size_t page, uint64_t *entry) noexcept nogil:
    """Wait until a pinned page of this process is mapped again, and read its entry; return an error number.

    The kernel unmaps a page before it detects that it cannot migrate it (migrate_pages), and reclaim does so with
    shared pages: pagemap temporarily has no frame for it. A page fault waits for its return.
    """
    cdef int _look
    cdef char byte
    cdef iovec here, there
    for _look in range(LOOKS):
        if c_madvise(<void *><uintptr_t>address, page, C_MADV_POPULATE_READ):
            if errno != EINVAL:
                return errno
            # Before Linux 5.14. Reading it directly would end the program if nothing is mapped.
            here.iov_base, here.iov_len = &byte, 1
            there.iov_base, there.iov_len = <void *><uintptr_t>address, 1
            if process_vm_readv(getpid(), &here, 1, &there, 1, 0) < 1:
                return errno
        if iobmd_entries(fd, address // page, entry, 1) < 1:
            return errno
        if entry[0] & PRESENT_BIT:
            return 0
        usleep(100)
    return EBUSY


def read_runs(int fd, uint64_t address, uint64_t size, size_t page, bint pinned=False, bint gaps=False):
    """Read the runs of whole pages `address`…`address + size` from an open pagemap.

    With `pinned` they are pinned pages of this process, and the function waits for each. With `gaps` as well, absent
    pages are omitted; otherwise they are an error.

    Raises
    ------
    OSError
        The kernel's error, or ENODATA if the address space ends.
    """
    cdef RunTable table = RunTable.__new__(RunTable)
    cdef uint64_t *entries = <uint64_t *>malloc(ENTRIES * 8)
    cdef uint64_t left = size // page, entry, next = 0
    cdef ssize_t found
    cdef size_t index
    cdef int error = 0
    if entries == NULL:
        raise MemoryError
    try:
        with nogil:
            while left:
                found = iobmd_entries(fd, address // page, entries, min(left, <uint64_t>ENTRIES))
                if found < 1:
                    error = errno if found < 0 else ENODATA
                    break
                for index in range(<size_t>found):
                    if pinned and not entries[index] & PRESENT_BIT:
                        error = _return(fd, address, page, &entries[index])
                        if error and gaps:
                            error = entries[index] = 0
                        elif error:
                            break
                    entry = entries[index] & (PRESENT_BIT | PFN_MASK)
                    if next and entry == next:  # follows the previous page, like nearly all pages of a huge page
                        table.pages += 1
                        table.runs[table.count - 1].length += page
                        next += 1
                    elif entry & PRESENT_BIT:
                        table.pages += 1
                        next = 0
                        if entry & PFN_MASK:
                            table._add(address, (entry & PFN_MASK) * page, page)
                            next = entry + 1
                        else:
                            table.hidden += 1
                    else:
                        next = 0
                    address += page
                if error:
                    break
                left -= found
    finally:
        free(entries)
    if error:
        raise OSError(error, f"read of pagemap: {strerror(error).decode()}")
    return table
