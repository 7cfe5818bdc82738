"""Sphinx's settings of the book. `make book` gathers the sources first (sllm_mini.lab.book.build); this file is one of them."""

from sllm_mini import __version__

project, author, copyright = "sllm_mini", "the sllm_mini authors", "the sllm_mini authors"
version = release = __version__
suppress_warnings = ["ref.python"]  # annotations name types without their package, and two packages have an Event
extensions = ["myst_nb", "sphinx_copybutton", "sllm_mini.lab.book.extension"]
html_math_renderer = "mathml"

nb_execution_mode = "off"  # chapters are shown with the outputs that they were recorded with
nb_ipywidgets_js = {}  # no page fetches anything; each control has a figure beside it that says the same
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
myst_heading_slug_func = "sllm_mini.lab.book.extension.heading_anchor"

html_theme = "furo"
html_title = "sllm_mini"
html_static_path = ["static"]
html_favicon = "static/ladder.svg"
html_css_files = ["book.css"]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
