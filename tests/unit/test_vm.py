"""The harness of the guests (tools/vm): the criteria of failure, the choice of kernels, and the packed files."""

import gzip
import lzma
import os
import signal
import struct
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from iobmd.tools.vm import (
    accesses,
    cache,
    cpio,
    cross,
    disk,
    guest,
    image,
    kernels,
    machine,
    modules,
    pair,
    profiles,
    table,
    userland,
    vfio_modules,
    vmlinux,
)
from iobmd.tools.vm.__main__ import main
from iobmd.tools.vm.architecture import ARCHITECTURES, Architecture, of_host
from iobmd.tools.vm.debian import Archive
from iobmd.tools.vm.guest import Outcome, verdict
from iobmd.tools.vm.kernels import Kernel
from iobmd.tools.vm.machine import Machine
from iobmd.tools.vm.runs import Run

GOOD = "@@UP 5.1 6.1\n===== 3 passed, 1 skipped in 0.83s =====\n@@EXIT 0 18.14\n"


def test_a_guest_that_passed() -> None:
    assert verdict(GOOD, "") == ""


@pytest.mark.parametrize(
    ("output", "log", "why"),
    [
        (GOOD.replace("@@EXIT 0 18.14\n", ""), "", "marker"),
        (GOOD.replace("@@EXIT 0", "@@EXIT 1"), "", "status 1"),
        ("@@EXIT 0 18.14\n", "", "no summary"),
        ("===== 1 skipped in 0.83s =====\n@@EXIT 0 18.14\n", "", "no summary"),  # everything skipped proves nothing
        (GOOD, "[ 9.1] BUG: kernel NULL pointer dereference, address: 0", "NULL pointer"),
        (GOOD, "[ 9.1] Kernel panic - not syncing: sysrq", "panic"),
        (GOOD, "[ 9.1] WARNING: CPU: 0 PID: 1 at mm/gup.c:12", "gup"),
        (GOOD, "[ 9.1] WARNING: mm/gup.c:12 at try_grab_folio, CPU#0: python3/1", "gup"),
    ],
)
def test_a_guest_that_failed(output: str, log: str, why: str) -> None:
    assert why in verdict(output, log)


def test_a_guest_that_did_not_come_up() -> None:
    assert Outcome(GOOD, "", "", 1).came_up
    assert not Outcome("", "Oops: int3", "the kernel", 1).came_up


