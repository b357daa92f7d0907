"""Configure Sphinx: `make docs` builds offline, and warnings are errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "extensions"))

import qprune  # noqa: E402

project = "qprune"
release = version = qprune.__version__
copyright = "the authors of qprune"  # noqa: A001  (Sphinx names it so)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "config_keys", "pictures"]
exclude_patterns = ["extensions"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

smartquotes = False  # quotation marks stay as typed
default_role = "code"  # `name` in docstrings
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"qprune {release}"
html_static_path = ["assets"]
html_css_files = ["qprune.css"]
html_copy_source = False
html_show_copyright = False

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
nitpicky = True
# Types of other projects, whose documentation would have to be fetched
nitpick_ignore_regex = [(r"py:.*", r"(torch|nn|collections|omegaconf|pathlib|typing|abc|optional|numpy|fractions)\b.*")]
nitpick_ignore_regex += [(r"py:.*", r"(Tensor|Any|Path|Iterator|Iterable|Sequence|DictConfig|LayerT|int|float|str)")]
nitpick_ignore_regex += [(r"py:.*", r"(qprune\.)?[\w.]*(Placed|Operator|Window|Entry|Uncovered|Batches|ABC)")]
nitpick_ignore_regex += [(r"py:.*", r"(qprune\.)?[\w.]*(Difference|OnnxNetwork)")]


def resolve_public_name(app: Sphinx, env: BuildEnvironment, node: Any, content: Any) -> Any:
    """Resolve a reference to a class in its module to its documentation among the public names."""
    name = node.get("reftarget", "").rpartition(".")[2]
    if node.get("refdomain") == "py" and name in qprune.__all__:
        domain = env.domains["py"]
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", f"qprune.{name}", node, content)
    return None


def escape_magnitudes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep |x| in docstrings from being a reference, outside `code`."""
    for number, line in enumerate(lines):
        pieces = line.split("`")
        pieces[::2] = [piece.replace("|", r"\|") for piece in pieces[::2]]
        lines[number] = "`".join(pieces)


def setup(app: Sphinx) -> None:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", escape_magnitudes)
    app.connect("missing-reference", resolve_public_name)
