"""What a caller hangs on a descriptor and iobmd only keeps: the part of `IOMemoryDescriptor` that has its context."""

from __future__ import annotations

from typing import Any


class Labels:
    """A context, and the tags of its mappings."""

    vm_tags = (0, 0)
    """The `kernTag` and `userTag` it was made with, or that `setVMTags` gave it."""

    _context: Any = None

    def setContext(self, obj: Any) -> None:
        """Keep an object of the caller's with the descriptor, instead of the one before; None: none."""
        self._context = obj

    def copyContext(self) -> Any:
        """Return the object that `setContext` was given, None when there is none."""
        return self._context

    def setVMTags(self, kernTag: int, userTag: int) -> None:
        """Keep the tags of mappings in `kernel_task` and in other tasks. What is mapped already keeps its name."""
        self.vm_tags = (kernTag, userTag)
