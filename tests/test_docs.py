"""The documentation: links of Markdown pages lead somewhere, Python blocks run, every page and example is on the site."""
from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "fastattn", "tests", "bench", "examples")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).glob("**/*.md"))])
CODE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1`*[ ]*$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
OUTSIDE = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)     # https:, mailto:


def links(text: str) -> list[str]:
    """Targets of inline links; those inside code do not count."""
    return LINK.findall(CODE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives headings: lower case, punctuation dropped,
    spaces as hyphens, -1, -2, ... where a heading repeats."""
    found: set[str] = set()
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#* *$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return found


def broken(page: Path) -> list[str]:
    """Relative links of a page whose target does not exist."""
    wrong = []
    for link in links(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if OUTSIDE.match(link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8"))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    """The check itself: missing files and headings are found; addresses, code and what exists are not."""
    (tmp_path / "other.md").write_text("# A heading, with `code`\n## Twice\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text("# Here\n[a](other.md) [b](other.md#a-heading-with-code) [c](#here) [d](https://example.com/x) `[e](gone.md)`\n"
                    "```\n[f](gone.md)\n```\n[g](other.md#twice-1) [h](gone.md) [i](other.md#gone) [j](#gone \"title\")\n")
    assert broken(page) == ["gone.md", "other.md#gone", "#gone"]


# ---------------------------------------------------------------- code blocks
LIBRARIES = ("torch", "jax", "cupy")
FURTHER = ("transformers",)              # of a block that imports one of LIBRARIES, too; without it the block is left out
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(rf"^\s*(?:import|from) (?:fastattn\.)?({'|'.join(LIBRARIES + FURTHER)})\b", re.MULTILINE)
# Pages whose blocks run. The course quotes the package's code, which its own test compares.
CALLERS = [ROOT / "README.md", *(page for page in PAGES if ROOT / "docs" in page.parents and page.parent.name != "course")]


def blocks(text: str, library: str) -> list[str]:
    """The Python blocks of a page that need no library, or this one."""
    there = {library, *filter(importlib.util.find_spec, FURTHER)}
    return [block for block in BLOCK.findall(text) if set(IMPORT.findall(block)) <= there]


def cases() -> list[Any]:
    """Every page with code, alone and with each library that a block of it imports."""
    found = []
    for page in CALLERS:
        code = BLOCK.findall(page.read_text(encoding="utf-8"))
        for library in ("", *(name for name in LIBRARIES if any(name in IMPORT.findall(block) for block in code))):
            if code:
                marks = [pytest.mark.gpu] if library == "cupy" else []
                found.append(pytest.param(page, library, id=f"{page.relative_to(ROOT)}-{library or 'numpy'}", marks=marks))
    return found


@pytest.mark.parametrize(("page", "library"), cases())
def test_code_blocks_run(page: Path, library: str) -> None:
    """The blocks of a page run from top to bottom in one namespace, as a reader would paste them."""
    if library:
        pytest.importorskip(library)
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__docs__"}
    found = blocks(text, library)
    if library in ("torch", "jax") and f"fastattn.{library}" in "".join(found):
        pytest.importorskip(f"fastattn.{library}", reason=f"fastattn.{library} is not in this tree")
    for block in found:
        exec(compile("\n" * text[:text.index(block)].count("\n") + block, str(page), "exec"), names)


def test_blocks_are_found_and_told_apart() -> None:
    text = "```python\nimport numpy\n```\n```python\nfrom fastattn.torch import x\n```\n```\nno Python\n```\n"
    assert blocks(text, "") == blocks(text, "jax") == ["import numpy\n"]
    assert blocks(text, "torch") == ["import numpy\n", "from fastattn.torch import x\n"]
    assert len(cases()) > 15 and any(case.id == "README.md-numpy" for case in cases())


# ---------------------------------------------------------------- the site
def test_every_page_is_in_a_toctree() -> None:
    """Sphinx says it too, but only where it is installed."""
    docs = ROOT / "docs"
    pages = {page for page in PAGES if docs in page.parents and docs / "_build" not in page.parents}
    named = {docs / "index.md"}
    for page in pages:
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for entry in (line.strip() for line in tree.splitlines() if line.strip() and not line.startswith(":")):
                name = entry.rpartition("<")[2].rstrip(">")
                named.add((docs if name.startswith("/") else page.parent).joinpath(f"{name.lstrip('/')}.md").resolve())
    assert pages <= named, f"in no toctree: {sorted(str(page.relative_to(ROOT)) for page in pages - named)}"


def test_every_example_is_shown() -> None:
    """In the README's table; those without a framework in the gallery and on its first page, too."""
    gallery: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "gallery.py"))
    readme, first = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "examples/GALLERY_HEADER.rst"))
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert len(examples) >= 6
    for example in examples:
        assert f"(examples/{example.name})" in readme, example.name
        if not re.search(r"^(?:import|from) (?:torch|jax)\b", example.read_text(encoding="utf-8"), re.MULTILINE):
            assert example.stem in gallery["NEEDS"] and f"/examples/{example.stem}`" in first, example.name
    assert all((ROOT / "examples" / f"{name}.py").is_file() for name in gallery["NEEDS"])


def test_links_to_files_outside_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sphinx", "myst_parser", "numpydoc", "sphinx_gallery", "pydata_sphinx_theme"):
        pytest.importorskip(module)
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    monkeypatch.setenv("TQDM_DISABLE", "1")                  # conf.py sets it, too
    text = "[a](../../bench/results) [b](../../docs/../setup.py#a) [c](../parity.md) [d](../../examples/see_the_masks.py) ![e](../../x.png)"
    lead = conf["lead_outside"]
    monkeypatch.setitem(lead.__globals__, "REPOSITORY", "https://example.com/r")
    assert lead("howto/masks.md", text) == (
        "[a](https://example.com/r/tree/main/bench/results) [b](https://example.com/r/blob/main/setup.py#a) [c](../parity.md) "
        "[d](../examples/see_the_masks.rst) ![e](../../x.png)")
    monkeypatch.setitem(lead.__globals__, "REPOSITORY", "")
    assert lead("howto/masks.md", text).startswith("a b [c]")
