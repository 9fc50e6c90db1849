"""Sphinx: the pages of this folder, and the API reference from the docstrings (`make docs`)."""

import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from gluon_syncbn.version import __version__  # noqa: E402

project = "gluon_syncbn"
author = "The gluon_syncbn authors"
copyright = author  # noqa: A001: Sphinx's name
version = release = __version__

# Pages of the repository that are pages here.
PAGES = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc", "myst_parser"]
exclude_patterns = ["_build", "requirements.txt"]
html_theme = "furo"
html_title = f"{project} {release}"

# Types are in the docstrings, as NumPy's style has it.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False

# Links to headings have the names that they have in a repository's web view.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

nitpicky = True
# MXNet 1.9.1's own documentation has no inventory to link to.
nitpick_ignore_regex = [(r"py:.*", r"mxnet\..*")]


def _link_to_package(app, env, node, contnode):
    """Resolve a public name without its module, as docstrings use it, whichever module has it."""
    name = node.get("reftarget", "")
    if node.get("refdomain") != "py" or name.startswith("gluon_syncbn."):
        return None
    full = f"gluon_syncbn.{name}"
    python, builder, document = env.get_domain("py"), app.builder, node["refdoc"]
    return python.resolve_xref(env, document, builder, node["reftype"], full, node, contnode)


def _take_over(app, docname, source):
    """Put the repository's own pages in place of these, and let links lead to them."""
    here = posixpath.dirname(f"docs/{docname}")
    folder = here
    for path, page in PAGES.items():
        if page == docname:
            source[0] = (ROOT / path).read_text(encoding="utf-8") + source[0]
            folder = ""

    def relative(match):
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / path).exists():  # code, or a broken link, which is left for MyST to report
            return match[0]
        path = f"docs/{PAGES[path]}.md" if path in PAGES else path
        return f"]({posixpath.relpath(path, here)}{match[2] or ''})"

    source[0] = re.sub(r"\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)", relative, source[0])


def setup(app):
    app.connect("missing-reference", _link_to_package)
    app.connect("source-read", _take_over)
