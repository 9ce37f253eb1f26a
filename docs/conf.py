"""Sphinx settings; build with `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

from importlib.metadata import version as installed_version

project = "carv_attrib"
author = "The carv_attrib developers"
copyright = "The carv_attrib developers, Apache-2.0"
version = release = installed_version("carv-attrib")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nitpicky = False

html_theme = "furo"
html_title = f"carv_attrib {version}"
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes are strings of jaxtyping; docstrings say them in words
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"  # docstrings put names in single backticks
