# Slabs: memory in equal pieces, for small buffers and secrets. Pieces are taken and released in C, between two
# bytecodes: no signal handler intervenes, and no thread sees a piece with two owners.

from os import urandom as _urandom

cdef extern from "<string.h>" nogil:
    void explicit_bzero(void *start, size_t size)

cdef enum:
    MOST_FRAMES = 16  # of whole pages that are compared one by one

# The pattern around secrets, by the last bits of the address. No byte is zero, because a text that is too long ends
# with one.
cdef unsigned char _CANARY[16]


cdef _draw_canary():
    cdef unsigned char byte
    for index, byte in enumerate(_urandom(sizeof(_CANARY))):
        _CANARY[index] = byte | 1


_draw_canary()


cdef bint _is_canary(uint64_t at) noexcept nogil:
    return (<unsigned char *><uintptr_t>at)[0] == _CANARY[at % sizeof(_CANARY)]


cdef class Slab:
    """Memory in pieces of equal size. It exists as long as its pool contains it or a piece is in use.

    Free pieces contain zeros. `keeper` owns the memory.
    """

    cdef readonly object keeper
    cdef readonly uint64_t address
    cdef readonly size_t piece_size
    cdef readonly uint32_t count
    cdef readonly uint32_t owned
    """The number of pieces with owners (`SmallBuffer._own`)."""
    cdef uint32_t _free
    cdef uint16_t *_stack
    cdef PyObject **_buffers
    """The buffers that use pieces without owners."""
    cdef Pool _pool

    def __cinit__(self, keeper, uint64_t address, size_t size, size_t piece_size, *_of_subclass):
        cdef uint32_t index
        self.keeper = keeper
        self.address = address
        self.piece_size = piece_size
        self.count = self._free = size // piece_size
        if not 0 < size // piece_size <= 1 << 16:
            raise ValueError(f"{size} bytes in pieces of {piece_size} bytes")
        self._stack = <uint16_t *>malloc(self.count * sizeof(uint16_t))
        self._buffers = <PyObject **>calloc(self.count, sizeof(PyObject *))
        if self._stack == NULL or self._buffers == NULL:
            raise MemoryError
        for index in range(self.count):
            self._stack[index] = self.count - 1 - index

    @property
    def used(self):
        """The number of pieces in use."""
        return self.count - self._free

    cdef uint64_t _address(self, uint32_t index) noexcept:
        """Return the address of the first byte of the buffer with a piece."""
        return self.address + <uint64_t>index * self.piece_size

    cdef bint _is_concealed(self) noexcept:
        return False

    cdef bint _clear(self, uint64_t address) noexcept:
        """Clear a piece; return False if it cannot be used again."""
        memset(<void *><uintptr_t>address, 0, self.piece_size)
        return True

    def __dealloc__(self):
        free(self._stack)
        free(self._buffers)


