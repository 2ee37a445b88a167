# The page frames of the host by kind: /proc/kpageflags (linux/kernel-page-flags.h)

cdef enum:
    CENSUS_READ = 1 << 15  # frames a read: 256 KiB
    LEVELS = 16  # sizes of aligned windows, from a huge page on, each twice the previous one
    NEARLY = 1 << 14  # nearly free blocks that are recorded
    SMALL = 8  # frames of the largest compound page that counts as one page: slabs are not larger

cdef enum:  # kinds of frames, in the order of KINDS
    OF_FREE, OF_ANONYMOUS, OF_FILE, OF_SHARED, OF_HUGETLB, OF_SLAB, OF_TABLES, OF_KERNEL, OF_RESERVED, OF_OFFLINE
    OF_POISON, OF_UNINITIALIZED, KIND_COUNT
    OF_HUGE = KIND_COUNT, MAP_COUNT  # in a map only: movable memory in huge pages

KINDS = (
    "free", "anonymous", "file", "shared", "hugetlb", "slab", "page_tables", "kernel", "reserved", "offline",
    "poisoned", "uninitialized",
)
WINDOW_STATES = ("free", "movable", "huge", "one_short", "unmovable")

cdef enum:  # states of blocks and windows, in the order of WINDOW_STATES
    IS_FREE, IS_MOVABLE, IS_HUGE, IS_ONE_SHORT, IS_UNMOVABLE, STATE_COUNT

cdef uint64_t K_UPTODATE = <uint64_t>1 << 3
cdef uint64_t K_LRU = <uint64_t>1 << 5
cdef uint64_t K_SLAB = <uint64_t>1 << 7
cdef uint64_t K_BUDDY = <uint64_t>1 << 10
cdef uint64_t K_MMAP = <uint64_t>1 << 11
cdef uint64_t K_ANON = <uint64_t>1 << 12
cdef uint64_t K_SWAPBACKED = <uint64_t>1 << 14
cdef uint64_t K_UNEVICTABLE = <uint64_t>1 << 18
cdef uint64_t K_HWPOISON = <uint64_t>1 << 19
cdef uint64_t K_NOPAGE = <uint64_t>1 << 20
cdef uint64_t K_OFFLINE = <uint64_t>1 << 23
cdef uint64_t K_PGTABLE = <uint64_t>1 << 26
cdef uint64_t K_RESERVED = <uint64_t>1 << 32
cdef uint64_t K_MAPPEDTODISK = <uint64_t>1 << 34


cdef inline int _kind_of(uint64_t word) noexcept nogil:
    """Return the kind of a frame that is not the tail of a compound page.

    The order matters: the fields of a slab page reuse those of others, so that it may also show ANON and KSM (6.18),
    and a free page keeps some flags of its last use.
    """
    if word & K_BUDDY:
        return OF_FREE
    if word & K_HWPOISON:
        return OF_POISON
    if word & (K_OFFLINE | K_NOPAGE):
        return OF_OFFLINE
    if word & HUGETLB:
        return OF_HUGETLB
    if word & K_SLAB:
        return OF_SLAB
    if word & K_PGTABLE:
        return OF_TABLES
    if word & K_RESERVED:
        return OF_RESERVED
    if word & K_ANON:
        return OF_ANONYMOUS
    if word & K_SWAPBACKED:
        return OF_SHARED
    # A page of a file is off the LRU lists while it is isolated or in a batch of a processor.
    if word & (K_LRU | K_MMAP | K_UNEVICTABLE | K_UPTODATE | K_MAPPEDTODISK):
        return OF_FILE
    return OF_KERNEL


cdef inline bint _is_movable(int kind) noexcept nogil:
    """Return whether compaction can move frames of this kind, unless they are pinned, which no flag shows."""
    return kind == OF_ANONYMOUS or kind == OF_FILE or kind == OF_SHARED


cdef struct Counts:  # of one zone
    uint64_t frames[KIND_COUNT]
    uint64_t huge[KIND_COUNT]
    uint64_t states[LEVELS][STATE_COUNT]
    uint64_t runs[ORDERS]
    uint64_t run_frames[ORDERS]


cdef struct Window:  # an aligned window of a block, or of 2, 4, ... of them
    uint64_t seen, free, movable, huge, unmovable  # frames
    uint64_t units  # unmovable allocations: a compound page counts once


cdef struct Extent:
    uint64_t first, frames, free


cdef struct Nearly:
    uint64_t frame, frames
    int kind


