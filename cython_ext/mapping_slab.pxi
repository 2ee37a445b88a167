# Slabs: pinned memory in equal pieces, for small wired buffers. Pieces are taken and released in C, between two
# bytecodes: no signal handler intervenes, and no thread sees a piece with two owners.

cdef class Slab:
    """Memory in pieces of equal size. It exists as long as its pool has it, or a piece is in use.

    Free pieces contain zeros. `keeper` owns the memory.
    """

    cdef readonly object keeper
    cdef readonly uint64_t address
    cdef readonly uint32_t piece_size
    cdef readonly uint32_t count
    cdef readonly uint32_t owned
    """The number of pieces with owners (`Piece.own`)."""
    cdef uint32_t _free
    cdef uint16_t *_stack
    cdef PyObject **_pieces
    cdef Pool _pool

    def __cinit__(self, keeper, uint64_t address, size_t size, uint32_t piece_size):
        cdef uint32_t index
        self.keeper = keeper
        self.address = address
        self.piece_size = piece_size
        self.count = self._free = size // piece_size
        if not 0 < size // piece_size <= 1 << 16:
            raise ValueError(f"{size} bytes in pieces of {piece_size} bytes")
        self._stack = <uint16_t *>malloc(self.count * sizeof(uint16_t))
        self._pieces = <PyObject **>calloc(self.count, sizeof(PyObject *))
        if self._stack == NULL or self._pieces == NULL:
            raise MemoryError
        for index in range(self.count):
            self._stack[index] = self.count - 1 - index

    @property
    def used(self):
        """The number of pieces in use."""
        return self.count - self._free

    cdef void _give_back(self, uint32_t index) noexcept:
        self._pieces[index] = NULL
        self._stack[self._free] = index
        self._free += 1

    def __dealloc__(self):
        free(self._stack)
        free(self._pieces)


cdef class Pool:
    """The slabs of one size of pieces. A forked child has none: its copies of the parent's are not wired."""

    cdef readonly uint32_t piece_size
    cdef set _slabs
    cdef list _with_room
    cdef int _made_in

    def __cinit__(self, uint32_t piece_size):
        self.piece_size = piece_size
        self._forget()

    cdef _forget(self):
        self._slabs = set()
        self._with_room = []
        self._made_in = _generation

    cdef _renew(self):
        if self._made_in != _generation:
            self._forget()

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

    def take(self, size_t size, Exporter handle not None):
        """Make the first `size` bytes of a free piece the memory of a buffer; return False if no piece is free."""
        cdef Slab slab
        cdef Piece piece = Piece.__new__(Piece)  # first: its creation may run destructors, which release pieces
        self._renew()
        if not self._with_room:
            return False
        slab = <Slab>self._with_room[-1]
        slab._free -= 1
        if not slab._free:
            self._with_room.pop()
        piece._slab = slab
        piece._index = slab._stack[slab._free]
        piece._made_in = _generation
        piece._handle = <PyObject *>handle
        piece.address = slab.address + <uint64_t>piece._index * slab.piece_size
        piece.size = size
        piece.writable = piece.borrowed = True
        slab._pieces[piece._index] = <PyObject *>piece
        handle.piece = piece
        return True

    cdef void _released(self, Slab slab) noexcept:
        """Note that a piece of a slab is free again, and drop the slab if it is empty and another has room."""
        if slab._free == 1:
            self._with_room.append(slab)
        if slab._free == slab.count and len(self._with_room) > 1:
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
        """Return the buffer whose piece contains an address, None if none does."""
        cdef Slab slab
        cdef PyObject *piece
        for slab in self.slabs:
            if slab.address <= address < slab.address + <uint64_t>slab.count * slab.piece_size:
                piece = slab._pieces[(address - slab.address) // slab.piece_size]
                if piece != NULL and (<Piece>piece)._handle != NULL:
                    return <object>(<Piece>piece)._handle
        return None


@cython.no_gc
cdef class Piece(Mapping):
    """A piece of a slab: the memory of one buffer until `close`, which clears it, or until this object ends."""

    cdef Slab _slab
    cdef uint32_t _index
    cdef int _made_in
    cdef bint _owned
    cdef PyObject *_handle

    @property
    def slab(self):
        """Its slab."""
        return self._slab

    @property
    def free(self):
        """Whether it has no owner and is not closed."""
        return self._handle != NULL

    def own(self, owner):
        """Store `owner` in the `_owner` attribute of the buffer; return False if the piece had one, or is closed.

        From then on the owner closes the piece, instead of the buffer.
        """
        if self._handle == NULL:
            return False
        (<object>self._handle)._owner = owner
        self._handle = NULL
        self._owned = True
        if self._made_in == _generation:
            self._slab.owned += 1
        return True

    def close_unowned(self):
        """Close it for the buffer, unless it has an owner; return whether it is now closed."""
        if self._handle == NULL or self.users:
            return False
        self._end()
        return True

    def lost(self):
        """Return None: it is a part of pages that belong to the slab."""
        return None

    def close(self, ranges=None):
        """Seal, clear and release it; idempotent."""
        self.seal()
        self._end()

    cdef void _end(self) noexcept:
        cdef Slab slab = self._slab
        self.sealed = True
        self._handle = NULL
        if slab is None:
            return
        self._slab = None
        if self._made_in == _generation:  # a forked child's copies are not used again
            memset(<void *><uintptr_t>self.address, 0, slab.piece_size)
            slab._give_back(self._index)
            slab.owned -= self._owned
            slab._pool._released(slab)
        self.address = self.size = 0

    def __dealloc__(self):
        self._end()
