"""Input without an end: the time and the memory that it takes are bounded."""

import resource
import time
from pathlib import Path

from support.child import in_child

from iobmd import sharing
from iobmd.cli import main

MIB = 1 << 20


def test_a_file_without_newlines(tmp_path: Path) -> None:
    """`--diff` read all of it as one line."""
    file = tmp_path / "snapshot"
    with file.open("wb") as opened:
        opened.truncate(1 << 32)

    def read() -> tuple[int, int]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = main(["pagemap", "self", "--diff", str(file)])
        return code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    code, kibibytes = in_child(read)
    assert code == 1
    assert kibibytes < 100 << 10


class Dripping:
    """A socket whose peer sends single bytes."""

    def recvmsg(self, *_arguments: int) -> tuple[bytes, list[object], int, None]:
        return b"x", [], 0, None


def test_a_peer_that_sends_single_bytes() -> None:
    """Half of the largest description: 0.65 s; 5.4 s where each byte has all before it copied."""
    begin = time.process_time()
    assert sharing._exactly(Dripping(), MIB // 2, []) == b"x" * (MIB // 2)  # type: ignore[arg-type]
    assert time.process_time() - begin < 4
