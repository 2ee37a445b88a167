"""A process of the target's user kills the snapshot of a lazy copy: an access to its pages would raise SIGBUS."""

import contextlib
import os
import signal

import pytest
from support.child import NOBODY, in_child
from support.kernel import PAGE
from support.targets import Target, build, children

import iobmd

SIZE = 128 << 20


@pytest.mark.needs("root", "compiler", "lazy_copies")
@pytest.mark.usefixtures("may_trace")
def test_another_user_cannot_end_a_lazy_copy() -> None:
    with Target([build("snapshot"), str(SIZE)], user=NOBODY) as target:
        own = int(target.line().split()[0])

        def is_whole() -> bool:
            with iobmd.copy(target.pid, own, SIZE, wired=False, lazy=True) as copy:
                in_child(kill_children, uid=NOBODY)
                with memoryview(copy) as view:
                    return view[::PAGE] == b"\1" * (SIZE // PAGE)

        def kill_children() -> None:
            for pid in children(target.pid).split():
                with contextlib.suppress(ProcessLookupError):  # everything was fetched in the meantime
                    os.kill(int(pid), signal.SIGKILL)

        for _ in range(5):  # which of both is faster varies
            assert in_child(is_whole)  # a signal would end it
