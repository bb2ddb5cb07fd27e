"""Sphinx settings of the book. Nothing is requested from outside: no CDN, no MathJax, no widget manager."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = html_title = "latentlab"
extensions = ["myst_nb"]
root_doc = "index"
include_patterns = ["index.md", "notebooks/**.ipynb", "docs/*.md", "reports/**.md"]
suppress_warnings = ["myst.header", "myst.xref_missing"]  # links are tested on their own

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js: dict = {}
# Without a kernel a widget shows its text/html fallback; scripts of outputs are left out.
nb_mime_priority_overrides = [
    ("html", "application/vnd.jupyter.widget-view+json", None),
    ("html", "application/javascript", None),
]

html_theme = "sphinx_book_theme"
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "use_download_button": False,
    "logo": {"text": "latentlab"},
    "navbar_persistent": [],  # the sidebar has the search
    "footer_content_items": [],
}
html_context = {"default_mode": "auto"}  # dark or light, as the reader's system
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = html_use_index = False
html_math_renderer = "mathml"


def _formula(display: str):
    """A formula as MathML, which browsers show without a script."""

    def visit(writer, node):
        writer.body.append(f'<span class="formula {display}">{convert(node.astext(), display=display)}</span>')
        raise SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", _formula("inline"), _formula("block"))
