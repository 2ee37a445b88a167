"""Real, wired, physically known memory on Linux, from Python, under IOKit's names.

>>> import iobmd
>>> with iobmd.allocate(65536) as buf:
...     buf.writeBytes(0, b"hello"), buf.wiring
(5, <Wiring.PINNED: 'pinned'>)
"""

from importlib import import_module
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from iobmd import constants
from iobmd._version import __version__ as __version__
from iobmd.constants import *  # noqa: F403

if TYPE_CHECKING:
    from iobmd.library import *  # noqa: F403
else:

    def __getattr__(name):
        """Load the library, whole, when the first of its names is used: a command needs a part of its modules only.

        Whole, for what comes later may be unable to open a file: out of descriptors, in a chroot, as another user.
        """
        if name != "__all__":
            if name.startswith("__"):
                raise AttributeError(f"module 'iobmd' has no attribute {name!r}")
            # `from iobmd import procfs` asks here too
            if PathFinder.find_spec(f"iobmd.{name}", __path__):  # noqa: F405
                return import_module(f"iobmd.{name}")
        library = import_module("iobmd.library")
        public = [*library.__all__, *constants.__all__, "__version__"]
        globals().update({each: getattr(library, each) for each in library.__all__}, __all__=public)
        if name in globals():
            return globals()[name]
        raise AttributeError(f"module 'iobmd' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
