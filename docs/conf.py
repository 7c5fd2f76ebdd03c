"""How the documentation is built; `make docs`."""

import sys
from pathlib import Path

import hookcore

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import house  # noqa: E402 - it lies beside this file

house.draw(DOCS / "images" / "house.svg")

project = "hookcore"
author = "The hookcore developers"
copyright = "The hookcore developers"
version = release = hookcore.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hookcore {release}"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "code"  # a word in single backticks in a docstring

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
