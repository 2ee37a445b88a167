"""Sphinx configuration: `make docs`.

Every reference must resolve (nitpicky), and every public name must be described in the API reference; otherwise the
build fails. It reads nothing from the network: inventories/python.txt resolves references to Python's documentation.
"""

import builtins
import inspect
import re
import zlib
from collections.abc import Iterator
from enum import EnumType
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import desc_annotation, desc_signature, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext import intersphinx
from sphinx.roles import XRefRole
from sphinx.util import logging

import iobmd
import iobmd.constants
import iobmd.host
import iobmd.iommu
import iobmd.pagemap
from iobmd import __version__

project = "iobmd"
copyright = "the iobmd authors"  # noqa: A001 (Sphinx's name)
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
nitpicky = True
default_role = "py:name"
html_theme = "furo"
html_title = f"iobmd {__version__}"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_prompt_text = "$ "
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False

# Objects of Python's documentation that the reference links to: NAME DOMAIN:ROLE PRIORITY LOCATION DISPLAYED, an
# excerpt of the inventory of that documentation (docs.python.org/3/objects.inv). Sphinx reads it compressed.
_HERE = Path(__file__).parent
_inventory = _HERE / "_build/python.inv"
_inventory.parent.mkdir(exist_ok=True)
_header = """# Sphinx inventory version 2
# Project: Python
# Version: 3
# The remainder of this file is compressed using zlib.
"""
_inventory.write_bytes(_header.encode() + zlib.compress((_HERE / "inventories/python.txt").read_bytes()))
intersphinx_mapping = {"python": ("https://docs.python.org/3", str(_inventory))}
nitpick_ignore = [("py:class", "psutil.Process"), ("py:class", "PD"), ("py:class", "S")]
nitpick_ignore_regex = [("py:class", r"numpy\..*")]

_CONSTANTS = [kind for kind in vars(iobmd.constants).values() if isinstance(kind, EnumType)]
# Names in signatures that are only imported for type checkers, and the objects that describe them.
_LINKS = {
    "AnyTask": "iobmd.AnyTask",
    "Attached": "iobmd.IOMapper",
    "Buffer": "collections.abc.Buffer",
    "Cache": "iobmd.Cache",
    "Direction": "iobmd.Direction",
    "MemoryRegion": "iobmd.rdma.memory_region.MemoryRegion",
    "Protection": "iobmd.Protection",
    "Secret": "iobmd.Secret",
    "SegmentFunction": "collections.abc.Callable",
    "Process": "iobmd.AnyTask",
    "PsutilProcess": "iobmd.task.identity.PsutilProcess",
    "MemoryInfo": "iobmd.task.identity.MemoryInfo",
    "array": "array.array",
    "Mapped": "iobmd.IOMemoryDescriptor",
    "Where": "iobmd.pagemap.range.Where",
    "Target": "iobmd.pagemap.Target",
    "Wired": "iobmd.Wired",
    "JSON": "json.dumps",
    "Path": "pathlib.Path",
    "Progress": "collections.abc.Callable",
    "CoreProgress": "collections.abc.Callable",
    "NonVolatile": "contextlib.AbstractContextManager",
    "K": "collections.abc.Hashable",
    "socket": "socket.socket",
}
# Methods without an underscore that only other modules of iobmd call.
_INTERNAL = {
    "iobmd.Snapshot.copy_in",
    "iobmd.Task.copy_in",
    "iobmd.pagemap.Frames.census",
    "iobmd.pagemap.Snapshot.batches",
}
# Classes whose objects are returned by functions and factories: their constructors are not public.
_MADE_BY_FUNCTIONS = {
    "iobmd.CacheItem",
    "iobmd.Handle",
    "iobmd.IOBigMemoryCursor",
    "iobmd.IOBufferMemoryDescriptor",
    "iobmd.IODMACommand",
    "iobmd.IOGuardPageMemoryDescriptor",
    "iobmd.IOInterleavedMemoryDescriptor",
    "iobmd.IOLittleMemoryCursor",
    "iobmd.IOMemoryCursor",
    "iobmd.IOMemoryDescriptor",
    "iobmd.IOMemoryMap",
    "iobmd.IONaturalMemoryCursor",
    "iobmd.IOMultiMemoryDescriptor",
    "iobmd.IOSubMemoryDescriptor",
    "iobmd.iommu.IOVMRange",
}


