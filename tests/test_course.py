"""The reading course: quoted code is what the files have, pictures are what their script draws, and every page has its parts.

A quote is a block of code after a line `From [path](link), `function`:`. Its lines stand in that function, in this order. `...` stands for
lines that are left out.
"""
from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
COURSE = ROOT / "docs" / "course"
PAGES = re.findall(r"^([\w-]+)$", (COURSE / "index.md").read_text().split("```{toctree}")[1].split("```")[0], re.MULTILINE)
QUOTE = re.compile(r"^From \[`([\w./]+)`\]\(([^)]+)\), `([\w.]+)`:\n\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Quote(NamedTuple):
    page: str
    path: str
    link: str
    function: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}-{self.function}"


def quotes_of(page: str, text: str) -> list[Quote]:
    return [Quote(page, path, link, function, body) for path, link, function, _, body in QUOTE.findall(text)]


QUOTES = [quote for page in PAGES for quote in quotes_of(page, (COURSE / f"{page}.md").read_text())]


def python_function(source: str, name: str) -> str:
    """The text of a function, by its name inside its class or function: make_forward.step."""
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        found = [child for child in ast.walk(node) if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name == part]
        assert found, f"there is no {name}"
        node = found[0]
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(source.splitlines()[first - 1:node.end_lineno])


def compiled_function(source: str, name: str) -> str:
    """The same in Cython and C: from the line that defines the name to the next definition."""
    lines = source.splitlines()
    starts = [n for n, line in enumerate(lines) if re.match(rf"(cdef|def|static|ALWAYS_INLINE)\b.*\b{name}\)?\(", line)]
    assert starts, f"there is no {name}"
    after = [n for n in range(starts[0] + 1, len(lines)) if re.match(r"(cdef|def|static|ALWAYS_INLINE)\b", lines[n])]
    return "\n".join(lines[starts[0]:after[0] if after else len(lines)])


def missing(quote: Quote) -> list[str]:
    """The runs of quoted lines that the function does not have, or not in this order. The margin may differ."""
    source = (ROOT / quote.path).read_text()
    text = (python_function if quote.path.endswith(".py") else compiled_function)(source, quote.function)
    have, at, wrong = [line.rstrip() for line in text.splitlines()], 0, []
    for run in re.split(r"^[ ]*\.\.\.\n", quote.text, flags=re.MULTILINE):
        lines = [line.rstrip() for line in textwrap.dedent(run).splitlines()]
        found = [n for n in range(at, len(have) - len(lines) + 1) if textwrap.dedent("\n".join(have[n:n + len(lines)])) == "\n".join(lines)]
        if found:
            at = found[0] + len(lines)
        else:
            wrong.append(run)
    return wrong


@pytest.mark.parametrize("quote", QUOTES, ids=[quote.id for quote in QUOTES])
def test_quoted_code_is_that_of_the_file(quote: Quote) -> None:
    assert (COURSE / quote.link).resolve() == ROOT / quote.path, "the link leads elsewhere"
    assert not missing(quote), f"{quote.path}, {quote.function} no longer has these lines:\n" + "...\n".join(missing(quote))


def test_a_stale_quote_is_found() -> None:
    quote = Quote("page", "fastattn/masks.py", "", "row_bounds", "    lo = 0 if left is None else min(max(diagonal - left, 0), seqlen_k)\n")
    assert missing(quote) == []
    assert missing(quote._replace(text="return lo, max(lo, hi)\n...\n" + quote.text))               # another order
    assert missing(quote._replace(text=quote.text.replace("max(", "min(")))
    with pytest.raises(AssertionError, match="there is no row_bound"):
        missing(quote._replace(function="row_bound"))
    with pytest.raises(AssertionError, match="there is no steps"):
        missing(quote._replace(path="fastattn/cpu/forward.pxi", function="steps"))


