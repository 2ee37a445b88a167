"""Reports of choices that callers do not otherwise see, by the logger "iobmd" at level DEBUG."""

import sys


def debug(message: str, *arguments: object) -> None:
    """Report a failed attempt, and why a weaker alternative was chosen.

    Nothing is imported: a program that has not loaded the logging package does not use its messages, and loading it
    takes half as long as loading iobmd. Destructors and signal handlers must not call this, because handlers of a
    logger have locks.
    """
    logging = sys.modules.get("logging")
    if logging is not None:
        logging.getLogger("iobmd").debug(message, *arguments)
