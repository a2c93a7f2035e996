"""Sphinx configuration of the documentation: `make site`."""

import re
from typing import Any

project = "sparsifiner-edge"
author = "the developers of sparsifiner-edge"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_llms_txt"]
html_theme = "furo"
html_title = project
myst_heading_anchors = 3
napoleon_use_ivar = True  # Describe the attributes of a class only once.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
llms_txt_summary = (
    "Sparse attention and token merging for pretrained vision transformers, exported, measured and run at the edge."
)
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)]*)\)")
"""Links to files of the repository that are not part of the site; the site shows their paths."""
TOGETHER = re.compile(r"^(\s*)(\w+(?:, \w+)+): ")
"""Names that a docstring describes together. With blanks between them, Sphinx takes all but the last for a type."""


def _as_paths(_app: Any, _page: str, source: list[str]) -> None:
    source[0] = OUTSIDE.sub(
        lambda link: f"{link[1]} (`{link[2]}`)" if link[1] not in link[2] else f"`{link[2]}`", source[0]
    )


def _together(_app: Any, _what: str, _name: str, _thing: Any, _options: Any, lines: list[str]) -> None:
    lines[:] = [TOGETHER.sub(lambda line: f"{line[1]}{line[2].replace(', ', ',')}: ", line) for line in lines]


def setup(app: Any) -> None:
    """Register the hooks; Sphinx calls this."""
    app.connect("autodoc-process-docstring", _together, priority=100)
    app.connect("source-read", _as_paths)
