"""What is made of a descriptor's memory, and keeps it: the part of `IOMemoryDescriptor` that knows its family."""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Self

from iobmd._internal import process_local
from iobmd._internal.weak_registry import WeakRegistry
from iobmd.constants import IOReturn
from iobmd.descriptors import address_index
from iobmd.errors import IOReturnError
from iobmd.purgeable import purger

if TYPE_CHECKING:
    from iobmd.backing import Backing
    from iobmd.backing.joined import JoinedBacking
    from iobmd.descriptors.mapping_cache import Window


class Lineage:
    """Knows weakly what is made of its memory; that holds it strongly."""

    _backing: Backing | None
    _guard: process_local.Guard
    _windows: weakref.WeakSet[Window]
    _state: str
    _offspring: WeakRegistry[JoinedBacking] | None = None
    _inherited = False  # its caller has freed it, and what was made of it has it still

    def _refuse_if_mapped(self) -> None:
        raise NotImplementedError

    _maker: int
    _prepared: int
    if TYPE_CHECKING:
        free: Any
        complete: Any

    @property
    def _children(self) -> WeakRegistry[JoinedBacking]:
        if self._offspring is None:
            self._offspring = WeakRegistry()
        return self._offspring

    def _hold(self, backing: Backing, options: int, length: int) -> Self:
        """Be a descriptor of memory that is there already."""
        self.__dict__.update(_guard=process_local.Guard(), _windows=weakref.WeakSet(), _backing=backing)
        self.__dict__.update(
            _options=options, _length=length, _maker=os.getpid(), _wired_by=os.getpid(), _state="open"
        )
        return self

    def _bequeath(self) -> bool:
        """Leave the memory to what was made of it; False when nothing is there that was.

        That is what IOKit's reference counts do when a caller releases a descriptor that others retain.
        """
        if self._backing is None:  # another thread was faster
            return False
        children = self._offspring.all() if self._offspring and not self._inherited else []
        if not children:
            return False
        self._refuse_if_mapped()
        if views := getattr(self, "exports", 0):
            message = f"{self!r} is in use ({views} views): release its memoryviews and arrays first"
            raise IOReturnError(IOReturn.kIOReturnBusy, message)
        old: Any = self
        heir: Any = type(self).__new__(type(self))
        heir.__dict__.update(self.__dict__, _guard=process_local.Guard(), _windows=weakref.WeakSet(), _inherited=True)
        heir._offspring = WeakRegistry()
        for child in children:
            child.replace(old, heir)
        self._backing, self._state, self._offspring = None, "released", None
        address_index.know(heir)
        if heir._backing.purgeable:
            purger.know(heir)
        return True

    def _orphaned(self) -> None:
        """Give the memory back when its caller has, and nothing is left that was made of it."""
        if self._inherited and self._backing is not None and not self._children.all():
            self.free()

    def __del__(self) -> None:
        """Undo what its user has left prepared, of its own memory or that of others. It need not be freed."""
        if self._backing is None or not self._prepared or self._maker != os.getpid():
            return
        self._complete_all()
        if not self._inherited:
            warnings.warn(f"{self!r} was never completed", ResourceWarning, stacklevel=2, source=self)

    def _complete_all(self) -> None:
        """Undo every `prepare`, as far as that is possible, where nobody can be told that it is not."""
        for _ in range(self._prepared):
            with contextlib.suppress(IOReturnError):
                self.complete()
