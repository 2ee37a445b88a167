"""Modules of iommufd and VFIO's character devices, which Debian's kernels lack: compiled from Debian's source.

CONFIG_IOMMUFD is off in all Debian's kernels from 6.1 to 7.3. The kernel itself needs no change for it: the modules
iommufd and vfio are compiled with the option, against the headers of a released kernel, and replace those of VFIO.
"""

import os
import platform
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

from .debian import Archive

_PARTS = ("drivers/iommu/iommufd", "drivers/iommu/iommu-priv.h", "drivers/vfio", "lib/interval_tree.c")
_OFF = ("VFIO_MDEV", "VFIO_PLATFORM", "VFIO_PLATFORM_BASE", "VFIO_CDX", "VFIO_FSL_MC", "DEBUG_INFO_BTF_MODULES")
_SYMBOLS = ("IOMMUFD_MODULE", "VFIO_DEVICE_CDEV", "INTERVAL_TREE_SPAN_ITER")
# The kernel contains the file of the iterators that iommufd needs, compiled without them. The other functions of this
# file are thus in the kernel too, and have different names in the module.
_SPANS = """\
#include <linux/export.h>
#undef EXPORT_SYMBOL_GPL
#define EXPORT_SYMBOL_GPL(name)
#define interval_tree_insert iommufd_interval_tree_insert
#define interval_tree_remove iommufd_interval_tree_remove
#define interval_tree_iter_first iommufd_interval_tree_iter_first
#define interval_tree_iter_next iommufd_interval_tree_iter_next
#include "interval_tree.c"
"""


def suitable(releases: list[str]) -> list[str]:
    """Return the releases that this host's compiler can extend: those that its Debian's compiler has compiled."""
    suffix = f"+deb{platform.freedesktop_os_release().get('VERSION_ID', '')}"
    return [release for release in releases if release.endswith(suffix)] or releases


def replace_vfio(packages: Archive, release: str, flavor: str, tree: Path, place: Path) -> None:
    """Replace the modules of VFIO in `tree`, which is lib/modules/RELEASE, using the directory `place`.

    Raises `subprocess.CalledProcessError` if the modules cannot be compiled.
    """
    headers = f"linux-headers-{release}-{flavor}"
    shown = packages.apt("apt-cache", "show", "--no-all-versions", headers)
    version = re.search(r"^Version: (.+)$", shown, re.MULTILINE)
    series = ".".join(release.split(".")[:2])
    source = f"linux-source-{series}={version[1]}" if version else f"linux-source-{series}"
    names = (headers, f"linux-headers-{release}-common", f"linux-kbuild-{release}", source)
    place.mkdir()
    packages.unpack(names, place)
    code = place / "code"
    _sources(place / f"usr/src/linux-source-{series}.tar.xz", code)
    _compile(place / "usr/src" / headers, code)
    for built in code.glob("**/*.ko"):
        for old in tree.glob(f"kernel/**/{built.name}*"):
            old.unlink()
        shutil.copy(built, tree / "kernel" / built.name)


def _sources(archive: Path, code: Path) -> None:
    with tarfile.open(archive) as packed:
        wanted = [member for member in packed if member.name.partition("/")[2].startswith(_PARTS)]
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4
            packed.extraction_filter = tarfile.data_filter
        packed.extractall(archive.parent, wanted)
    tree = archive.parent / archive.name.removesuffix(".tar.xz")
    code.mkdir()
    for part in _PARTS[:-1]:
        shutil.move(tree / part, code)
    shutil.move(tree / _PARTS[-1], code / "iommufd")
    (code / "iommufd/spans.c").write_text(_SPANS)
    with (code / "iommufd/Makefile").open("a") as makefile:
        makefile.write("iommufd-y += spans.o\n")
    (code / "Kbuild").write_text("obj-m += iommufd/ vfio/\n")


def _compile(headers: Path, code: Path) -> None:
    makefile = headers / "Makefile"  # it contains the path where the package would be installed
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{headers.parent}/"))
    options = ["CONFIG_IOMMUFD=m", "CONFIG_VFIO_DEVICE_CDEV=y", *(f"CONFIG_{name}=" for name in _OFF)]
    flags = " ".join(f"-DCONFIG_{name}=1" for name in _SYMBOLS)
    command = ["make", "-s", f"-j{os.cpu_count()}", "-C", str(headers), f"M={code}", *options, f"KCFLAGS={flags}"]
    # Make's own variables would apply to this build too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    subprocess.run([*command, "modules"], check=True, env=environment, stdout=subprocess.DEVNULL)
