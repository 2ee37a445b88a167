# Properties of page frames: /proc/kpageflags, /proc/kpagecount, /proc/kpagecgroup; and move_pages(2)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_move_pages
cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)
cdef extern from *:
    int __builtin_clzll(unsigned long long) nogil

cdef enum:
    READ = 4096  # frames a read
    BORDER = 16  # frames of the first read for the border of a folio: most folios of the page cache are smaller
    MOST = 1 << 18  # pages of the largest folio: 1 GiB of 4 KiB
    ORDERS = 48
    DISTINCT = 8  # distinct words, such as the cgroups of one run, that are recorded

# linux/kernel-page-flags.h
cdef uint64_t HEAD = <uint64_t>1 << 15
cdef uint64_t TAIL = <uint64_t>1 << 16
cdef uint64_t HUGETLB = <uint64_t>1 << 17
cdef uint64_t THP = <uint64_t>1 << 22

cdef ssize_t _read_words(int fd, uint64_t *words, uint64_t frame, uint64_t many) noexcept nogil:
    """Read the words of consecutive frames; return their number, or -1."""
    # Eight bytes per frame, as in pagemap per page.
    return iobmd_entries(fd, frame, words, min(many, <uint64_t>READ))


cdef uint64_t _head_of(int fd, uint64_t *words, uint64_t frame) noexcept nogil:
    """Return the first frame of the folio to which a tail page belongs."""
    cdef uint64_t back = 0, some = BORDER
    cdef ssize_t got, index
    while frame and back < MOST:
        some = min(some * 2, frame, <uint64_t>READ)
        frame -= some
        back += some
        got = _read_words(fd, words, frame, some)
        for index in range(got - 1, -1, -1):
            if not words[index] & TAIL:
                return frame + index
        if got <= 0:
            break
    return frame


cdef uint64_t _end_of(int fd, uint64_t *words, uint64_t head, uint64_t frame) noexcept nogil:
    """Return the end frame of a folio; the frames from its head up to `frame` belong to it."""
    cdef uint64_t many = BORDER
    cdef ssize_t got, index
    while frame - head < MOST:
        got = _read_words(fd, words, frame, many)
        if got <= 0:
            break
        for index in range(got):
            if not words[index] & TAIL:
                return frame + index
        frame += got
        many *= 2
    return frame


@cython.cdivision(True)
def folios(int fd, bytes raw, uint64_t present, uint64_t excluded, uint64_t page, dict sums):
    """Add the bytes of spans to `sums`, by the size of their folios in bytes.

    Parameters
    ----------
    fd : int
        An open /proc/kpageflags.
    raw : bytes
        Spans as `Walk.raw` returns them.
    present, excluded : int
        Flags of the spans that count, and that do not.
    page : int
        Bytes of a page.
    sums : dict[int, int]
        The sums. Pages without a large folio count under the page size.
    """
    cdef const char *start = raw
    cdef ssize_t many = len(raw) // <ssize_t>sizeof(Span)
    cdef uint64_t found[ORDERS]
    cdef uint64_t *words = <uint64_t *>malloc(READ * 8 * 2)
    cdef uint64_t *aside = words + READ
    cdef uint64_t frame, left, head = 0, end = 0, take
    cdef ssize_t got, at, index, next
    cdef const Span *span
    cdef int order
    if words == NULL:
        raise MemoryError
    memset(found, 0, sizeof(found))
    with nogil:
        for index in range(many):
            span = <const Span *>start + index
            if not span.flags & present or span.flags & excluded or not span.physical:
                continue
            frame, left = span.physical // page, span.length // page
            while left:
                got = _read_words(fd, words, frame, left)
                if got <= 0:
                    break
                at = 0
                while at < got:
                    if frame >= head and frame < end:
                        take = min(end - frame, <uint64_t>(got - at))
                        order = 63 - __builtin_clzll(end - head)
                    else:
                        take, order = 1, 0
                        if words[at] & (HEAD | TAIL) and words[at] & (THP | HUGETLB):
                            head = frame if words[at] & HEAD else _head_of(fd, aside, frame)
                            next = at + 1
                            while next < got and words[next] & TAIL:
                                next += 1
                            end = frame + (next - at)
                            if next == got:
                                end = _end_of(fd, aside, head, end)
                            continue
                    found[order] += take
                    at += take
                    frame += take
                left -= got
    free(words)
    for order in range(ORDERS):
        if found[order]:
            sums[page << order] = sums.get(page << order, 0) + found[order] * page


cdef struct Summary:  # of the words of several frames
    uint64_t every, some, least, most
    uint64_t distinct[DISTINCT]
    int many


