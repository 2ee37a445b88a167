"""`PurgeableCache`: what can be made again, kept while there is memory for it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Generic, NamedTuple, Self, TypeVar

from iobmd import own
from iobmd._native.mapping import Exporter
from iobmd.constants import IOReturn
from iobmd.errors import BusyError, IOReturnError
from iobmd.facade import allocate
from iobmd.purgeable import EMPTY, KEEP_CURRENT, NON_VOLATILE, VOLATILE

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping as Mapped
    from iobmd.buffer import IOBufferMemoryDescriptor

K = TypeVar("K", bound=Hashable)


class CacheStatistics(NamedTuple):
    """What a `PurgeableCache` did so far, and what it keeps now."""

    hits: int
    """Requests that found the content intact."""
    loaded: int
    """Contents that the loader made for the first time."""
    purged: int
    """Contents that were found to be taken by the system."""
    rebuilt: int
    """Contents that the loader made again after that."""
    entries: int
    """Keys, also those whose content has been taken."""
    held: int
    """Keys whose content is in use, and stays."""
    bytes: int
    """Size of all contents, also of those that have been taken."""
    held_bytes: int
    """Size of the contents in use."""


class CacheItem(Exporter):
    """A content in use. It stays until the item and all views of it are gone, or `release`, or the end of `with`.

    It has the buffer protocol: `memoryview(item)`, `numpy.frombuffer(item)`, and `item.view` with the shape that the
    loader gave it.
    """

    def __init__(self, entry: _Entry) -> None:
        self._entry: _Entry | None = entry

    @property
    def view(self) -> memoryview:
        """A memoryview with the format and shape of what the loader returned (bytes where Python cannot cast to it).

        `numpy.asarray(item.view)` is the array again.
        """
        raw, entry = memoryview(self), self._held()
        with contextlib.suppress(ValueError, TypeError):  # a format that is not a native one
            return raw.cast(entry.format, entry.shape) if entry.shape else raw  # type: ignore[call-overload]
        return raw

    @property
    def buffer(self) -> IOBufferMemoryDescriptor:
        """The buffer that keeps the content."""
        return self._held().buffer

    def release(self) -> None:
        """End the use, so that the content may be taken when nobody else uses it; idempotent.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while a view of this item is alive: the use goes on then.
        """
        if self._entry is None:
            return
        if self.exports:
            raise IOReturnError(
                IOReturn.kIOReturnBusy, f"{self.exports} views of {self!r} are alive: release them first"
            )
        entry, self._entry = self._entry, None
        entry.let_go(self)

    def _held(self) -> _Entry:
        if self._entry is None:
            raise IOReturnError(IOReturn.kIOReturnNotOpen, "this cache item is released")
        return self._entry

    def _exported(self) -> tuple[Mapped, int]:
        return self._held().buffer._exported()

    def __len__(self) -> int:
        return len(self._held().buffer)

    def __repr__(self) -> str:
        return f"<CacheItem {f'of {len(self)} bytes' if self._entry else 'released'}>"

    def __enter__(self) -> Self:
        self._held()
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_entry", None):
            self.release()


class _Entry:
    """One content: its buffer, what it looks like, and who uses it."""

    buffer: IOBufferMemoryDescriptor
    format = "B"
    shape: tuple[int, ...] = ()

    def __init__(self, modifiers: int) -> None:
        self.lock = own.Locks()
        self.filled = False
        self.users: set[int] = set()  # by id: adding and removing are one step, also for a garbage collection
        self._modifiers = modifiers

    def fill(self, data: Buffer) -> None:
        """Put what the loader made into the buffer, which is non-volatile afterwards."""
        with memoryview(data) as made:
            self.format, self.shape = made.format, made.shape or ()
            content = made if made.c_contiguous else memoryview(made.tobytes())
            if not self.filled or self.buffer.getCapacity() < made.nbytes:
                fresh = allocate(max(made.nbytes, 1), wired=False, purgeable=True)
                self.free()
                self.buffer, self.filled = fresh, True
            self.buffer.setPurgeable(NON_VOLATILE)
            self.buffer.setLength(made.nbytes)
            self.buffer.writeBytes(0, content)

    def intact(self) -> bool:
        """Make it non-volatile; say whether the content is there."""
        return self.filled and self.buffer.setPurgeable(NON_VOLATILE) != EMPTY

    def let_go(self, item: object) -> None:
        """End one use."""
        with self.lock.here():
            self.users.discard(id(item))
            self.settle()

    def settle(self) -> None:
        """Let the system take it when nobody uses it."""
        if self.filled and not self.users:
            self.buffer.setPurgeable(VOLATILE | self._modifiers)

    def free(self) -> None:
        """Give the buffer back."""
        if self.filled:
            self.filled = False
            self.buffer.free()


class PurgeableCache(Mapping[K, CacheItem], Generic[K]):
    """A mapping of keys to contents that a function can make again; the system may take them when memory is short.

    `cache[key]` returns the content as a `CacheItem`, made by the loader if it is not there any more. While the item
    or a view of it is alive the content stays; after that it is volatile. Nothing has to be evicted: under a memory
    limit the kernel takes what was not used for long, and the program goes on.

    Parameters
    ----------
    loader : callable
        Makes the content of a key: `bytes`, an array, anything with the buffer protocol. It is copied once. Called
        without a lock of the whole cache held: for several keys at a time, for one key once. A loader that asks the
        same cache for other keys must not do so in a circle.
    modifiers : IOPurgeable
        `kIOMemoryPurgeableVolatileGroup0` to `7` and other modifiers of Volatile, for `iobmd.purge`.

    Notes
    -----
    Private purgeable memory (see `IOMemoryDescriptor.setPurgeable`): needs no privilege, and RSS counts contents
    until the kernel takes them. A key costs a mapping of the process (vm.max_map_count, 65530 by default) also when
    its content was taken; `sweep` forgets such keys. Usable from any thread; a forked child has a copy of its own.
    """

    def __init__(self, loader: Callable[[K], Buffer], *, modifiers: int = 0) -> None:
        self._loader = loader
        self._modifiers = int(modifiers)
        self._entries: dict[K, _Entry] = {}
        self._lock = own.Locks()
        self._counts = dict.fromkeys(("hits", "loaded", "purged", "rebuilt"), 0)
        self._maker = os.getpid()

    def __getitem__(self, key: K) -> CacheItem:
        """Return the content of `key`, in use; made by the loader if it is not there.

        Raises
        ------
        IOReturnError
            As `allocate` and `setPurgeable`. Or whatever the loader raises: then nothing is kept.
        """
        while True:
            entry = self._entries.get(key) or self._entries.setdefault(key, _Entry(self._modifiers))
            item = CacheItem(entry)
            with entry.lock.here():
                entry.users.add(id(item))  # first: from here on nobody makes it volatile
                if self._entries.get(key) is not entry:  # forgotten by another thread meanwhile
                    entry.users.discard(id(item))
                    item._entry = None
                    continue
                self._provide(key, entry, item)
            return item

    def _provide(self, key: K, entry: _Entry, item: CacheItem) -> None:
        was_there = entry.filled
        try:
            if entry.intact():
                self._count("hits")
                return
            if was_there:
                self._count("purged")
            entry.fill(self._loader(key))
            self._count("rebuilt" if was_there else "loaded")
        except BaseException:
            item._entry = None
            entry.users.discard(id(item))
            self._forget(key, entry)
            raise

    def _forget(self, key: K, entry: _Entry) -> None:
        """Forget a key and its content, which is not in use, with the entry's lock held."""
        with self._lock.here():
            if self._entries.get(key) is entry:
                del self._entries[key]
        entry.free()

    def __delitem__(self, key: K) -> None:
        """Forget a key and free its content.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while it is in use.
        KeyError
            No such key.
        """
        entry = self._entries[key]
        with entry.lock.here():
            if entry.users:
                raise IOReturnError(IOReturn.kIOReturnBusy, f"the content of {key!r} is in use")
            self._forget(key, entry)

    def sweep(self) -> int:
        """Forget the keys whose content the system has taken; returns how many."""
        swept = 0
        for key, entry in self._known():
            with entry.lock.here():
                if entry.filled and not entry.users and entry.buffer.setPurgeable(KEEP_CURRENT) == EMPTY:
                    self._forget(key, entry)
                    self._count("purged")
                    swept += 1
        return swept

    def close(self) -> None:
        """Forget all keys and free their contents; idempotent. Raises `kIOReturnBusy` while some are in use."""
        for key, _entry in self._known():
            with contextlib.suppress(KeyError):  # another thread was faster
                del self[key]

    @property
    def statistics(self) -> CacheStatistics:
        """What the cache did so far, and what it keeps now."""
        known = [entry for _key, entry in self._known() if entry.filled]
        held = [entry for entry in known if entry.users]
        sizes = [sum(len(entry.buffer) for entry in some) for some in (known, held)]
        with self._lock.here():
            return CacheStatistics(
                **self._counts, entries=len(known), held=len(held), bytes=sizes[0], held_bytes=sizes[1]
            )

    def _count(self, what: str) -> None:
        with self._lock.here():
            self._counts[what] += 1

    def _known(self) -> list[tuple[K, _Entry]]:
        with self._lock.here():
            return list(self._entries.items())

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        return iter([key for key, _entry in self._known()])

    def __len__(self) -> int:
        return len(self._entries)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<PurgeableCache of {len(self)} keys>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_entries", None):
            return
        if self._maker == os.getpid():
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
        with contextlib.suppress(BusyError):
            self.close()
