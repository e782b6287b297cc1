"""Sphinx settings: Markdown through MyST, docstrings through autodoc, no network."""

from __future__ import annotations

from importlib import metadata

project = "dcnlib"
author = "the dcnlib developers"
copyright = author
release = metadata.version("dcnlib")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
# The modules' pages read their docstrings without torch too.
autodoc_mock_imports = [] if __import__("importlib.util").util.find_spec("torch") else ["torch"]

highlight_language = "none"  # plain blocks are plain; examples name their language
html_theme = "furo"
html_title = f"dcnlib {release}"
exclude_patterns = ["_build"]
