"""`PurgeableCache`: a cache of reproducible contents that yields under memory pressure."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Generic, NamedTuple, NoReturn, Self, TypeVar

from iobmd._internal import process_local
from iobmd._internal.arguments import integers
from iobmd._internal.uncopyable import Uncopyable
from iobmd._native.mapping import Exporter
from iobmd.api import allocate
from iobmd.descriptors.purge_control import change_when_free
from iobmd.errors import BusyError, IOReturnError, NotOpenError
from iobmd.purgeable import EMPTY, KEEP_CURRENT, NON_VOLATILE, VOLATILE, parse

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping as Mapped
    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor

K = TypeVar("K", bound=Hashable)
_FIELD_NAME = ":[^:]*:"
"""A name in the format of a buffer (PEP 3118)."""


class CacheStatistics(NamedTuple):
    """The activity of a `PurgeableCache` so far, and its present contents."""

    hits: int
    """Requests that found the content intact."""
    loaded: int
    """Contents loaded for new keys."""
    purged: int
    """Contents found to have been reclaimed by the system."""
    rebuilt: int
    """Contents loaded again for keys whose contents had been reclaimed."""
    entries: int
    """Keys, including those whose contents have been reclaimed."""
    held: int
    """Keys whose contents are in use, and therefore not volatile."""
    bytes: int
    """Size of all contents in bytes, including those that have been reclaimed."""
    held_bytes: int
    """Size of the contents in use, in bytes."""


class CacheItem(Exporter):
    """Cached contents in use: intact until `release`, the end of `with`, or the end of the item and its views.

    An item supports the buffer protocol: `memoryview(item)`, `numpy.frombuffer(item)`, and `item.view` with the shape
    of the loader's result.
    """

    def __init__(self, use: _Use) -> None:
        self._use: _Use | None = use

    @property
    def view(self) -> memoryview:
        """A memoryview with the format and shape of the loader's result (bytes if Python cannot cast to it).

        `numpy.asarray(item.view)` is the original array.
        """
        raw, entry = memoryview(self), self._held()
        with contextlib.suppress(ValueError, TypeError):  # not a native format
            return raw.cast(entry.format, entry.shape)  # type: ignore[call-overload, no-any-return]
        return raw

    def release(self) -> None:
        """End the use, so that the contents become volatile unless there is another user; idempotent.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while a view of this item exists; the item then remains in use.
        """
        self._require_unviewed()
        if use := self._use:
            self._use = None  # prevents further views
            try:
                self._require_unviewed()  # again: another thread may have created one
            except BusyError:
                self._use = use
                raise
            use.end()

    def _require_unviewed(self) -> None:
        if self.exports:
            raise BusyError(f"{self.exports} views of {self!r} are alive: release them first")

    def _held(self) -> _Entry:
        return self._used().entry

    def _used(self) -> _Use:
        if self._use is None:
            raise NotOpenError("this cache item is released")
        return self._use

    def _exported(self) -> tuple[object, Mapped, int, int, bool]:
        use = self._used()
        owner, mapping, first, length, writable = use.entry.memory._exported()
        # Read again: another thread may have released it. From here until the view is counted, no thread can run.
        if self._use is not use:
            raise NotOpenError("this cache item is released")
        return (use, owner), mapping, first, length, writable

    def __len__(self) -> int:
        return self._held().size

    def __repr__(self) -> str:
        return f"<CacheItem {f'of {len(self)} bytes' if self._use else 'released'}>"

    def __enter__(self) -> Self:
        self._held()
        return self

    def __exit__(self, *_error: object) -> None:
        use, self._use = self._use, None
        if use and not self.exports:  # otherwise the views hold it
            use.end()


class _Use:
    """One use of cached contents, by an item and its views: the contents may become volatile after its end."""

    __slots__ = ("entry",)

    def __init__(self, entry: _Entry) -> None:
        self.entry = entry
        entry.users.add(id(self))

    def end(self) -> None:
        """End the use; idempotent."""
        if id(self) in self.entry.users:
            self.entry.users.discard(id(self))
            self.entry.settle()

    def __del__(self) -> None:
        with contextlib.suppress(IOReturnError):  # its memory may be garbage of the same cycle, and already freed
            self.end()


class _Entry:
    """Cached contents: the buffer, their format, and their users."""

    buffer: IOBufferMemoryDescriptor | None = None
    format = "B"
    shape: tuple[int, ...] = ()
    size = 0
    filled = False  # the contents are complete, unless the system has reclaimed them
    known = False  # it was loaded before

    def __init__(self, unused: tuple[int, int]) -> None:
        self.guard = process_local.Guard()
        self.users: set[int] = set()  # by id, because adding and removing one is atomic, even in a garbage collection
        self._unused = unused  # the state and the modifiers without a user

    def fill(self, data: Buffer) -> None:
        """Store the loader's result in the buffer and make it non-volatile."""
        with memoryview(data) as made:
            _require_values(made)
            content = made if made.c_contiguous else memoryview(made.tobytes())
            if self.buffer is None or self.buffer.getCapacity() < made.nbytes:
                self.free()
                self.buffer = allocate(max(made.nbytes, 1), wired=False, purgeable=True)
            self.buffer.setPurgeable(NON_VOLATILE)
            self.buffer.setLength(made.nbytes)
            self.buffer.writeBytes(0, content)
            self.format, self.shape, self.size = made.format, made.shape or (), made.nbytes
        self.filled = self.known = True

    def lost(self) -> bool:
        """Make it non-volatile; return whether the contents were reclaimed."""
        taken = self.filled and self.memory.setPurgeable(NON_VOLATILE) == EMPTY
        self.filled &= not taken
        return taken

    def settle(self) -> None:
        """Make it volatile if it has no user, without waiting, because the garbage collector calls it too."""
        self.guard.when_free(self._settle)

    def _settle(self) -> None:
        if self.filled and not self.users:
            change_when_free(self.memory._memory(), self._unused)

    def free(self) -> None:
        """Free the buffer; its views retain the memory."""
        buffer, self.buffer, self.filled = self.buffer, None, False
        if buffer is not None:
            with buffer:
                pass

    @property
    def memory(self) -> IOBufferMemoryDescriptor:
        """The buffer. Raises `kIOReturnNotOpen` if the cache was left while this was in use."""
        if self.buffer is None:
            raise NotOpenError("the cache of these contents is closed")
        return self.buffer


