from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

def run_apart(body: Callable[[], _T], in_process: bool) -> _T: ...
