"""Sphinx configuration: `make docs`."""

from iobmd import __version__

project = "iobmd"
copyright = "the iobmd authors"  # noqa: A001 (Sphinx's name)
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "numpydoc",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
html_theme = "furo"
html_title = f"iobmd {__version__}"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False
default_role = "code"