def _require_values(data: memoryview) -> None:
    """Raise TypeError for an array of Python objects, whose bytes are addresses."""
    if "O" in re.sub(_FIELD_NAME, "", data.format):
        message = (
            f"the loader returned references to Python objects (format {data.format!r}), not their contents: convert "
            "the array to numbers, or the objects to bytes"
        )
        raise TypeError(message)


class PurgeableCache(Uncopyable, Mapping[K, CacheItem], Generic[K]):
    """A mapping of keys to reproducible contents, which the system may reclaim when memory is short.

    `cache[key]` returns the contents as a `CacheItem`, which the loader produces if necessary, as does `cache.get`.
    The contents are intact while the item or a view of it exists, and volatile afterwards. No eviction policy is
    needed: under memory pressure the kernel reclaims the contents that have not been used for longest.
    `key in cache`, `len` and iteration refer to the known keys, whether or not their contents are intact.

    Parameters
    ----------
    loader : callable
        Produces the contents of a key: `bytes`, an array, or any object with the buffer protocol, which is copied
        once. It may be called concurrently for several keys, but not for the same key. A loader may request other
        keys of the same cache, but not in a cycle.
    modifiers : IOPurgeable
        `kIOMemoryPurgeableVolatileGroup0` to `7` and other modifiers of Volatile, for `iobmd.purge`.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: not modifiers of Volatile.
    TypeError
        The loader cannot be called, or the modifiers are not an integer.

    Notes
    -----
    The contents are private purgeable memory (see `IOMemoryDescriptor.setPurgeable`), which requires no privilege and
    counts as resident (RSS) until the kernel reclaims it. Each key uses a mapping of the process (vm.max_map_count,
    65530 by default), even if its contents were reclaimed; `sweep` removes such keys. All methods are thread-safe; a
    forked child has its own copy.
    """

    def __init__(self, loader: Callable[[K], Buffer], *, modifiers: int = 0) -> None:
        if not callable(loader):
            raise TypeError(f"loader must be callable, not {loader!r}")
        self._loader = loader
        self._unused = parse(VOLATILE | integers(modifiers=modifiers)[0])
        self._entries: dict[K, _Entry] = {}
        self._guard = process_local.Guard()
        self._counts = dict.fromkeys(("hits", "loaded", "purged", "rebuilt"), 0)
        self._maker = os.getpid()

    def __getitem__(self, key: K) -> CacheItem:
        """Return the contents of `key`, in use; call the loader if they are missing.

        Raises
        ------
        IOReturnError
            As `allocate` and `setPurgeable`; `kIOReturnBusy` if a loader requests the key that it is loading.
            Exceptions of the loader are passed on, and nothing is cached.
        TypeError
            The loader's result has no buffer, or contains references to Python objects.
        """
        while True:
            entry = self._entries.get(key) or self._entries.setdefault(key, _Entry(self._unused))
            with entry.guard:
                if self._entries.get(key) is not entry:  # another thread has removed it
                    continue
                use = _Use(entry)  # first: this keeps other threads from making it volatile
                try:
                    self._provide(key, entry)
                except BaseException:
                    entry.users.discard(id(use))
                    if not entry.filled:
                        self._forget(key, entry)
                    elif not entry.users:
                        entry.settle()
                    raise
                return CacheItem(use)

    def _provide(self, key: K, entry: _Entry) -> None:
        if entry.lost():
            self._count("purged")
        if entry.filled:
            self._count("hits")
            return
        known = entry.known
        entry.fill(self._loader(key))
        self._count("rebuilt" if known else "loaded")

    def _all(self) -> list[tuple[K, _Entry]]:
        """Return all keys with their entries.

        Garbage is collected when a tuple is created, and other threads may then run and change the dictionary. While
        only the keys are copied, none is.
        """
        return [(key, entry) for key in list(self._entries) if (entry := self._entries.get(key))]

    def _forget(self, key: K, entry: _Entry) -> None:
        """Remove a key and its contents, with the entry's guard held; existing views retain the memory."""
        self._entries.pop(key, None)
        entry.free()

    def __setitem__(self, key: K, _contents: object) -> NoReturn:
        """Raise TypeError: contents come from the loader, which can produce them again."""
        message = f"contents cannot be stored under {key!r}: they come from the loader, which can produce them again"
        raise TypeError(message)

    def __delitem__(self, key: K) -> None:
        """Remove a key and free its contents.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while it is in use.
        KeyError
            No such key.
        """
        entry = self._entries[key]
        with entry.guard:
            if entry.users:
                raise BusyError(f"the contents of {key!r} are in use")
            if self._entries.get(key) is entry:
                self._forget(key, entry)

    def sweep(self) -> int:
        """Remove the keys whose contents the system has reclaimed; return their number."""
        swept = 0
        for key, entry in self._all():
            with entry.guard:
                if entry.filled and not entry.users and entry.memory.setPurgeable(KEEP_CURRENT) == EMPTY:
                    self._forget(key, entry)
                    self._count("purged")
                    swept += 1
        return swept

    def close(self) -> None:
        """Remove all keys and free their contents; idempotent.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` if contents are in use; all others are freed.
        """
        busy: BusyError | None = None
        for key in list(self._entries):
            try:
                del self[key]
            except BusyError as error:
                busy = error
            except KeyError:  # another thread was faster
                pass
        if busy:
            raise busy

    @property
    def statistics(self) -> CacheStatistics:
        """The activity so far, and the present contents."""
        known = [entry for entry in list(self._entries.values()) if entry.known]
        held = [entry.size for entry in known if entry.users]
        size = sum(entry.size for entry in known)
        with self._guard:
            return CacheStatistics(
                **self._counts, entries=len(known), held=len(held), bytes=size, held_bytes=sum(held)
            )

    def _count(self, what: str) -> None:
        with self._guard:
            self._counts[what] += 1

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<PurgeableCache of {len(self)} keys>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove all keys, also those in use: existing views retain their memory, which the last one frees."""
        for key, entry in self._all():
            with entry.guard:
                if self._entries.get(key) is entry:  # otherwise another thread has removed it, and may load it again
                    self._forget(key, entry)

    def __del__(self) -> None:
        if not getattr(self, "_entries", None):
            return
        if self._maker == os.getpid():
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
        with contextlib.suppress(IOReturnError):
            self.close()
