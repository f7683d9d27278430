"""How Sphinx builds the site: `make docs`, then docs/_build/html/index.html."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "rfmedsam2_jax"
author = "the authors of rfmedsam2_jax"
extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rfmedsam2_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
  "light_css_variables": {"color-brand-primary": "#1f7a6e", "color-brand-content": "#1f7a6e"},
  "dark_css_variables": {"color-brand-primary": "#5fc2b2", "color-brand-content": "#5fc2b2"},
}
highlight_language = "bash"
templates_path = ["_templates"]

# Pages are read on GitHub too; links between them have to be right in both places.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # Flax's own setup and the like
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def _signature(app, what, name, thing, options, signature, result):
  """Without the two fields that Flax adds to every module."""
  if signature:
    signature = re.sub(r",? ?(\*, )?parent: .*?(?=, name: ), name: [^,)]*", "", signature)
  return signature, result


def _as_it_stands(app, what, name, thing, options, lines):
  """Docstrings are written for readers of code: `names`, x_BHWC, *args, |p|, indented examples.

  Only quotation by backticks and code that is indented by four are taken as markup.
  """
  # A module's docstring is not indented: what all but its first line are indented by is code.
  text = thing.__doc__ if what == "module" and thing.__doc__ else "\n".join(lines)
  quoted = re.split(r"(`+[^`]+`+)", text.rstrip() + "\n")
  for number, part in enumerate(quoted):
    if number % 2:
      # A plural's letter may follow the backtick.
      joined = quoted[number + 1][:1].isalnum()
      quoted[number] = f"``{part.strip('`')}``" + "\\ " * joined
    else:
      quoted[number] = re.sub(r"([*|])|(?<=\w)_(?!\w)", lambda mark: "\\" + mark[0], part)
  made: list[str] = []
  for line in "".join(quoted).split("\n"):
    code = line.startswith("    ") and len(made) > 1 and not made[-1] and made[-2][:1].strip()
    made += [".. code-block:: text", "", line] if code else [line]
  lines[:] = made


def _is_a_field(app, what, name, thing, skip, options):
  """Fields of named tuples are listed by their class; for themselves they say "Alias for field"."""
  return True if str(getattr(thing, "__doc__", "")).startswith("Alias for field") else None


def setup(app):
  app.connect("autodoc-skip-member", _is_a_field)
  app.connect("autodoc-process-signature", _signature)
  app.connect("autodoc-process-docstring", _as_it_stands, priority=400)
