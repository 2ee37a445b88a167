"""`PurgeableCache`: what can be made again, kept while there is memory for it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Generic, NamedTuple, Self, TypeVar

from iobmd._internal import process_local
from iobmd._native.mapping import Exporter
from iobmd.api import allocate
from iobmd.errors import BusyError, IOReturnError, NotOpenError
from iobmd.purgeable import EMPTY, KEEP_CURRENT, NON_VOLATILE, VOLATILE

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping as Mapped
    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor

K = TypeVar("K", bound=Hashable)


class CacheStatistics(NamedTuple):
    """What a `PurgeableCache` did so far, and what it keeps now."""

    hits: int
    """Requests that found the content intact."""
    loaded: int
    """Contents that the loader made for keys that were not there."""
    purged: int
    """Contents that were found to be taken by the system."""
    rebuilt: int
    """Contents that the loader made again for keys whose content had been taken."""
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

    def release(self) -> None:
        """End the use, so that the content may be taken when nobody else uses it; idempotent.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while a view of this item is alive: the use goes on then.
        """
        if self.exports:
            message = f"{self.exports} views of {self!r} are alive: release them first"
            raise BusyError(message)
        self._let_go()

    def _let_go(self) -> None:
        if entry := self._entry:
            entry.users.discard(id(self))
            self._entry = None
            entry.settle()

    def _held(self) -> _Entry:
        if self._entry is None:
            raise NotOpenError("this cache item is released")
        return self._entry

    def _exported(self) -> tuple[Mapped, int, int, bool]:
        return self._held().memory._exported()

    def __len__(self) -> int:
        return self._held().size

    def __repr__(self) -> str:
        return f"<CacheItem {f'of {len(self)} bytes' if self._entry else 'released'}>"

    def __enter__(self) -> Self:
        self._held()
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def __del__(self) -> None:
        with contextlib.suppress(IOReturnError):  # its memory may be garbage of the same cycle, and freed already
            self._let_go()


class _Entry:
    """One content: its buffer, what it looks like, and who uses it."""

    buffer: IOBufferMemoryDescriptor | None = None
    format = "B"
    shape: tuple[int, ...] = ()
    size = 0
    filled = False  # the content is whole, as far as the system did not take it
    known = False  # it was made before

    def __init__(self, modifiers: int, unsettled: deque[_Entry]) -> None:
        self.guard = process_local.Guard()
        self.users: set[int] = set()  # by id: adding and removing are one step, also for a garbage collection
        self._modifiers = modifiers
        self._unsettled = unsettled

    def fill(self, data: Buffer) -> None:
        """Put what the loader made into the buffer, which is non-volatile afterwards."""
        with memoryview(data) as made:
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
        """Make it non-volatile; say whether the content was taken."""
        taken = self.filled and self.memory.setPurgeable(NON_VOLATILE) == EMPTY
        self.filled &= not taken
        return taken

    def settle(self) -> None:
        """Let the system take it when nobody uses it. It waits for nobody: called by the garbage collector too."""
        if self.users:
            return
        if self.guard.mine:  # in the middle of another use: later, then
            self._unsettled.append(self)
            return
        try:
            if not self.guard.enter_if_free():
                self._unsettled.append(self)
            elif self.filled and not self.users:
                self.memory.setPurgeable(VOLATILE | self._modifiers)
        except BusyError:  # this thread was interrupted in the middle of a change
            self._unsettled.append(self)
        finally:
            self.guard.leave()

    def free(self) -> None:
        """Give the buffer back."""
        buffer, self.buffer, self.filled = self.buffer, None, False
        if buffer is not None:
            buffer.free()

    @property
    def memory(self) -> IOBufferMemoryDescriptor:
        """The buffer, which is there."""
        assert self.buffer is not None
        return self.buffer


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
        self._unsettled: deque[_Entry] = deque()  # whose last use ended while they were busy
        self._guard = process_local.Guard()
        self._counts = dict.fromkeys(("hits", "loaded", "purged", "rebuilt"), 0)
        self._maker = os.getpid()

    def __getitem__(self, key: K) -> CacheItem:
        """Return the content of `key`, in use; made by the loader if it is not there.

        Raises
        ------
        IOReturnError
            As `allocate` and `setPurgeable`; `kIOReturnBusy` when a loader asks for the very key that it makes. Or
            whatever the loader raises: then nothing is kept.
        """
        self._settle()
        while True:
            entry = self._entries.get(key) or self._entries.setdefault(key, _Entry(self._modifiers, self._unsettled))
            with entry.guard:
                if self._entries.get(key) is not entry:  # forgotten by another thread meanwhile
                    continue
                item = CacheItem(entry)
                entry.users.add(id(item))  # first: from here on nobody makes it volatile
                try:
                    self._provide(key, entry)
                except BaseException:
                    entry.users.discard(id(item))
                    item._entry = None
                    if not entry.filled:
                        self._forget(key, entry)
                    elif not entry.users:
                        self._unsettled.append(entry)
                    raise
                return item

    def _provide(self, key: K, entry: _Entry) -> None:
        if entry.lost():
            self._count("purged")
        if entry.filled:
            self._count("hits")
            return
        known = entry.known
        entry.fill(self._loader(key))
        self._count("rebuilt" if known else "loaded")

    def _forget(self, key: K, entry: _Entry) -> None:
        """Forget a key and its content, which is not in use, with the entry's guard held."""
        self._entries.pop(key, None)
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
        with entry.guard:
            if entry.users:
                raise BusyError(f"the content of {key!r} is in use")
            if self._entries.get(key) is entry:
                self._forget(key, entry)

    def sweep(self) -> int:
        """Forget the keys whose content the system has taken; returns how many."""
        self._settle()
        swept = 0
        for key, entry in list(self._entries.items()):
            with entry.guard:
                if entry.filled and not entry.users and entry.memory.setPurgeable(KEEP_CURRENT) == EMPTY:
                    self._forget(key, entry)
                    self._count("purged")
                    swept += 1
        return swept

    def close(self) -> None:
        """Forget all keys and free their contents; idempotent.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while some are in use; the others are freed.
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
        """What the cache did so far, and what it keeps now."""
        self._settle()
        known = [entry for entry in list(self._entries.values()) if entry.known]
        held = [entry.size for entry in known if entry.users]
        size = sum(entry.size for entry in known)
        with self._guard:
            return CacheStatistics(
                **self._counts, entries=len(known), held=len(held), bytes=size, held_bytes=sum(held)
            )

    def _settle(self) -> None:
        """Let the system take what came out of use while it was busy."""
        for _ in range(len(self._unsettled)):
            with contextlib.suppress(IndexError):  # another thread was faster
                self._unsettled.popleft().settle()

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
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_entries", None):
            return
        if self._maker == os.getpid():
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
        with contextlib.suppress(IOReturnError):
            self.close()
