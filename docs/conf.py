"""The site's settings: `make docs` builds it with Sphinx from the Markdown beside this file, every warning an error."""

from llmshrink import __version__

project = "llmshrink"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = f"llmshrink {release}"
html_show_copyright = False
html_copy_source = False

# `#heading` in a link means what it means on a code host; one that leads nowhere is a warning.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# The verbs' docstrings say types in words, and signatures are read as they stand.
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
