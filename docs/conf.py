"""The documentation site: Sphinx, MyST Markdown, numpydoc, and the examples as a gallery.

    pip install ".[docs]"
    sphinx-build -W --keep-going docs docs/_build/html          # warnings are errors: links inside the site, docstrings, examples
    sphinx-build -b linkcheck docs docs/_build/linkcheck        # links to the outside

Pages are Markdown. Their links are relative, so that they work where the files are read in the repository, too; a link to
a file that is no page leads to the repository.
"""
from __future__ import annotations

import importlib.util
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import fastattn

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))
import gallery  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
URLS = PROJECT.get("urls", {})
REPOSITORY = next((URLS[name].rstrip("/") for name in ("Source", "Repository", "Homepage") if name in URLS), "")

project = "fastattn"
author = "The fastattn authors"
copyright = "the fastattn authors"
release = version = fastattn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["_build", "examples/*.ipynb", "examples/*.py"]
default_role = "py:obj"                             # `attention` in a docstring: a link where it is known, else code
# Pages of docstrings that a framework is needed for. CI has both frameworks; without one its page is left out.
MISSING = [framework for framework in ("torch", "jax") if importlib.util.find_spec(framework) is None]
exclude_patterns += [f"api/{framework}.md" for framework in MISSING]
suppress_warnings = ["toc.excluded", "toc.not_readable"] if MISSING else []      # which of the two depends on the version of Sphinx

# ---------------------------------------------------------------- Markdown
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

# ---------------------------------------------------------------- docstrings
autodoc_typehints = "none"                          # numpydoc's Parameters have the types, with shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
add_module_names = False

# ---------------------------------------------------------------- examples
os.environ["TQDM_DISABLE"] = "1"                    # no progress bars in their output
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "examples",
    "filename_pattern": rf"[\\/]({'|'.join(gallery.RUN)})\.py$",
    "ignore_pattern": rf"^(?!({'|'.join(gallery.NEEDS)})\.py$)",
    "reset_argv": "gallery.arguments",
    "copyfile_regex": r"^$",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "plot_gallery": "True",
    "abort_on_example_error": True,
    "show_signature": False,
    "remove_config_comments": True,
}

# ---------------------------------------------------------------- the look
html_theme = "pydata_sphinx_theme"
html_title = "fastattn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars: dict[str, list[str]] = {page: [] for page in ("index", "install", "quickstart", "benchmarks", "support", "changelog")}
html_theme_options: dict[str, Any] = {
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
if REPOSITORY:
    html_theme_options["icon_links"] = [{"name": "Source", "url": REPOSITORY, "icon": "fa-brands fa-github"}]

EXAMPLES = ROOT / "examples"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>\.\./[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def lead_outside(page: str, text: str) -> str:
    """A page's links to files that are no pages of the site lead to the repository, or are words where it has no address.

    Links to examples of the gallery lead to their pages.
    """
    def replace(link: re.Match[str]) -> str:
        target = ((DOCS / page).parent / link["path"]).resolve()
        if target.is_relative_to(DOCS) or not target.is_relative_to(ROOT):
            return link[0]
        if not target.exists():
            logging.getLogger(__name__).warning("%s: %s does not exist", page, link["path"])
        if target == EXAMPLES or (target.parent == EXAMPLES and target.stem in gallery.NEEDS):
            shown = Path("examples", f"{'index' if target == EXAMPLES else target.stem}.rst")
            return f"[{link['text']}]({'../' * page.count('/')}{shown.as_posix()})"
        kind = "tree" if target.is_dir() else "blob"
        address = f"{REPOSITORY}/{kind}/main/{target.relative_to(ROOT).as_posix()}{link['anchor'] or ''}"
        return f"[{link['text']}]({address})" if REPOSITORY else link["text"]

    return LINK.sub(replace, text)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    if app.env.doc2path(docname).suffix == ".md":
        source[0] = lead_outside(f"{docname}.md", source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", _read)
