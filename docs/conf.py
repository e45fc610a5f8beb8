"""How Sphinx shows the notebooks and the README. build.py calls it."""

import json
import re
import tomllib
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "LoRA Lab"
author = PYPROJECT["authors"][0]["name"]
copyright = author
language = "en"

extensions = ["myst_nb"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
html_math_renderer = "mathml"

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_use_index = False
html_sourcelink_suffix = ""  # the theme's download is the notebook itself, under its own name
html_context = {"default_mode": "auto"}  # dark where the reader's system is
html_theme_options = {
    "repository_url": PYPROJECT["urls"]["Repository"],
    "repository_branch": "main",
    "path_to_docs": "",
    "use_repository_button": True,
    "use_download_button": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the menu has a search field already
}

BADGE = re.compile(r"^\[!\[Open in Colab\]\(\S+\)\]\((\S+)\)$", flags=re.M)
SLIDERS = "Here are sliders when the notebook runs, in JupyterLab or on Colab."


def show_notebook(app: Sphinx, docname: str, source: list[str]) -> None:
    """Change what a page shows of a notebook: the badge in words, solutions folded, a word where a slider would be."""
    if not docname.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    file = f"{Path(docname).name}.ipynb"
    links = rf'[Open in Colab](\1) · <a href="../_sources/{docname}.ipynb" download="{file}">Download the notebook</a>'
    first = notebook["cells"][0]
    first["source"] = BADGE.sub(links, "".join(first["source"]))
    for cell in notebook["cells"]:
        if "solution" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].append("hide-cell")
            prompts = {"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"}
            cell["metadata"]["mystnb"] = prompts
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            widget = data.pop("application/vnd.jupyter.widget-view+json", None)
            if widget and "".join(data["text/plain"]).startswith("VBox("):
                data["text/plain"] = SLIDERS
    source[0] = json.dumps(notebook)


def describe_outputs(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Let a printed sentence break into lines, and be the text of the figure before it for who does not see it."""
    for block in doctree.findall(nodes.literal_block):
        if "stream" in block["classes"] and "\n" not in block.astext().strip():
            block["classes"].append("sentence")
    for image in doctree.findall(nodes.image):
        printed = image.next_node(nodes.literal_block, descend=False, siblings=True)
        if printed is not None:
            image["alt"] = " ".join(printed.astext().split())


def mathml(node: nodes.math | nodes.math_block, display: str) -> str:
    """Return a formula as MathML, which a browser typesets by itself; warn of what would come out as its source."""
    source = node.astext()
    braces = re.findall(r"(?<!\\)[{}]", source)
    try:
        formula = convert(source, display=display)
    except Exception as error:  # latex2mathml's errors have no class in common
        LOGGER.warning("formula %r: %s", source, type(error).__name__, location=node)
        return ""
    if braces.count("{") != braces.count("}") or re.search(r"\\|<mi>[&{}]</mi>", formula):
        LOGGER.warning("formula %r: a brace without its other, or LaTeX that cannot be shown", source, location=node)
    return formula


def visit_math(self: nodes.NodeVisitor, node: nodes.math) -> None:
    """Write a formula within a line."""
    self.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def visit_math_block(self: nodes.NodeVisitor, node: nodes.math_block) -> None:
    """Write a formula in a line of its own, in a box that scrolls where the screen is narrow."""
    self.body.append(f'<div class="math" tabindex="0">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connect the functions above to Sphinx."""
    app.connect("source-read", show_notebook)
    app.connect("doctree-resolved", describe_outputs)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
