"""Texts of /proc with names chosen by other users: every parser returns the kernel's figures, whatever the names.

For bytes that no kernel writes, the native parsers raise ValueError, without an access outside the text.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import strategies as st
from support.fuzzing import fuzzed, mutated

from iobmd import procfs
from iobmd._internal import pidns
from iobmd._native import maps as native
from iobmd._native.tracer import CALLS_ENDED_BY_A_STOP, INSTRUCTION, INSTRUCTION_ALIGNMENT
from iobmd.host import access, cgroup, fact, pages
from iobmd.memory import dma_buf
from iobmd.remote import epoll_sleep, syscall_instruction, threads
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from pathlib import Path

PID = os.getpid()
EPOLL_PWAIT = CALLS_ENDED_BY_A_STOP["epoll_pwait"]

anything = st.binary(max_size=15)
hostile = st.sampled_from([
    b"", b" ", b")", b") R 1 1", b"\n", b"\nVmFlags: ht", b"\nVmRSS:\t1 kB", b"\nPid:\t1", b"\nNSpid:\t1",
    b"\ncount:\t1", b"\ncount:\tx", b"\nse.exec_start:", b"\r", b"\v", b"\xc2\x85", b" - ",
    b"\\012", b" (deleted)", b":", b"0::/", b"/..", b"\\",
    b"\t", b"\x1b[2J", b"\xff\xfe", b"rw-p 00000000 00:00 0", b"7f00-7f01 rw-p",
])  # fmt: skip
names = st.lists(anything | hostile, max_size=4).map(b"".join).map(lambda name: name.replace(b"\0", b"0"))


def escaped(name: bytes, characters: bytes = b"\n") -> bytes:
    """Escape a name as the kernel does in /proc (seq_file's mangle_path)."""
    return b"".join(b"\\%03o" % byte if byte in characters else bytes([byte]) for byte in name)


def decoded(name: bytes) -> str:
    return os.fsdecode(name)


paths = names.map(lambda name: b"/" + name)
vmas = st.tuples(
    st.integers(0, 1 << 20),
    st.integers(1, 1 << 10),
    st.sampled_from([b"r-xp", b"rw-p", b"---s"]),
    paths | st.just(b""),
)


def maps_line(vma: tuple[int, int, bytes, bytes]) -> bytes:
    start, size, perms, name = vma
    return b"%x-%x %b 00001000 fd:01 7%b" % (
        start * PAGE_SIZE,
        (start + size) * PAGE_SIZE,
        perms,
        b"  " + escaped(name) if name else b"",
    )


def as_vma(vma: tuple[int, int, bytes, bytes]) -> procfs.VMA:
    """Undo the escapes; the kernel does not escape backslashes, so that similar text is read as an escape."""
    start, size, perms, name = vma
    text = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), decoded(escaped(name)))
    return procfs.VMA(start * PAGE_SIZE, (start + size) * PAGE_SIZE, perms.decode(), 0x1000, 7, text, "fd:01")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that replaces that of this process in /proc."""
    monkeypatch.setattr(procfs, "directory", lambda _pid: str(tmp_path))
    monkeypatch.setattr(procfs, "memory_file", lambda _pid, name: str(tmp_path / name))
    return tmp_path


@fuzzed(50, found=st.lists(vmas, max_size=6), low=st.integers(0, 1 << 33), size=st.integers(1, 1 << 33))
def test_maps(proc: Path, found: list[tuple[int, int, bytes, bytes]], low: int, size: int) -> None:
    found = sorted(found)
    (proc / "maps").write_bytes(b"".join(maps_line(vma) + b"\n" for vma in found))
    wanted = [as_vma(vma) for vma in found]
    assert list(procfs.maps("self")) == wanted
    inside = [vma for vma in wanted if vma.start < low + size and vma.end > low]
    until = next((vma for vma in wanted if vma.start >= low + size), None)
    # Areas do not overlap in the kernel's text, and parsing ends at the first one after the range.
    if found and not any(vma.start > until.start for vma in inside if until):
        assert list(procfs.areas("self", low, low + size)) == inside


COUNTERS = [b"Size", b"Rss", b"Swap", b"LazyFree", b"Private_Hugetlb"]
details = st.tuples(
    vmas,
    st.dictionaries(st.sampled_from(COUNTERS), st.integers(0, 1 << 50), max_size=5),
    st.lists(st.sampled_from([b"rd", b"lo", b"ht", b"pf"]), max_size=4),
)
Details = tuple[tuple[int, int, bytes, bytes], dict[bytes, int], list[bytes]]


def smaps_entry(found: Details) -> bytes:
    vma, counters, flags = found
    lines = [b"%b:  %12d kB" % pair for pair in counters.items()]
    return b"\n".join([maps_line(vma), *lines, b"THPeligible:    0", b"VmFlags: " + b" ".join(flags) + b" ", b""])


@fuzzed(50, found=st.lists(details, max_size=5))
def test_smaps(proc: Path, found: list[Details]) -> None:
    (proc / "smaps").write_bytes(b"".join(map(smaps_entry, found)))
    assert list(procfs.details("self")) == [
        procfs.Details(
            as_vma(vma),
            {"THPeligible": 0} | {name.decode(): size << 10 for name, size in counters.items()},
            frozenset(flag.decode() for flag in flags),
        )
        for vma, counters, flags in found
    ]


@fuzzed(60, text=st.binary(max_size=120) | mutated(st.lists(details.map(smaps_entry), max_size=3).map(b"".join)))
def test_any_bytes(text: bytes) -> None:
    for parse in (native.parse, native.parse_details, lambda text: native.parse(text, PAGE_SIZE, 1 << 40)):
        try:
            found = parse(text)
        except ValueError:
            continue
        assert len(found) <= text.count(b"\n") + 1


@fuzzed(40, name=names, state=st.sampled_from([b"S (sleeping)", b"Z (zombie)"]), size=st.integers(0, 1 << 40))
def test_status(proc: Path, name: bytes, state: bytes, size: int) -> None:
    """The name of the program comes first, truncated to 15 bytes, with newlines and backslashes escaped."""
    shown = escaped(name[:15], b"\n\\")
    (proc / "status").write_bytes(
        b"Name:\t%b\nUmask:\t0022\nState:\t%b\nTgid:\t9\nPid:\t9\nNSpid:\t9\t3\nVmRSS:\t%8d kB\n"
        % (shown, state, size)
    )
    found = procfs.status("self")
    assert found["Name"] == decoded(shown).strip("\n\t ")
    assert (found["State"], found["VmRSS"].split()) == (state.decode(), [str(size), "kB"])
    assert procfs.status_bytes("VmRSS") == size << 10
    assert pidns._numbers(str(proc)) == [9, 3]
    with pytest.raises(KeyError):
        procfs.status_bytes("VmLck")


@fuzzed(40, name=names, flags=st.integers(0, (1 << 32) - 1), start=st.integers(0, 1 << 62))
def test_stat(proc: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, flags: int, start: int) -> None:
    rest = [b"%d" % number for number in range(4, 53)]
    rest[5], rest[18], rest[37] = b"%d" % flags, b"%d" % start, b"0"
    for folder in (proc, proc / "task" / "9"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stat").write_bytes(b"9 (%b) S %b\n" % (name[:15], b" ".join(rest)))
        (folder / "syscall").write_bytes(b"%d 0x1 0x7ff0 0x2\n" % EPOLL_PWAIT)
    assert procfs.start_time() == start
    assert procfs.flags() == flags
    monkeypatch.setattr(pidns, "directory", lambda _pid: str(proc))
    assert threads.state(9, 9) == "S"
    assert threads.activity(9, 9) == threads.Activity(3, 9, 39, EPOLL_PWAIT, 0x7FF0)


@fuzzed(40, name=names, last=st.floats(0, 1e12), switches=st.integers(0, 1 << 40))
def test_sched(proc: Path, name: bytes, last: float, switches: int) -> None:
    """The name of the program comes first, unescaped."""
    (proc / "sched").write_bytes(
        b"%b (9, #threads: 1)\n---\nse.exec_start      :   %.6f\nse.vruntime   :  1.0\n" % (name[:15], last)
    )
    (proc / "status").write_bytes(
        b"Name:\t%b\nvoluntary_ctxt_switches:\t%d\nnonvoluntary_ctxt_switches:\t3\n"
        % (escaped(name[:15], b"\n\\"), switches)
    )
    assert epoll_sleep._last_ran(str(proc / "sched")) == float(f"{last:.6f}")
    assert epoll_sleep._field(str(proc / "status"), "voluntary_ctxt_switches") == f"\t{switches}"


mounts = st.lists(
    st.tuples(paths, paths, st.sampled_from([b"cgroup2", b"cgroup", b"ext4", b"proc"]), names), max_size=5
)


def mount_line(mount: tuple[bytes, bytes, bytes, bytes]) -> bytes:
    root, place, kind, source = mount
    blanks = b" \t\n\\"
    options = b"rw,memory" if kind == b"cgroup" else b"rw"
    return b"36 35 98:0 %b %b rw,noatime master:1 - %b %b %b" % (
        escaped(root, blanks), escaped(place, blanks), kind, escaped(source, blanks + b"#"), options
    )  # fmt: skip


@fuzzed(50, found=mounts)
def test_mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: list[tuple[bytes, ...]]) -> None:
    (tmp_path / "mountinfo").write_bytes(b"".join(mount_line(mount) + b"\n" for mount in found))
    for module in (cgroup, access):
        reading(monkeypatch, module, tmp_path, "/proc/self/mountinfo")
    assert cgroup.mounts("memory") == [
        cgroup.HierarchyMount(decoded(root), decoded(place), kind == b"cgroup2")
        for root, place, kind, _source in found
        if kind.startswith(b"cgroup")
    ]
    assert access.proc_options() == {}


@fuzzed(50, path=paths, number=st.sampled_from([b"0", b"7"]), mount=mounts)
def test_cgroups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: bytes, number: bytes, mount: list[tuple[bytes, ...]]
) -> None:
    """A group is found below a mount that shows it, or not at all."""
    (tmp_path / "mountinfo").write_bytes(b"".join(mount_line(one) + b"\n" for one in mount))
    reading(monkeypatch, cgroup, tmp_path, "/proc/self/mountinfo")
    member = b"1:name=x:/\n%b:%b:%b" % (number, b"" if number == b"0" else b"memory", escaped(path))
    for group in cgroup.around("memory", member=decoded(member)):
        assert group.unified == (number == b"0")
        places = [decoded(place).rstrip("/") for _root, place, _kind, _source in mount]
        below = [group.directory.removeprefix(place) for place in places if group.directory.startswith(place)]
        assert any(".." not in path.split("/") for path in below), "outside of the mount"


@fuzzed(40, name=paths, size=st.integers(0, 1 << 50))
def test_swaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, size: int) -> None:
    name = escaped(name, b" \t\n\\")
    head = b"Filename\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    (tmp_path / "swaps").write_bytes(head + b"%-40b file\t\t%d\t\t0\t\t-2\n" % (name, size))
    reading(monkeypatch, pages, tmp_path, "/proc/swaps")
    assert [(area.size, area.priority) for area in pages.swap_areas()] == [(size << 10, -2)]


@fuzzed(40, count=st.integers(1, 1 << 40), name=names)
def test_names_of_dma_bufs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, name: bytes) -> None:
    """Any process with a descriptor sets the name, which fdinfo shows last."""
    fields = b"pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t7\nsize:\t65536\ncount:\t%d\nexp_name:\tudmabuf\nname:\t%b\n"
    (tmp_path / "fdinfo").write_bytes(fields % (count, name))
    monkeypatch.setattr(dma_buf, "Path", lambda _path: tmp_path / "fdinfo")
    assert dma_buf.references(0) == count


def reading(monkeypatch: pytest.MonkeyPatch, module: object, folder: Path, path: str) -> None:
    """Make a module read `path` from a directory."""
    read_text = fact.read_text
    there = str(folder / path.rpartition("/")[2])
    monkeypatch.setattr(module, "read_text", lambda wanted: read_text(there if wanted == path else wanted))


class Program:
    """A task whose memory is a few bytes of code at a few addresses."""

    pid = PID

    def __init__(self, code: dict[int, bytes], lives: int) -> None:
        self.code, self.lives = code, lives

    @property
    def alive(self) -> bool:
        self.lives -= 1
        return self.lives > 0

    def read(self, address: int, size: int) -> bytes:
        from iobmd.errors import VMError

        assert size <= 4 << 20
        for start, data in self.code.items():
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        raise VMError("nothing is mapped there")


parts = st.sampled_from([INSTRUCTION[:1], INSTRUCTION[1:], INSTRUCTION, b"\x90"])
code = st.binary(max_size=60) | st.lists(parts, max_size=8).map(b"".join)
auxv = st.lists(st.tuples(st.sampled_from([0, 3, 33]), st.integers(0, (1 << 64) - 1)), max_size=3).map(
    lambda pairs: b"".join(key.to_bytes(8, "little") + value.to_bytes(8, "little") for key, value in pairs)
)


@fuzzed(
    50,
    auxv=auxv | st.binary(max_size=40) | st.just((33).to_bytes(8, "little") + (1 << 16).to_bytes(8, "little")),
    code=st.lists(code, max_size=4),
    names=st.lists(st.sampled_from([b"[vdso]", b"/lib/[vdso]", b"[vsyscall]", b""]), min_size=4, max_size=4),
    longer=st.integers(0, 1 << 30),
    known=st.none() | st.integers(0, 64),
    lives=st.integers(1, 9),
)
def test_search_of_a_system_call(
    proc: Path, monkeypatch: pytest.MonkeyPatch, auxv: bytes, code: list[bytes], names: list[bytes], longer: int,
    known: int | None, lives: int,
) -> None:  # fmt: skip
    """The target chooses its auxiliary vector, its code, and the memory at the address of the vDSO."""
    from iobmd.errors import NotFoundError, UnsupportedError

    mapped = {(index + 1) << 16: data for index, data in enumerate(code)}
    found = [
        procfs.VMA(start, start + max(1, len(data)) + longer, "r-xp", 0, 0, names[index].decode())
        for index, (start, data) in enumerate(mapped.items())
    ]
    (proc / "auxv").write_bytes(auxv)
    monkeypatch.setattr(syscall_instruction, "_SETTLED", 0)
    monkeypatch.setattr(syscall_instruction, "_offset_in_vdso", known)
    monkeypatch.setattr(syscall_instruction, "areas", lambda _task: found)
    monkeypatch.setattr(
        procfs, "find_vma", lambda _pid, at: next((one for one in found if one.start <= at < one.end), None)
    )
    task = Program(mapped, lives)
    try:
        address = syscall_instruction.find(task)  # type: ignore[arg-type]
    except (UnsupportedError, NotFoundError):
        return
    assert task.read(address, len(INSTRUCTION)) == INSTRUCTION
    assert address % INSTRUCTION_ALIGNMENT == 0
