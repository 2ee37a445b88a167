from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

class NoThreadError(Exception): ...

def run_apart(body: Callable[[], _T], in_process: bool) -> _T: ...
