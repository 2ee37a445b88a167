"""Cache instructions of aarch64, counted while they are executed under emulation of a process.

Emulation has no caches, so that the effect of the instructions is invisible. What can be verified is which of them
are executed, and how often.
"""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("aarch64_emulation")

HEADERS = Path(__file__).parents[2] / "cython_ext"
PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
#include "cacheline.h"
static char memory[1 << 16] __attribute__((aligned(4096))), source[1 << 16];
int main(int argc, char **argv)
{
    size_t size = strtoul(argv[3], 0, 0), line = iobmd_line(), count = 0;
    char *at = memory + strtoul(argv[2], 0, 0);
    int how = iobmd_best(), mode = atoi(argv[1]);
    if (mode < 0)
        count = iobmd_lines((uintptr_t)at, size, line, how, mode == -1 ? iobmd_write_back : iobmd_drop);
    else
        iobmd_copy(at, source, size, mode, argc > 4, line, how);
    printf("%zu %zu %d\\n", line, count, how == IOBMD_DC);
}
"""
WRITE_BACK, DROP = "-1", "-2"
INHIBIT, WRITE_THROUGH, WRITE_COMBINE = "1", "2", "4"
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s.*\t(dc)\s+(cvac|civac),|^\s*([0-9a-f]+):\s.*\t(stnp)\s", re.MULTILINE)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cacheline")
    (folder / "program.c").write_text(PROGRAM)
    command = [
        "aarch64-linux-gnu-gcc",
        "-O2",
        "-static",
        f"-I{HEADERS}",
        "-o",
        folder / "program",
        folder / "program.c",
    ]
    subprocess.run(command, check=True)
    return folder / "program"


def executed(program: Path, *arguments: str | int) -> tuple[Counter[str], int, int]:
    """Run the program one instruction at a time; return the executed ones by name, the line size, and its count."""
    listed = subprocess.run(["aarch64-linux-gnu-objdump", "-d", program], capture_output=True, text=True, check=True)
    names = {int(found[1] or found[4], 16): found[3] or found[5] for found in INSTRUCTION.finditer(listed.stdout)}
    log = program.with_name("log")
    command = ["qemu-aarch64-static", "-singlestep", "-d", "exec,nochain", "-D", log, program, *map(str, arguments)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line, count, is_dc = map(int, printed.split())
    assert is_dc
    addresses = (
        int(found, 16) for found in re.findall(r"^Trace \d+: \S+ \[[0-9a-f]+/([0-9a-f]+)/", log.read_text(), re.M)
    )
    return Counter(names[address] for address in addresses if address in names), line, count


def lines(offset: int, size: int, line: int) -> int:
    """Return the number of lines with a byte of a range."""
    return (offset + size - 1) // line - offset // line + 1 if size else 0


@pytest.mark.parametrize(("operation", "instruction"), [(WRITE_BACK, "cvac"), (DROP, "civac")])
@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 4096), (100, 1000), (63, 2), (5, 0)])
def test_each_line_once(program: Path, operation: str, instruction: str, offset: int, size: int) -> None:
    found, line, count = executed(program, operation, offset, size)
    assert found == Counter({instruction: count}) - Counter()
    assert count == lines(offset, size, line)


@pytest.mark.parametrize(("mode", "instruction"), [(INHIBIT, "civac"), (WRITE_THROUGH, "cvac")])
def test_writes(program: Path, mode: str, instruction: str) -> None:
    found, line, _ = executed(program, mode, 100, 1000, "writing")
    assert found == {instruction: lines(100, 1000, line)}


def test_reads_from_memory(program: Path) -> None:
    found, line, _ = executed(program, INHIBIT, 100, 1000)
    assert found == {"civac": lines(0, 1000, line)}  # those of the source
    assert executed(program, WRITE_THROUGH, 100, 1000)[0] == {}


def test_stores_around_the_caches(program: Path) -> None:
    """Whole pieces of 64 bytes by STNP, 16 bytes each; both ends are dropped."""
    found, line, _ = executed(program, WRITE_COMBINE, 100, 1000, "writing")
    head, body = 28, 1000 - 28 - (1000 - 28) % 64
    tail = 1000 - head - body
    assert found == {"stnp": body // 16, "civac": lines(100, head, line) + lines(100 + head + body, tail, line)}
