"""The site of these pages: `python -m sphinx -W docs site`, with the extra `docs` installed and without a network.

Pages are Markdown that reads on GitHub as well; what only a site has is in `index.rst` and `reference.rst`.
"""

import dataclasses
import re

import diffusers_ext


project = "diffusers_ext"
author = "the diffusers_ext authors"
copyright = author
release = version = diffusers_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"diffusers_ext {release}"
html_copy_source = False

myst_heading_anchors = 3
highlight_language = "none"  # of indented blocks, which are commands of others and drawings

default_role = "code"  # single backticks of docstrings
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

# What docstrings have in plain text, outside of code, and reStructuredText reads as markup.
CODE = re.compile(r"(``.+?``|`[^`]+`)")
MARKUP = re.compile(r"([*|\\])|(?<=\w)(_)(?!\w)")


def link_to_sources(app, docname, source):
    """Links out of `docs/`, such as to model cards, lead to copies of the files."""
    out = re.escape("../" * (docname.count("/") + 1))
    source[0] = re.sub(rf"(?<!!)(\[[^\]]*\]\()({out})", r"\1path:\2", source[0])


def plain_text(app, what, name, obj, options, lines):
    """Docstrings are plain text with code in backticks, `Args:` and the like, and examples."""
    joined = []
    for line in lines:
        if line.lstrip().startswith((">>>", "...")):
            joined.append(line)
            continue
        parts = CODE.split(line)
        parts[::2] = [MARKUP.sub(r"\\\1\2", part) for part in parts[::2]]
        joined.append("".join(parts))
    lines[:] = joined


def short_signature(app, what, name, obj, options, signature, return_annotation):
    """Configs have more options than can be read in a line; `--help-all` lists them."""
    return ("(**options)", "") if what == "class" and dataclasses.is_dataclass(obj) else None


def setup(app):
    app.connect("source-read", link_to_sources)
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", short_signature)
    return {"parallel_read_safe": True}