cdef class WholePages(Slab):
    """A slab of one piece, which consists of whole pages that the program may unmap, replace and protect.

    `frames` are those of pinned pages, according to the open `pagemap`; without any, only the kind of the area shows
    whether it is still the same memory.
    """

    cdef int _pagemap
    cdef bint _pageable
    cdef size_t _pages
    cdef uint64_t *_frames

    def __cinit__(self, keeper, address, size, piece_size, int pagemap, frames, bint pageable):
        cdef size_t index
        self._pagemap, self._pageable, self._pages = pagemap, pageable, len(frames)
        self._frames = <uint64_t *>malloc(max(self._pages, 1) * sizeof(uint64_t))
        if self._frames == NULL:
            raise MemoryError
        for index in range(self._pages):
            self._frames[index] = frames[index]

    @property
    def is_pageable(self):
        """Whether its pages are freed while it is free, and only its addresses are used again."""
        return self._pageable

    cdef bint _clear(self, uint64_t address) noexcept:
        cdef void *start = <void *><uintptr_t>address
        cdef size_t size = self.piece_size
        if not self._pageable:
            # MADV_POPULATE_WRITE (Linux 5.14) fails for memory that is not writable.
            if not self._is_intact(address) or c_madvise(start, size, C_MADV_POPULATE_WRITE):
                return False
            memset(start, 0, size)
            return c_madvise(start, size, C_MADV_DODUMP) == 0
        return (
            not self.keeper.pins and self._is_own_area(address) and c_madvise(start, size, C_MADV_DONTNEED) == 0
            and c_madvise(start, size, C_MADV_DOFORK) == 0 and c_madvise(start, size, C_MADV_KEEPONFORK) == 0
            and c_madvise(start, size, C_MADV_DODUMP) == 0
        )

    cdef bint _is_intact(self, uint64_t address) noexcept:
        cdef uint64_t entries[MOST_FRAMES]
        cdef size_t index
        if not 0 < self._pages <= MOST_FRAMES:
            return self._is_own_area(address)
        if iobmd_entries(self._pagemap, address // PAGE_SIZE, entries, self._pages) != <ssize_t>self._pages:
            return False
        for index in range(self._pages):
            if not entries[index] & PRESENT_BIT or entries[index] & PFN_MASK != self._frames[index]:
                return False
        return True

    cdef bint _is_own_area(self, uint64_t address) noexcept:
        cdef iobmd_procmap_query area
        return (
            iobmd_own_area(address, &area) == 1 and area.vma_start <= address
            and area.vma_end >= address + self.piece_size and area.vma_flags == READABLE | C_VMA_WRITABLE
            and not (area.inode or area.dev_major or area.dev_minor)
        )

    def __dealloc__(self):
        free(self._frames)


cdef class SecretSlab(Slab):
    """A slab of secrets. Each ends `margin` bytes before the end of its piece, and canaries fill the rest of it.

    `whole` is the mapping of a slab with one piece, which can be concealed.
    """

    cdef uint32_t _margin
    cdef Mapping _whole
    cdef size_t *_offsets
    cdef size_t *_sizes

    def __cinit__(self, keeper, address, size, piece_size, uint32_t margin, Mapping whole=None):
        self._margin = margin
        self._whole = whole
        self._offsets = <size_t *>calloc(self.count, sizeof(size_t))
        self._sizes = <size_t *>calloc(self.count, sizeof(size_t))
        if self._offsets == NULL or self._sizes == NULL:
            raise MemoryError

    def put(self, SmallBuffer buffer not None, size_t size, size_t alignment):
        """Place the `size` bytes of a buffer in its piece, at a multiple of `alignment`, and the canaries around."""
        cdef uint64_t start = self.address + <uint64_t>buffer._index * self.piece_size
        cdef uint64_t begin = (start + self.piece_size - self._margin - size) & ~<uint64_t>(alignment - 1)
        cdef uint64_t at
        if buffer._slab is not self or size + self._margin > self.piece_size or begin < start:
            raise ValueError(f"{size} bytes do not fit a piece of {self.piece_size}, or the buffer has none")
        self._offsets[buffer._index], self._sizes[buffer._index] = begin - start, size
        for at in range(start, begin):
            (<unsigned char *><uintptr_t>at)[0] = _CANARY[at % sizeof(_CANARY)]
        for at in range(begin + size, start + self.piece_size):
            (<unsigned char *><uintptr_t>at)[0] = _CANARY[at % sizeof(_CANARY)]

    def overwritten(self, SmallBuffer buffer not None):
        """Return the address of the first canary in the piece of a buffer that was overwritten; 0 if none was."""
        cdef uint32_t index = buffer._index
        cdef uint64_t start = self.address + <uint64_t>index * self.piece_size
        cdef uint64_t begin = start + self._offsets[index], at, found = 0
        if buffer._acquired_in != _generation:  # a forked child has zeros
            return 0
        if self._whole is not None:
            if self._whole.lost() is not None:  # the program has unmapped or replaced it
                return 0
            self._whole._begin_use()
        for at in range(start, start + self.piece_size):
            if (at < begin or at >= begin + self._sizes[index]) and not _is_canary(at):
                found = at
                break
        if self._whole is not None:
            self._whole._end_use()
        return found

    def conceal(self):
        """Make its only piece inaccessible whenever it has no users (`Mapping.conceal`)."""
        if self._whole is None:
            raise ValueError("its pages have several pieces")
        self._whole.conceal()

    cdef uint64_t _address(self, uint32_t index) noexcept:
        return self.address + <uint64_t>index * self.piece_size + self._offsets[index]

    cdef bint _is_concealed(self) noexcept:
        return self._whole is not None and self._whole.concealed

    cdef bint _clear(self, uint64_t address) noexcept:
        if self._whole is None:
            explicit_bzero(<void *><uintptr_t>address, self.piece_size)
            return True
        if self._whole.lost() is None:  # otherwise the program has unmapped or replaced it
            self._whole._begin_use()
            explicit_bzero(<void *><uintptr_t>address, self.piece_size)
            self._whole._end_use()
        return False

    def __dealloc__(self):
        free(self._offsets)
        free(self._sizes)


cdef class Pool:
    """The slabs of one size of pieces. It retains at most `spare` slabs without pieces in use.

    A forked child has none, because its copies of the parent's are not wired, unless they are `inherited`.
    """

    cdef readonly size_t piece_size
    cdef size_t _spare
    cdef bint _inherited
    cdef set _slabs
    cdef list _with_room
    cdef int _made_in

    def __cinit__(self, size_t piece_size, size_t spare=1, bint inherited=False):
        self.piece_size = piece_size
        self._spare = spare
        self._inherited = inherited
        self._forget()

    cdef _forget(self):
        self._slabs = set()
        self._with_room = []
        self._made_in = _generation

    cdef _renew(self):
        if self._made_in != _generation and not self._inherited:
            self._forget()

    def renew(self):
        """Forget slabs of the parent in a forked child, unless they are inherited."""
        self._renew()

    @property
    def slabs(self):
        """The slabs that exist."""
        self._renew()
        return list(self._slabs)

    def add(self, Slab slab not None):
        """Add a slab without pieces in use."""
        self._renew()
        slab._pool = self
        self._slabs.add(slab)
        self._with_room.append(slab)

    def acquire(self, SmallBuffer buffer not None):
        """Make a free piece the memory of a buffer; return False if no piece is free."""
        cdef Slab slab
        self._renew()
        if not self._with_room:
            return False
        slab = <Slab>self._with_room[-1]
        if slab._free == 1:
            self._with_room.pop()
        self._assign(slab, buffer)
        return True

    def add_for(self, Slab slab not None, SmallBuffer buffer not None):
        """Add a slab with one piece, and make it the memory of a buffer."""
        self._renew()
        slab._pool = self
        self._slabs.add(slab)
        self._assign(slab, buffer)

    cdef void _assign(self, Slab slab, SmallBuffer buffer) noexcept:
        slab._free -= 1
        Py_INCREF(slab)
        buffer._held = <PyObject *>slab
        buffer._index = slab._stack[slab._free]
        buffer._acquired_in = _generation
        slab._buffers[buffer._index] = <PyObject *>buffer

    cdef bint _counts(self, int acquired_in) noexcept:
        """Return whether it counts a piece acquired in a process; False in a child that does not inherit it."""
        return acquired_in == _generation or self._inherited

    cdef void _put(self, Slab slab, uint32_t index, int acquired_in) noexcept:
        """Clear a piece, and make it free; drop the slab if it is empty and enough others have room."""
        if not self._counts(acquired_in):  # a forked child's copies are not used again
            return
        slab._buffers[index] = NULL
        if not slab._clear(slab.address + <uint64_t>index * slab.piece_size):
            self._slabs.discard(slab)
            return
        slab._stack[slab._free] = index
        slab._free += 1
        if slab._free == 1:
            self._with_room.append(slab)
        if slab._free == slab.count and <size_t>len(self._with_room) > self._spare:
            self._drop(slab)

    cdef _drop(self, Slab slab):
        self._with_room.remove(slab)
        self._slabs.discard(slab)

    def trim(self):
        """Drop the slabs without pieces in use; return their size in bytes."""
        cdef Slab slab
        cdef size_t size = 0
        for slab in self.slabs:
            if slab._free == slab.count:
                self._drop(slab)
                size += slab.count * slab.piece_size
        return size

    def find(self, uint64_t address):
        """Return the buffer without owner whose piece contains an address, None if none does."""
        cdef Slab slab
        cdef PyObject *buffer
        for slab in self.slabs:
            if slab.address <= address < slab.address + <uint64_t>slab.count * slab.piece_size:
                buffer = slab._buffers[(address - slab.address) // slab.piece_size]
                if buffer != NULL:
                    return <object>buffer
        return None


cdef class SmallBuffer(Exporter):
    """The attributes of a buffer that a program may have millions of, and its piece of a slab.

    The buffer has the piece until `_release_piece`, which clears it, or until `_own`. Its attribute dictionary is
    created when another attribute is set.
    """

    cdef dict __dict__
    cdef public object _owner
    """The owner of its memory; None until it is needed, or after the release."""
    cdef public object _state
    cdef public uint64_t _capacity
    cdef public uint32_t _options
    cdef PyObject *_held  # the slab: a reference that the collector would clear before the piece could be released
    cdef uint32_t _index
    cdef int _acquired_in

    @property
    def _slab(self):
        """The slab with its piece; None if it has no piece, or its owner has it."""
        return <object>self._held if self._held != NULL else None

    cdef Slab _detach(self):
        """Return the slab with its piece, which is no longer this buffer's; None if it has none."""
        if self._held == NULL:
            return None
        cdef Slab slab = <Slab>self._held
        Py_DECREF(slab)
        self._held = NULL
        return slab

    def __cinit__(self):
        self._state = "not initialised"
        # Cython creates the dictionary with the object; Python creates it when it is needed.
        cdef PyObject **attributes = <PyObject **>(<char *><void *>self + DICTIONARY)
        Py_XDECREF(attributes[0])
        attributes[0] = NULL

    def _piece(self):
        """Return a mapping of its piece, for the owner; None if it has no piece."""
        cdef Piece piece = Piece.__new__(Piece)  # first: its creation may run destructors
        if self._held == NULL:
            return None
        cdef Slab slab = <Slab>self._held
        piece.address = slab._address(self._index)
        piece.concealed = slab._is_concealed()
        piece.size = slab.piece_size if isinstance(slab, WholePages) else self._capacity
        piece.writable = piece.borrowed = True
        return piece

    def _own(self, owner, Piece piece not None):
        """Pass the piece to its owner, which is stored; return False if another thread was faster."""
        cdef Slab slab = self._detach()
        if slab is None:
            return False
        piece._slab, piece._index, piece._acquired_in = slab, self._index, self._acquired_in
        slab._buffers[self._index] = NULL
        if slab._pool._counts(self._acquired_in):
            slab.owned += 1
        self._owner = owner
        return True

    def _release_piece(self):
        """Clear and release the piece, with which the buffer ends; return False if it has none."""
        cdef Slab slab = self._detach()
        if slab is None:
            return False
        self._state = "released"
        slab._pool._put(slab, self._index, self._acquired_in)
        return True

    def __dealloc__(self):
        cdef Slab slab = self._detach()
        if slab is not None:
            slab._pool._put(slab, self._index, self._acquired_in)


cdef Py_ssize_t DICTIONARY = SmallBuffer.__dictoffset__


@cython.no_gc
cdef class Piece(Mapping):
    """A piece of a slab: the memory of one owner until `close`, which clears it, or until this object ends."""

    cdef Slab _slab
    cdef uint32_t _index
    cdef int _acquired_in

    def lost(self):
        """Return None: it is a part of pages that belong to the slab."""
        return None

    cdef int _begin_use(self) except -1:
        if self.concealed and not self.users and self._slab is not None:
            (<SecretSlab>self._slab)._whole._begin_use()
        self.users += 1
        return 0

    cdef void _end_use(self) noexcept:
        self.users -= 1
        if self.concealed and not self.users and self._slab is not None:
            (<SecretSlab>self._slab)._whole._end_use()

    def close(self, ranges=None):
        """Seal, clear and release it; idempotent."""
        self.seal()
        self._end()

    cdef void _end(self) noexcept:
        cdef Slab slab = self._slab
        self.sealed = True
        self._slab = None
        self.address = self.size = 0
        if slab is not None:
            if slab._pool._counts(self._acquired_in):
                slab.owned -= 1
            slab._pool._put(slab, self._index, self._acquired_in)

    def __dealloc__(self):
        self._end()