class _Name(XRefRole):
    """Text in single backquotes: a link if it is a name of the reference, otherwise code."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        if re.fullmatch(r"[A-Za-z_][\w.]*", self.text):
            return super().run()
        return [nodes.literal(self.rawtext, self.text)], []

    def process_link(
        self, env: BuildEnvironment, refnode: nodes.Element, has_explicit_title: bool, title: str, target: str
    ) -> tuple[str, str]:
        refnode["reftype"] = "obj"
        refnode["py:module"] = env.ref_context.get("py:module")
        refnode["py:class"] = env.ref_context.get("py:class")
        return super().process_link(env, refnode, has_explicit_title, title, target)


def _hide_constructor(
    _app: Sphinx, _what: str, name: str, _object: Any, _options: Any, _signature: str, returned: str
) -> tuple[str, str] | None:
    return ("", returned) if name in _MADE_BY_FUNCTIONS else None


def _link(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Resolve what Sphinx cannot: names without a module, and names that are only imported for type checkers."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    kinds = [f"iobmd.{kind.__name__}.{target}" for kind in _CONSTANTS if target.startswith("kIO")]
    for name in (_LINKS.get(target.rpartition(".")[2], target), f"iobmd.{target}", *kinds):
        if name in env.domains["py"].objects:
            return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)
    if target in _LINKS or target.rpartition(".")[2] in _LINKS:
        node["reftarget"], node["reftype"] = _LINKS[target.rpartition(".")[2]], "obj"
        return intersphinx.missing_reference(app, env, node, content)
    if target.startswith("builtins."):
        node["reftarget"] = target.removeprefix("builtins.")
        return intersphinx.missing_reference(app, env, node, content)
    return content if node["reftype"] == "obj" else None


def _public_names() -> Iterator[str]:
    """Yield the names that the reference must describe: those that modules list, and public members of classes."""
    constants = {member for kind in _CONSTANTS for member in kind.__members__}
    for module in (iobmd, iobmd.dmabuf, iobmd.host, iobmd.iommu, iobmd.pagemap, iobmd.rdma):
        for name in sorted({*module.__all__} - constants - {"__version__"}):
            value = getattr(module, name)
            if inspect.ismodule(value):
                continue
            yield f"{module.__name__}.{name}"
            if module is not iobmd and name in iobmd.__all__:  # members are described under that name
                continue
            for member, found in vars(value).items() if inspect.isclass(value) else ():
                if not member.startswith("_") and (callable(found) or isinstance(found, property | classmethod)):
                    yield f"{module.__name__}.{name}.{member}"


def _check_fields(_app: Sphinx, what: str, name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Warn of attributes that have no description, or only the one that Python generates."""
    generated = not any(lines) or lines[0].startswith("Alias for field number")
    if what in ("attribute", "property", "method") and generated:
        logging.getLogger(__name__).warning("public name without a description: %s", name)


def _find_builtins(_app: Sphinx, doctree: nodes.document) -> None:
    """Look types such as bytes up among Python's, not among attributes of this name."""
    for reference in doctree.findall(pending_xref):
        if reference.get("reftype") == "class" and hasattr(builtins, reference["reftarget"]):
            reference["reftarget"] = f"builtins.{reference['reftarget']}"


def _as_in_headers(_app: Sphinx, doctree: nodes.document) -> None:
    """Print the values of constants as IOKit's headers do, and omit those that only name a class."""
    for signature in doctree.findall(desc_signature):
        for part in list(signature.findall(desc_annotation)):
            text = part.astext()
            if text.startswith(" = <"):
                part.parent.remove(part)
            elif re.search(r"\bk[A-Z]", signature.astext()) and text.startswith(" = ") and text[3:].isdecimal():
                part.children[-1:] = [nodes.Text(f"{int(text[3:]):#x}")]


def _check_public_names(_app: Sphinx, env: BuildEnvironment) -> None:
    described = env.domains["py"].objects
    for name in _public_names():
        if name not in described and name not in _INTERNAL:
            logging.getLogger(__name__).warning("public name without a description: %s", name)


def setup(app: Sphinx) -> None:
    """Connect the handlers above."""
    app.add_role_to_domain("py", "name", _Name())
    app.connect("autodoc-process-signature", _hide_constructor)
    app.connect("autodoc-process-docstring", _check_fields)
    app.connect("doctree-read", _find_builtins)
    app.connect("doctree-read", _as_in_headers)
    app.connect("missing-reference", _link, priority=400)  # before intersphinx
    app.connect("env-check-consistency", _check_public_names)
