"""Reports of choices that callers do not see otherwise, by the logger "iobmd" at level DEBUG."""

import sys


def debug(message: str, *arguments: object) -> None:
    """Report what was tried, and why a weaker form was chosen.

    Nothing is imported: a program that has not loaded the logging package has not asked for its messages either, and
    loading it takes half as long as loading iobmd. Destructors and signal handlers must not call this, because
    handlers of a logger have locks.
    """
    logging = sys.modules.get("logging")
    if logging is not None:
        logging.getLogger("iobmd").debug(message, *arguments)