def emulate(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Use a shell script instead of QEMU."""
    qemu = folder / of_host().qemu
    qemu.write_text(f"#!/bin/sh\n{script}\n")
    qemu.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    ("script", "why", "came_up"),
    [
        ("exec sleep 1000", "not started within 0.2 s", False),
        ("echo @@UP 1 6.1; exec sleep 1000", "still running after 0 s", True),
        ("echo @@UP 1 6.1; sleep 3.5; echo '=== 1 passed in 1s ==='; echo @@EXIT 0 2", "", True),
        ("exit 3", "QEMU ended with status 3", False),
        ("kill -SEGV $$", "QEMU was ended by SIGSEGV", False),
    ],
)
def test_how_a_guest_ended(
    script: str, why: str, came_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(tmp_path, monkeypatch, script)
    # A shell that is to start may take more than a second on a busy machine.
    monkeypatch.setattr(guest, "BOOT", 0.2 if "not started" in why else 3)
    timeout = 30 if not why else 0.3
    kernel = Kernel("6.1", "6.1", tmp_path, tmp_path, of_host())
    with guest.Guests() as guests:
        outcome = guests.boot(kernel, Machine(), tmp_path / "initramfs", timeout, lambda _line: None)
    assert (outcome.failure, outcome.came_up) == (why, came_up)


ENDS = "echo @@UP 1 6.1; sleep 0.4; echo '=== 1 passed in 1s ==='; echo @@EXIT 0 2; exit"
STAYS = "echo @@UP 1 6.1; exec sleep 1000"


@pytest.mark.parametrize(
    ("peer", "log", "why", "came_up"),
    [
        (STAYS, "", "", True),
        (STAYS, "[ 9.1] Oops: 0000", "the other guest: the kernel: [ 9.1] Oops: 0000", True),
        ("exit 3", "", "QEMU ended with status 3", False),
    ],
)
def test_two_connected_guests(
    peer: str, log: str, why: str, came_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second ends with the first, and its kernel must report no error either; each has one end of a socket."""
    logged = f'for word; do case $word in file:*) echo "{log}" >"${{word#file:}}"; esac; done'
    socket = 'test -S /dev/fd/$(expr "$*" : ".*link,fd=\\([0-9]*\\)") || exit 9'
    emulate(tmp_path, monkeypatch, f'{socket}\ncase "$*" in *:02,*) {logged}; {peer};; esac\n{ENDS}')
    (tmp_path / "peer").mkdir()
    kernel = Kernel("6.1", "6.1", tmp_path, tmp_path, of_host())
    places = (tmp_path / "initramfs", tmp_path / "peer/initramfs")
    begin = time.monotonic()
    with guest.Guests() as guests:
        outcome = pair.boot(guests, kernel, Machine(), *places, 30, lambda _line: None)
    assert (outcome.failure, outcome.came_up) == (why, came_up)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("interrupts_waits", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_guests(
    number: int,
    interrupts_waits: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guests that have not started end too, and nothing remains of any: no process, no directory.

    A signal to another thread does not interrupt the wait of the main thread, as one that arrives just before it.
    """
    started, folder = tmp_path / "started", tmp_path / "tmp"
    folder.mkdir()
    emulate(tmp_path, monkeypatch, f"echo $$ >>{started}; exec sleep 1000")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(machine, "missing", lambda _architecture: "")
    monkeypatch.setattr(kernels, "kernel", lambda one, series: Kernel(series, series, Path(), Path(), one))
    monkeypatch.setattr(image, "base", lambda _architecture: Path())
    monkeypatch.setattr(image, "packages", lambda _architecture, _names: Path())
    monkeypatch.setattr(image, "payload", lambda file, _architecture: file.touch())
    monkeypatch.setattr(image, "initramfs", lambda file, *_parts: file.touch())

    def pids() -> list[int]:
        return [int(pid) for pid in started.read_text().split()] if started.exists() else []

    def interrupt() -> None:
        while len(pids()) < 2:
            time.sleep(0.01)
        thread = threading.main_thread().ident if interrupts_waits else threading.get_ident()
        signal.pthread_kill(thread or 0, number)

    threading.Thread(target=interrupt).start()
    assert main(["run", "--kernels", "5.10 6.1", "--profiles", "small nvme", "--jobs", "2"]) == 130
    assert len(pids()) == 2
    for pid in pids():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list(folder.iterdir())
    shown = capsys.readouterr()
    assert shown.err == "interrupted: the guests were ended\n"
    assert "FAILED" not in shown.out
    assert "trying again" not in shown.out


LISTED = [
    "5.10.0-46",
    "6.1.0-0.deb11.52",
    "6.1.0-56",
    "6.12.9+deb13",
    "6.12.117+deb12",
    "7.3.4+deb13",
    "6.18.15+deb13",
]


@pytest.mark.parametrize(
    ("series", "first"),
    [
        ("6.1", "6.1.0-56"),  # not 6.12, and not the older one of another suite
        ("6.12", "6.12.117+deb12"),  # 117 is more than 9
        ("newest", "7.3.4+deb13"),
        ("6.6", "7.3.4+deb13"),  # the mirror has none
    ],
)
def test_the_newest_of_a_series(series: str, first: str) -> None:
    assert kernels.by_age(LISTED, series)[0] == first


def test_an_archive_is_what_the_kernel_unpacks(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"12345")
    (tmp_path / "tree/link").symlink_to("file")
    with (tmp_path / "archive").open("wb") as file, cpio.Archive(file) as packed:
        packed.copy(tmp_path / "tree", "/a/b")
    raw = (tmp_path / "archive").read_bytes()
    assert len(raw) % 512 == 0
    assert unpacked(raw) == {"a": b"", "a/b": b"", "a/b/file": b"12345", "a/b/link": b"file"}


def unpacked(raw: bytes) -> dict[str, bytes]:
    """Read an archive as init/initramfs.c does."""
    found: dict[str, bytes] = {}
    at = 0
    while True:
        assert raw[at : at + 6] == b"070701"
        fields = [int(raw[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        name = raw[at + 110 : at + 110 + fields[11] - 1].decode()
        at = -(-(at + 110 + fields[11]) // 4) * 4
        if name == "TRAILER!!!":
            return found
        found[name] = raw[at : at + fields[6]]
        at = -(-(at + fields[6]) // 4) * 4


@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress])
def test_the_kernel_is_taken_out_of_its_image(compress) -> None:
    packed = compress(b"\x7fELF kernel") + b"size"
    header = bytearray(0x400 + 512)
    header[0x1F1] = 1
    struct.pack_into("<II", header, 0x248, 512, len(packed))
    assert vmlinux.extract(bytes(header) + b"\0" * (1024 + 512 - len(header)) + packed) == b"\x7fELF kernel"


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "kernel/drivers").mkdir(parents=True)
    (tmp_path / "kernel/drivers/vfio-pci.ko.xz").write_bytes(lzma.compress(b"\0depends=vfio,irqbypass\0"))
    (tmp_path / "kernel/vfio.ko").write_bytes(b"\0depends=\0")
    (tmp_path / "kernel/irqbypass.ko").write_bytes(b"no such field")
    assert list(modules.load(tmp_path, ("vfio_pci", "built_in"))) == ["vfio", "irqbypass", "vfio_pci"]


def test_modules_are_where_modprobe_finds_them(tmp_path: Path) -> None:
    tree = tmp_path / "6.1.0"
    (tree / "kernel").mkdir(parents=True)
    (tree / "kernel/vivid.ko").write_bytes(b"\0depends=videodev\0")
    (tree / "kernel/videodev.ko").write_bytes(b"\0depends=\0")
    (tree / "kernel/zram.ko").write_bytes(b"\0depends=\0")
    modules.pack(tree, tmp_path / "archive")
    found = unpacked((tmp_path / "archive").read_bytes())
    assert found["modules"] == b"zram\n"
    assert found["lib/modules/6.1.0/vivid.ko"] == b"\0depends=videodev\0"
    assert b"vivid.ko: videodev.ko\n" in found["lib/modules/6.1.0/modules.dep"]


class Source:
    """Debian's packages that compile modules, with a `make` that creates empty ones."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unpacked: list[str] = []
        self.script = folder / "bin/make"
        self.script.parent.mkdir()
        code = (
            'for word; do case $word in M=*) cd "${word#M=}";; esac; done; touch iommufd/iommufd.ko vfio/vfio-pci.ko'
        )
        self.script.write_text(f'#!/bin/sh\necho "$*" >{folder}/command\n{code}\n')
        self.script.chmod(0o755)
        monkeypatch.setenv("PATH", str(self.script.parent), prepend=":")

    def apt(self, *_command: str) -> str:
        return "Package: linux-headers\nVersion: 6.12.9-1~deb12u1\n"

    def unpack(self, packages: tuple[str, ...], place: Path) -> None:
        self.unpacked += packages
        headers = place / "usr/src/linux-headers-6.12.9+deb12-amd64"
        headers.mkdir(parents=True)
        (headers / "Makefile").write_text("include /usr/src/linux-headers-6.12.9+deb12-common/Makefile\n")
        with tarfile.open(place / "usr/src/linux-source-6.12.tar.xz", "w:xz") as archive:
            for name in (
                *("drivers/iommu/iommufd/Makefile", "drivers/iommu/iommu-priv.h", "drivers/iommu/iommu.c"),
                *("drivers/vfio/Makefile", "lib/interval_tree.c", "lib/string.c"),
            ):
                archive.addfile(tarfile.TarInfo(f"linux-source-6.12/{name}"))


def test_modules_with_iommufd_replace_those_of_vfio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled from the source of the same version; only the required files of it are unpacked."""
    tree, place, packages = tmp_path / "6.12.9+deb12-amd64", tmp_path / "build", Source(tmp_path, monkeypatch)
    (tree / "kernel/drivers/vfio/pci").mkdir(parents=True)
    for name in ("vfio_iommu_type1.ko.xz", "pci/vfio-pci.ko.xz", "pci/vfio-pci-core.ko.xz"):
        (tree / "kernel/drivers/vfio" / name).write_bytes(b"Debian's")
    vfio_modules.replace_vfio(cast("Archive", packages), "6.12.9+deb12", "amd64", tree, place)
    assert "linux-source-6.12=6.12.9-1~deb12u1" in packages.unpacked
    assert {path.name for path in tree.glob("kernel/**/*.ko*")} == {
        *("iommufd.ko", "vfio-pci.ko", "vfio-pci-core.ko.xz", "vfio_iommu_type1.ko.xz")
    }
    code = place / "code"
    assert (code / "Kbuild").read_text() == "obj-m += iommufd/ vfio/\n"
    assert (code / "iommufd/Makefile").read_text().endswith("iommufd-y += spans.o\n")
    assert (code / "iommu-priv.h").exists()
    assert not list(place.glob("**/string.c"))
    assert not list(place.glob("**/iommu.c"))
    assert str(place) in (place / "usr/src/linux-headers-6.12.9+deb12-amd64/Makefile").read_text()
    command = (tmp_path / "command").read_text()
    assert "CONFIG_IOMMUFD=m" in command
    assert "-DCONFIG_VFIO_DEVICE_CDEV=1" in command


def test_modules_are_compiled_for_a_kernel_of_this_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their compiler is then that of the kernel."""
    monkeypatch.setattr(vfio_modules.platform, "freedesktop_os_release", lambda: {"VERSION_ID": "12"})
    listed = ["6.12.118+deb13", "6.12.117+deb12", "6.12.115+deb12"]
    assert vfio_modules.suitable(listed) == listed[1:]
    assert vfio_modules.suitable(listed[:1]) == listed[:1]


def test_what_fails_halfway_is_not_kept(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        draft.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        cache.made(tmp_path / "kernel", fail)
    assert not list(tmp_path.iterdir())
    made = cache.made(tmp_path / "kernel", lambda draft: draft.write_text("whole"))  # type: ignore[arg-type,return-value]
    assert cache.made(made, fail).read_text() == "whole"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_two_threads_may_make_the_same(kind: str, tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def make(draft: Path) -> None:
        if kind == "directory":
            draft.mkdir()
        (draft / "file" if kind == "directory" else draft).write_text("whole")
        both.wait(10)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: cache.made(tmp_path / "base", make), range(2)))
    files = [path / "file" if kind == "directory" else path for path in made]
    assert [path.read_text() for path in files] == ["whole", "whole"]
    assert len(list(tmp_path.iterdir())) == 1


def test_archives_of_packages_are_those_of_an_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(userland, "debian_packages", lambda one, _names: tmp_path / f"packages-3.11-{one.debian}-1")
    monkeypatch.setattr(image, "_pack_debian_packages", lambda place, archive: archive.write_text(place.name))
    packed = [image.debian_packages(one, ("python3-pyverbs",)).read_text() for one in ARCHITECTURES.values()]
    assert packed == [f"packages-3.11-{one.debian}-1" for one in ARCHITECTURES.values()]


def test_the_disk_is_compared(tmp_path: Path) -> None:
    image = disk.make(tmp_path / "disk", 2)
    assert "MiB 0" in disk.compare(image)
    image.write_bytes(disk.pattern(0) + disk.pattern(1))
    assert disk.compare(image) == ""
    image.write_bytes(disk.pattern(0) + disk.pattern(1)[:-1] + bytes([disk.pattern(1)[-1] ^ 1]))
    assert "MiB 1" in disk.compare(image)


def command(name: str, **keywords: Any) -> list[str]:
    kernel = Kernel("6.12", "6.12", Path("k"), Path("m"), ARCHITECTURES[name])
    return Machine(**keywords).command(kernel, Path("i"), Path("l"))


@pytest.mark.parametrize(
    ("name", "machine", "mask", "parameter"),
    [
        ("x86_64", "q35,max-ram-below-4g=256M", 0xFFFFFFF, "intel_iommu=on"),
        ("aarch64", "virt,gic-version=3,iommu=smmuv3", 0xFFFFFFFF, "console=ttyAMA0"),
    ],
)
def test_devices_of_a_machine(name: str, machine: str, mask: int, parameter: str) -> None:
    """256 MiB of memory are above 4 GiB in each architecture; where it begins at 1 GiB, 3 GiB are below."""
    words = command(name, memory=512, below_4g=256, edu=2, edu_narrow=True, iommu=True, nodes=2)
    assert words.count(f"edu,dma_mask={mask:#x}") == 2
    assert machine in words
    assert ("intel-iommu,intremap=on" in words) == (name == "x86_64")
    size = 512 if name == "x86_64" else (3 << 10) + 256
    assert words[words.index("-m") + 1] == str(size)
    assert f"memory-backend-ram,id=memory1,size={size // 2}M" in words
    parameters = words[words.index("-append") + 1].split()
    assert parameter in parameters
    assert f"IOBMD_EDU_MASK={mask:#x}" in parameters


def test_devices_that_reach_everything() -> None:
    assert "edu,dma_mask=0xffffffffffffffff" in command("aarch64", edu=1)


def test_compilers_of_foreign_guests(tmp_path: Path) -> None:
    """The compiler of the architecture, with the options that the guest's cc accepts."""
    source, compiler = tmp_path / "program.c", tmp_path / "compiler"
    source.write_text("int main(void) { return 0; }\n")
    compiler.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$(dirname "$0")/arguments"\n')
    compiler.chmod(0o755)
    other = of_host()._replace(name="other", compiler=str(compiler))
    cross.programs(other, [source], tmp_path / "programs")
    *options, _, program, given = (tmp_path / "arguments").read_text().split()
    assert (Path(program), Path(given)) == (tmp_path / "programs/program", source)
    accepted = (Path(cross.__file__).parent / "cc").read_text()
    assert not [option for option in options if option not in accepted]


def test_a_full_run_takes_each_profile_once() -> None:
    assert profiles.FULL.keys() == ARCHITECTURES.keys()
    for architecture, full in profiles.FULL.items():
        omitted = [] if architecture == "aarch64" else ["remote"]
        assert sorted([*"+".join(full).split("+"), *omitted]) == sorted(profiles.PROFILES)
        assert not [name for name in full if "+" in name and profiles.ALONE & {*name.split("+")}]


def test_profiles_in_one_guest() -> None:
    device, nvme, both = (profiles.profile(name) for name in ("device", "nvme", "device+nvme"))
    assert both.machine == device.machine._replace(memory=max(device.machine.memory, nvme.machine.memory))
    assert both.disk == nvme.disk
    assert both.tests == f"{device.tests} {nvme.tests}"


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ("nowhere", "no such profile: nowhere"),
        ("device+ci", "no such profile: ci"),
        ("device+iommu", "a separate guest"),
    ],
)
def test_profiles_that_there_are_not(names: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--profiles", names])
    assert why in capsys.readouterr().err


def outcome(architecture: Architecture, release: str, output: str) -> Run:
    return Run(Kernel("", release, Path(), Path(), architecture), "device", Outcome(output, "", "", 12.3))


@pytest.mark.parametrize(
    ("name", "releases", "columns"),
    [
        ("x86_64", ("5.10-amd64", "6.1-amd64"), "|  | 5.10 | 6.1 |"),
        ("aarch64", ("6.1-arm64", "6.12-arm64-16k"), "|  | 6.1 | 6.12-16k |"),
    ],
)
def test_the_table(name: str, releases: tuple[str, str], columns: str, tmp_path: Path) -> None:
    """The table of each architecture is its own part of the page."""
    texts = (
        "@@CAPABILITY wired: works\n@@CAPABILITY scan: refused\n@@COUNT DMA transfers: 40\n",
        "@@CAPABILITY wired: works\n@@COUNT DMA transfers: 2\n",
    )
    runs = [outcome(ARCHITECTURES[name], *one) for one in zip(releases, texts, strict=True)]
    markers = {one: table.BEGIN.format(name=one) for one in ARCHITECTURES}
    page = tmp_path / "page.md"
    page.write_text("".join(f"above\n{marker}\nold\n{table.END}\nbelow\n" for marker in markers.values()))
    table.write(ARCHITECTURES[name], runs, page)
    text = page.read_text()
    own = text.partition(markers[name])[2].partition(table.END)[0]
    assert columns in own
    assert "| wired | works | works |\n| scan | refused |  |\n" in own
    assert "DMA transfers: 42" in own
    assert (own.count("old"), text.count("old")) == (0, 1)
    assert (text.startswith("above\n"), text.endswith("below\n")) == (True, True)


def test_a_page_without_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the lines"):
        table.write(of_host(), [], page)


# --- accesses to registers

TRACE = """\
memory_region_ops_write cpu 0 mr 0x55 addr 0xfea00004 value 0x1 size 4 name 'edu-mmio'
memory_region_ops_read cpu 1 mr 0x55 addr 0xfee000b0 value 0x0 size 4 name 'apic-msi'
memory_region_ops_read cpu 0 mr 0x55 addr 0xfea00080 value 0x1 size 8 name 'edu-mmio'
"""
MADE = [accesses.Access("write", 4, 4), accesses.Access("read", 0x80, 8)]


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (MADE, ""),
        (MADE[:1], "counted 2 accesses, and the guest made 1"),
        ([*MADE, MADE[0]], "counted 2 accesses, and the guest made 3"),
        ([MADE[0], MADE[1]._replace(width=4)], "counted a read of 64 bits at 0x80 as access 1"),
        (MADE[::-1], "counted a write of 32 bits at 0x4 as access 0"),
    ],
    ids=["equal", "repeated", "missing", "torn", "order"],
)
def test_accesses_are_compared(tmp_path: Path, made: list[accesses.Access], found: str) -> None:
    trace = tmp_path / "trace"
    trace.write_text(TRACE)
    output = "\n".join(["begin", *accesses.report("edu-mmio", 0xFEA00000, 1 << 20, made), "end"])
    assert found in accesses.compare(output, trace)
    assert bool(found) == bool(accesses.compare(output, trace))


def test_a_guest_must_report_accesses(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text(TRACE)
    assert accesses.compare("no report", trace)
