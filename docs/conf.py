"""Settings of Sphinx for the documentation: `make docs`, into docs/_build/html."""

import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from config_reference import write_reference  # beside this file

from rs_consistency.common.version import package_version

project = "rs-consistency"
author = "The rs-consistency authors"
version = release = package_version("rs-consistency")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rs-consistency"

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False}

write_reference(Path(__file__).parents[1] / "configs" / "default.py", Path(__file__).parent / "config.md")


def tables_of_markdown(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the Markdown tables of a docstring into tables of reStructuredText."""
    del app, what, name, obj, options
    done: list[str] = []
    for is_table, group in itertools.groupby(lines, key=lambda line: line.startswith("|")):
        if not is_table:
            done += group
            continue
        done += ["", ".. list-table::", "   :header-rows: 1", ""]
        for row in group:
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            if any(cell.strip("-:") for cell in cells):
                done += [f"   {'* ' if not number else '  '}- {cell}" for number, cell in enumerate(cells)]
        done.append("")
    lines[:] = done


def setup(app: Any) -> None:
    """Connect the functions above to Sphinx, which calls this."""
    app.connect("autodoc-process-docstring", tables_of_markdown, priority=900)