cdef void _summarise(int fd, uint64_t *words, uint64_t frame, uint64_t many, Summary *summary) noexcept nogil:
    """Summarize the words of consecutive frames; of none if `fd` is -1."""
    cdef uint64_t end = frame + many
    cdef ssize_t got, index
    memset(summary, 0, sizeof(Summary))
    summary.every = summary.least = ~<uint64_t>0
    while fd >= 0 and frame < end:
        got = _read_words(fd, words, frame, end - frame)
        if got <= 0:
            break
        for index in range(got):
            summary.every &= words[index]
            summary.some |= words[index]
            summary.least, summary.most = min(summary.least, words[index]), max(summary.most, words[index])
            # Adjacent frames mostly have equal words: a search is made only where they change.
            if not summary.many or words[index] != summary.distinct[summary.many - 1]:
                _add_distinct(summary, words[index])
        frame += got


cdef void _add_distinct(Summary *summary, uint64_t word) noexcept nogil:
    cdef int index
    for index in range(summary.many):
        if summary.distinct[index] == word:
            return
    if summary.many < DISTINCT:
        summary.distinct[summary.many] = word
        summary.many += 1


def describe(int flags_fd, int count_fd, int cgroup_fd, uint64_t frame, uint64_t many):
    """Return the properties of `many` frames from `frame` on; a descriptor of -1 is not read.

    Returns
    -------
    tuple
        The kpageflags that all frames have, those that at least one has, the minimum and maximum map count (None:
        unknown), and a few of the inode numbers of their memory cgroups (0: no cgroup).
    """
    cdef uint64_t *words = <uint64_t *>malloc(READ * 8)
    cdef Summary flags, counts, groups
    cdef int index
    if words == NULL:
        raise MemoryError
    with nogil:
        _summarise(flags_fd, words, frame, many, &flags)
        _summarise(count_fd, words, frame, many, &counts)
        _summarise(cgroup_fd, words, frame, many, &groups)
    free(words)
    known = counts.many > 0
    return (
        flags.every & flags.some, flags.some, counts.least if known else None, counts.most if known else None,
        {groups.distinct[index] for index in range(groups.many)},
    )


def nodes(int pid, addresses):
    """Return the NUMA node, or the negative error number, of each page (move_pages(2), which moves nothing here)."""
    cdef size_t many = len(addresses), index
    cdef uintptr_t *pages = <uintptr_t *>malloc((many + 1) * sizeof(uintptr_t))
    cdef int32_t *status = <int32_t *>malloc((many + 1) * sizeof(int32_t))
    cdef long failed
    try:
        if pages == NULL or status == NULL:
            raise MemoryError
        for index, address in enumerate(addresses):
            pages[index] = address
        with nogil:
            failed = syscall(SYS_move_pages, <long>pid, many, pages, NULL, status, <long>0)
        if failed < 0:
            raise OSError(errno, f"move_pages: {strerror(errno).decode()}")
        return [status[index] for index in range(many)]
    finally:
        free(pages)
        free(status)


cdef bint _read_flags(int fd, const uint64_t *frames, uint64_t *words, size_t count) noexcept nogil:
    """Read the flags of some frames; those beyond the end have none. Return whether it failed."""
    cdef size_t index
    cdef ssize_t got
    for index in range(count):
        words[index] = 0
        got = iobmd_entries(fd, frames[index], &words[index], 1)
        if got < 0:
            return True
    return False


cdef bytearray _numbers(frames):
    cdef bytearray raw = bytearray(len(frames) * 8)
    cdef uint64_t *numbers = <uint64_t *>PyByteArray_AsString(raw)
    cdef size_t index = 0
    for frame in frames:
        numbers[index] = frame
        index += 1
    return raw


def flag_words(int fd, frames):
    """Return the flags of some frames, as native 64-bit numbers one after another."""
    cdef bytearray numbers = _numbers(frames)
    cdef bytearray words = bytearray(len(numbers))
    cdef const uint64_t *raw = <const uint64_t *>PyByteArray_AsString(numbers)
    cdef uint64_t *found = <uint64_t *>PyByteArray_AsString(words)
    cdef size_t count = len(numbers) // 8
    cdef bint failed
    with nogil:
        failed = _read_flags(fd, raw, found, count)
    if failed:
        raise OSError(errno, f"read of kpageflags: {strerror(errno).decode()}")
    return words


def flag_words_without(int fd, frames, int file, uint64_t offset, size_t size):
    """As `flag_words`, while a part of a file in memory is freed for about 50 µs; it is then allocated again.

    Other processes may allocate that memory in between.
    """
    cdef bytearray numbers = _numbers(frames)
    cdef bytearray words = bytearray(len(numbers))
    cdef const uint64_t *raw = <const uint64_t *>PyByteArray_AsString(numbers)
    cdef uint64_t *found = <uint64_t *>PyByteArray_AsString(words)
    cdef size_t count = len(numbers) // 8
    cdef int error = 0
    with nogil:
        # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        if c_fallocate(file, 3, offset, size) or _read_flags(fd, raw, found, count):
            error = errno
        if c_fallocate(file, 0, offset, size) and not error:
            error = errno
    if error:
        raise OSError(error, f"fallocate, or read of kpageflags: {strerror(error).decode()}")
    return words