def test_every_block_of_python_is_a_quote_or_runs() -> None:
    """Code that is neither would rot: a block is quoted, is an example with >>>, or is a diff of the last page."""
    for page in ("index", *PAGES):
        text = (COURSE / f"{page}.md").read_text()
        blocks, quoted = re.findall(r"^```(?:python|cython|c)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL), quotes_of(page, text)
        loose = [block for block in blocks if block not in {quote.text for quote in quoted} and not block.startswith(">>> ")]
        assert not loose, f"{page}: no line `From [`path`](link), `function`:` before\n{loose[0]}"


# ---------------------------------------------------------------- the last page: a change
def changes(text: str) -> list[tuple[str, str]]:
    """(path, lines) of each block of changes; the path is the last link before it."""
    found = []
    for part in re.finditer(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        path, link = re.findall(r"\[`([\w./]+)`\]\(([^)]+)\)", text[:part.start()])[-1]
        assert (COURSE / link).resolve() == ROOT / path, "the link leads elsewhere"
        found.append((path, part.group(1)))
    return found


def changed(text: str, change: str) -> str:
    """The text with a block of changes. Lines that stay or go are found from the top, in this order; new ones follow the line before."""
    lines, at = text.splitlines(), 0
    for line in change.splitlines():
        kind, content = line[0], line[1:]
        if kind == "+":
            assert at, "a block begins with a line that is in the file"
            lines.insert(at, content)
            at += 1
            continue
        assert content in lines[at:], f"there is no line\n{content}\nafter line {at}"
        at += lines[at:].index(content)
        if kind == "-":
            del lines[at]
        else:
            assert kind == " "
            at += 1
    return "\n".join(lines) + "\n"


def test_changes_are_applied() -> None:
    text = "a\nb\nc\nb\n"
    assert changed(text, " b\n+x\n+y\n-b\n+z\n") == "a\nb\nx\ny\nc\nz\n"
    with pytest.raises(AssertionError, match="there is no line"):
        changed(text, " c\n-a\n")
    with pytest.raises(AssertionError, match="a block begins with"):
        changed(text, "+x\n")


def test_the_worked_change_works(tmp_path: Path) -> None:
    """All of change.md's changes on a copy of the tree: its case passes in the emulator; with another arithmetic it fails."""
    pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
    pytest.importorskip("cuda.core")
    for folder in ("fastattn", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.c", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    found = changes((COURSE / "change.md").read_text())
    assert len(found) == 12
    for path, change in found:
        (tmp_path / path).write_text(changed((tmp_path / path).read_text(), change))

    def run() -> str:
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_backward_plan.py", "-k", "decay")
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        return done.stdout.strip().splitlines()[-1]
    assert "1 passed" in run()
    kernel = tmp_path / "fastattn/gpu/tile/scalar.py"
    kernel.write_text(kernel.read_text().replace("s = s - REAL(a.decay)", "s = s - REAL(2) * REAL(a.decay)"))
    assert "1 failed" in run()


@pytest.mark.parametrize("page", ["index", *PAGES])
def test_examples_run(page: str) -> None:
    import doctest
    result = doctest.testfile(str(COURSE / f"{page}.md"), module_relative=False)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_its_parts(page: str) -> None:
    text = (COURSE / f"{page}.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] == "What changes" and headings[-2:] == ["Exercise", "Next"], headings
    assert "What it wins" in headings
    assert f"]({page}.svg)" in text, "its picture"
    assert len(quotes_of(page, text)) >= 1 or page == "change"
    following = PAGES[PAGES.index(page) + 1] if page != PAGES[-1] else None
    assert following is None or f"]({following}.md)" in text.split("## Next")[1]


# ---------------------------------------------------------------- pictures
PICTURES = (*PAGES, "../howto/pages", "../howto/ranks")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", COURSE / "pictures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_what_the_script_draws() -> None:
    """`python docs/course/pictures.py` draws them."""
    drawn = script().draw()
    assert set(drawn) == {f"{page}.svg" for page in PICTURES}
    for name, text in drawn.items():
        assert (COURSE / name).read_text() == text, name


@pytest.mark.parametrize("page", PICTURES)
def test_pictures_can_be_read_on_a_phone(page: str) -> None:
    """A view of 360 units, the width of a small phone. Text of at least 11 units, inside the picture, which describes itself."""
    root = ElementTree.parse(COURSE / f"{page}.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    _, _, width, height = (float(x) for x in root.attrib["viewBox"].split())
    assert width == 360
    title, description = root.find(f"{space}title"), root.find(f"{space}desc")
    assert title is not None and description is not None and title.text and len(description.text or "") > 40
    style = root.find(f"{space}style")
    assert style is not None and "prefers-color-scheme: dark" in (style.text or "")
    texts = root.findall(f".//{space}text")
    assert texts
    for text in texts:
        size, content = float(text.attrib["font-size"]), text.text or ""
        x, y, anchor = float(text.attrib["x"]), float(text.attrib["y"]), text.attrib.get("text-anchor", "start")
        wide = 0.6 * size * len(content)
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        assert size >= 11 and left >= 0 and left + wide <= width and size <= y <= height - 3, content