@cython.final
@cython.cdivision(True)
cdef class Census:
    """Counts of page frames by kind, of runs, and of aligned windows by what is in them.

    Parameters
    ----------
    fd : int
        An open /proc/kpageflags.
    block : int
        Frames of a huge page.
    cells : int
        Number of cells of a map; 0 for no map.
    cell : int
        Frames of a cell.
    """

    cdef int fd
    cdef uint64_t block, cell, at, cell_origin, unit, unit_frames
    cdef size_t cells, first_cell, nearly_count
    cdef uint32_t *map
    cdef uint64_t *words
    cdef Nearly *nearly
    cdef int unit_kind, short_kind
    cdef bint is_compound
    cdef uint64_t short_frame, short_frames
    cdef Counts counts
    cdef Window windows[LEVELS]
    cdef Extent closest[LEVELS]  # `free` is the rank
    cdef Extent free_run, movable_run, longest_free, longest_movable

    def __cinit__(self, int fd, uint64_t block, size_t cells, uint64_t cell):
        if not block or not cell:
            raise ValueError("a block and a cell have at least one frame")
        self.fd, self.block, self.cells, self.cell = fd, block, cells, cell
        self.words = <uint64_t *>malloc(CENSUS_READ * sizeof(uint64_t))
        self.nearly = <Nearly *>malloc(NEARLY * sizeof(Nearly))
        self.map = <uint32_t *>calloc(cells * MAP_COUNT + 1, sizeof(uint32_t))
        if self.words == NULL or self.nearly == NULL or self.map == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.words)
        free(self.nearly)
        free(self.map)

    def begin(self, uint64_t frame, size_t cell):
        """Begin a range of frames; the first frame is in the cell with this index."""
        memset(self.windows, 0, sizeof(self.windows))
        self.at, self.cell_origin = frame, frame - frame % self.cell
        self.first_cell = cell
        self.unit_frames = 0

    def read(self, uint64_t end):
        """Count the frames up to `end`; return the first frame that was not read: `end`, or that without an entry."""
        cdef ssize_t got = 1
        cdef int error
        with nogil:
            while self.at < end and got > 0:
                got = iobmd_entries(self.fd, self.at, self.words, min(end - self.at, <uint64_t>CENSUS_READ))
                error = errno
                if got > 0:
                    self._count(got)
                    self.at += got
        if got < 0:
            raise OSError(error, f"read of kpageflags: {strerror(error).decode()}")
        return self.at

    def skip(self, uint64_t end):
        """Count the frames up to `end` as uninitialized, without reading their flags."""
        with nogil:
            self._end_unit()
            self.unit, self.unit_frames, self.unit_kind = self.at, end - self.at, OF_UNINITIALIZED
            self.is_compound = False
            self.at = end

    def finish(self):
        """End a range: no run continues in the next one."""
        with nogil:
            self._end_unit()
            self._end_free_run()
            self._end_movable_run()

    def collect(self):
        """Return the counts since the last call.

        Returns
        -------
        tuple
            By kind: frames; frames in folios of a huge page or more. For each size of windows, from a huge page on:
            windows by state. By order (the binary logarithm of the length): runs of free frames; frames in them.
        """
        cdef Counts *counts = &self.counts
        cdef int index, state
        taken = (
            [counts.frames[index] for index in range(KIND_COUNT)],
            [counts.huge[index] for index in range(KIND_COUNT)],
            [[counts.states[index][state] for state in range(STATE_COUNT)] for index in range(LEVELS)],
            [counts.runs[index] for index in range(ORDERS)],
            [counts.run_frames[index] for index in range(ORDERS)],
        )
        memset(counts, 0, sizeof(Counts))
        return taken

    def longest(self):
        """Return the longest run of free frames, and of free and movable ones: first frame, frames, free ones."""
        return (
            (self.longest_free.first, self.longest_free.frames, self.longest_free.free),
            (self.longest_movable.first, self.longest_movable.frames, self.longest_movable.free),
        )

    def closest_window(self, int level):
        """Return the first frame of the window with the fewest obstacles among those of a size; None if none exists.

        Unmovable allocations weigh more than huge pages, and these more than movable frames.
        """
        if not 0 <= level < LEVELS or not self.closest[level].frames:
            return None
        return self.closest[level].first

    def nearly_free(self):
        """Return the unmovable pages that are alone in a block: first frame, frames, kind. At most 16,384."""
        cdef size_t index
        return [
            (self.nearly[index].frame, self.nearly[index].frames, self.nearly[index].kind)
            for index in range(self.nearly_count)
        ]

    def cell_counts(self):
        """Return the frames of each cell by kind, as native 32-bit numbers, one cell after another.

        After the kinds follow the movable frames in huge pages, which do not count under their kind here.
        """
        return (<char *>self.map)[:self.cells * MAP_COUNT * sizeof(uint32_t)]

    cdef void _count(self, ssize_t many) noexcept nogil:
        cdef ssize_t index = 0, start
        cdef uint64_t word
        while index < many:
            word, start = self.words[index], index
            if word & TAIL and self.unit_frames:
                # Before Linux 6.9 tails lacked most flags of their folio.
                while index < many and self.words[index] & TAIL:
                    index += 1
                self.unit_frames += index - start
                self.is_compound = True
                continue
            self._end_unit()
            while index < many and self.words[index] == word:
                index += 1
            self.unit, self.unit_frames, self.unit_kind = self.at + start, index - start, _kind_of(word)
            self.is_compound = word & (HEAD | TAIL) != 0

    cdef void _end_unit(self) noexcept nogil:
        """Count a compound page, or consecutive single frames with the same flags."""
        cdef uint64_t frame = self.unit, frames = self.unit_frames, part
        cdef int kind = self.unit_kind
        cdef bint huge = self.is_compound and frames >= self.block
        cdef int shown = OF_HUGE if huge and _is_movable(kind) else kind
        cdef size_t cell
        if not frames:
            return
        self.unit_frames = 0
        self.counts.frames[kind] += frames
        if huge:
            self.counts.huge[kind] += frames
        if kind == OF_FREE:
            self._extend(&self.free_run, frame, frames, frames)
        else:
            self._end_free_run()
        # Compaction does not move huge pages (skip_isolation_on_order() in mm/compaction.c).
        if kind == OF_FREE or _is_movable(kind) and not huge:
            self._extend(&self.movable_run, frame, frames, frames if kind == OF_FREE else 0)
        else:
            self._end_movable_run()
        self._add_to_blocks(frame, frames, kind, huge)
        while frames and self.cells:
            cell = self.first_cell + <size_t>((frame - self.cell_origin) // self.cell)
            part = min(frames, self.cell - (frame - self.cell_origin) % self.cell)
            if cell < self.cells:
                self.map[cell * MAP_COUNT + shown] += <uint32_t>part
            frame += part
            frames -= part

    cdef void _extend(self, Extent *run, uint64_t frame, uint64_t frames, uint64_t free_frames) noexcept nogil:
        if not run.frames:
            run.first = frame
        run.frames += frames
        run.free += free_frames

    cdef void _end_free_run(self) noexcept nogil:
        cdef int order
        if self.free_run.frames:
            order = 63 - __builtin_clzll(self.free_run.frames)
            self.counts.runs[order] += 1
            self.counts.run_frames[order] += self.free_run.frames
            if self.free_run.frames > self.longest_free.frames:
                self.longest_free = self.free_run
            memset(&self.free_run, 0, sizeof(Extent))

    cdef void _end_movable_run(self) noexcept nogil:
        if self.movable_run.frames > self.longest_movable.frames:
            self.longest_movable = self.movable_run
        memset(&self.movable_run, 0, sizeof(Extent))

    cdef void _add_to_blocks(self, uint64_t frame, uint64_t frames, int kind, bint huge) noexcept nogil:
        cdef Window *window = &self.windows[0]
        cdef uint64_t part, units = 1 if self.is_compound else frames
        while frames:
            part = min(frames, self.block - frame % self.block)
            if kind != OF_UNINITIALIZED:  # the allocator does not have these frames yet: no window contains them
                window.seen += part
            if kind == OF_FREE:
                window.free += part
            elif huge and (_is_movable(kind) or kind == OF_HUGETLB):
                window.huge += part
            elif _is_movable(kind):
                window.movable += part
            elif kind != OF_UNINITIALIZED:
                self.short_frame, self.short_frames, self.short_kind = frame, part, kind
                window.unmovable += part
                window.units += min(units, part)
            frame += part
            frames -= part
            if frame % self.block == 0:
                self._end_block(frame - self.block)

    cdef void _end_block(self, uint64_t first) noexcept nogil:
        """Count the block, and each larger window that ends with it."""
        cdef uint64_t frames = self.block, number = first // self.block
        cdef Window *window
        cdef Window *wider
        cdef int level, state
        for level in range(LEVELS):
            window = &self.windows[level]
            if window.seen == frames:
                state = self._state_of(window, level)
                self.counts.states[level][state] += 1
                self._compare(window, level, first)
                if state == IS_ONE_SHORT and self.nearly_count < NEARLY:
                    self.nearly[self.nearly_count].frame = self.short_frame
                    self.nearly[self.nearly_count].frames = self.short_frames
                    self.nearly[self.nearly_count].kind = self.short_kind
                    self.nearly_count += 1
            if level + 1 < LEVELS:
                wider = window + 1
                wider.seen += window.seen
                wider.free += window.free
                wider.movable += window.movable
                wider.huge += window.huge
                wider.unmovable += window.unmovable
                wider.units += window.units
            memset(window, 0, sizeof(Window))
            if not number & 1:  # the wider window continues
                return
            number >>= 1
            frames *= 2
            first = number * frames

    cdef int _state_of(self, Window *window, int level) noexcept nogil:
        if level == 0 and window.units == 1 and window.unmovable <= SMALL:
            return IS_ONE_SHORT
        if window.units:
            return IS_UNMOVABLE
        if window.huge:
            return IS_HUGE
        return IS_MOVABLE if window.movable else IS_FREE

    cdef void _compare(self, Window *window, int level, uint64_t first) noexcept nogil:
        """Record the window if it has fewer obstacles than all others of its size."""
        cdef uint64_t huge = window.huge // self.block
        cdef uint64_t rank = (
            (min(window.units, <uint64_t>0xffffff) << 40)
            + (min(huge, <uint64_t>0xffff) << 24)
            + min(window.movable, <uint64_t>0xffffff)
        )
        cdef Extent *best = &self.closest[level]
        if not best.frames or rank < best.free:
            best.first, best.frames, best.free = first, window.seen, rank
