"""What is published: versions and open names, extras, the page of the package index, the workflows; and setup.py's refusals.

FASTATTN_RELEASE=v1.2.3, which the release workflow sets, adds the checks of a release.
"""
from __future__ import annotations

import importlib.util
import os
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastattn

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TAG = os.environ.get("FASTATTN_RELEASE")
OPEN = re.compile(r"\bOWNER\b")             # stands for the account on GitHub until somebody publishes


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    """setup.py as a module; it builds nothing then."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- versions and names
def open_names() -> list[str]:
    """Files with a name that a person has to fill in."""
    files = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/conf.py")]
    return [str(path.relative_to(ROOT)) for path in files if OPEN.search(path.read_text(encoding="utf-8"))]


def test_citation_has_the_version() -> None:
    found = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert found is not None and found[1] == fastattn.__version__
    assert {"version", "readme"} <= set(PROJECT["dynamic"]) and not {"version", "readme"} & set(PROJECT)


@pytest.mark.skipif(TAG is None, reason="FASTATTN_RELEASE is not set: nothing is released")
def test_a_release_is_complete() -> None:
    assert f"v{fastattn.__version__}" == TAG, "the tag and fastattn.__version__ differ"
    assert open_names() == [], "OWNER still stands for the account on GitHub"
    dated = rf"^## \[{re.escape(fastattn.__version__)}\] - \d{{4}}-\d\d-\d\d$"
    assert re.search(dated, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE), "CHANGELOG.md has no section with a date for this version"


def test_open_names_are_found_and_stop_a_release() -> None:
    """The check itself: it sees the account's name in the metadata, as long as that is open."""
    assert ("pyproject.toml" in open_names()) == ("OWNER" in PROJECT["urls"]["Source"])
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "FASTATTN_RELEASE: ${{ github.ref_name }}" in release and "pytest tests/test_packaging.py" in release
    assert "needs: check" in release


# ---------------------------------------------------------------- metadata
def test_every_dependency_of_the_gpu_is_bounded() -> None:
    """Each has an upper bound, and both extras differ in the toolkit alone."""
    extras = PROJECT["optional-dependencies"]
    for extra, toolkit in (("gpu", "cu13"), ("cuda12", "cu12")):
        assert all("<" in requirement and ">=" in requirement for requirement in extras[extra])
        assert any(requirement.startswith(f"numba-cuda[{toolkit}]") for requirement in extras[extra])

    def common(extra: str) -> list[str]:
        return [re.sub(r"\[cu1\d\]", "", requirement) for requirement in extras[extra] if not requirement.startswith("cuda-bindings")]
    assert common("gpu") == common("cuda12")


def test_python_versions_are_those_that_are_tested() -> None:
    """Classifiers, the matrix of the tests and the wheels name the same versions; no free-threaded build is promised."""
    stated = re.findall(r"Python :: (3\.\d+)\b", "\n".join(PROJECT["classifiers"]))
    matrix = re.search(r"python: \[(.+)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert matrix is not None and re.findall(r"3\.\d+", matrix[1]) == stated
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["build"]
    assert build.split() == [f"cp{version.replace('.', '')}-*" for version in stated]
    assert PROJECT["requires-python"] == f">={stated[0]}"
    assert not any("Free Threading" in classifier for classifier in PROJECT["classifiers"])


# ---------------------------------------------------------------- workflows
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_careful(path: Path) -> None:
    """It parses; it may only read; jobs end; actions of others are pinned to a commit, or to the channel that PyPA documents."""
    text = path.read_text()
    assert "permissions:\n  contents: read\n" in text
    for action, at in re.findall(r"uses: ([\w./-]+)@(\S+)", text):
        assert re.fullmatch(r"[0-9a-f]{40}", at) or (action, at) == ("pypa/gh-action-pypi-publish", "release/v1"), action
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(text)["jobs"]
    assert all("timeout-minutes" in job or "uses" in job for job in jobs.values())
    assert all(not step.get("uses", "").startswith("actions/checkout") or step["with"]["persist-credentials"] is False
               for job in jobs.values() for step in job.get("steps", []))


def test_workflows_run_files_that_exist() -> None:
    named = {name for path in WORKFLOWS for name in re.findall(r"\b(?:tests|\.ci)/[\w./]+", path.read_text())}
    assert len(named) > 3
    assert not [name for name in sorted(named) if not (ROOT / name.rstrip("/")).exists()]


# ---------------------------------------------------------------- the page of the package index
@pytest.mark.parametrize(("before", "after"), [
    ("[a](docs/a.md#b \"t\")", "[a](U/blob/R/docs/a.md#b \"t\")"), ("[a](./a.md)", "[a](U/blob/R/a.md)"),
    ("![a](docs/a.png)", "![a](U/raw/R/docs/a.png)"), ("[![a](a.png)](b.md)", "[![a](U/raw/R/a.png)](U/blob/R/b.md)"),
    ('<img width="9" src="a.svg">', '<img width="9" src="U/raw/R/a.svg">'),
    ("[a](#b) [c](https://d.e/f) ![g](https://h.i/j)", "[a](#b) [c](https://d.e/f) ![g](https://h.i/j)"),
    ("`[a](b.md)`\n```\n[a](b.md)\n```\n", "`[a](b.md)`\n```\n[a](b.md)\n```\n"), ("x[i](j)", "x[i](U/blob/R/j)")])
def test_links_become_absolute(before: str, after: str, setup_py: ModuleType) -> None:
    assert setup_py.absolute_links(before, "U", "R") == after


def test_the_page_has_no_relative_link(setup_py: ModuleType) -> None:
    page = setup_py.long_description()
    assert page.startswith("# fastattn") and PROJECT["urls"]["Source"] + f"/blob/v{fastattn.__version__}/" in page
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"src(?:set)?=\"([^\"\s]+)", text)
    assert not [target for target in targets if not re.match(r"https?:|#|mailto:", target)]


# ---------------------------------------------------------------- what setup.py refuses
class Compiler:
    """A compiler that knows some flags."""

    def __init__(self, error: type[Exception], *unknown: str, kind: str = "unix") -> None:
        self.compiler, self.compiler_type, self._error, self._unknown = ["cc"], kind, error, unknown

    def compile(self, sources: list[str], output_dir: str, extra_postargs: list[str]) -> None:
        if set(self._unknown) & set(extra_postargs):
            raise self._error("unrecognized option")


def left_after(setup_py: ModuleType, *unknown: str, **options: str) -> list[str]:
    """Names of the extensions that are built by a compiler that does not know these flags."""
    from setuptools import Distribution

    command = setup_py.build(Distribution({"ext_modules": setup_py.extensions()}))
    command.extensions = command.distribution.ext_modules
    command.compiler = Compiler(setup_py.CompileError, *unknown, **options)
    command._leave_out_refused()
    return [extension.name.rpartition(".")[2] for extension in command.extensions]


@pytest.fixture
def x86(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(setup_py.levels.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("FASTATTN_LEVELS", raising=False)
    return setup_py


def test_a_refused_level_is_left_out(x86: ModuleType) -> None:
    assert left_after(x86) == ["detect", *x86.levels.X86]
    with pytest.warns(UserWarning, match=r"x86_64_amx is left out: the compiler, cc, refuses its flags"):
        assert left_after(x86, "-mamx-tile") == ["detect", "baseline", "x86_64_v3", "x86_64_v4", "x86_64_v4_bf16"]


def test_a_refused_level_that_was_asked_for_is_an_error(x86: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_LEVELS", "baseline, x86_64_amx")
    assert left_after(x86) == ["detect", "baseline", "x86_64_amx"]
    with pytest.raises(SystemExit, match=r"The compiler, cc, refuses the flags of fastattn\.cpu\.isa\.x86_64_amx\."):
        left_after(x86, "-mamx-tile")
    monkeypatch.setenv("FASTATTN_LEVELS", "sse9")
    with pytest.raises(SystemExit, match=r"FASTATTN_LEVELS is 'sse9'; expected some of: baseline x86_64_v3"):
        x86.extensions()


@pytest.mark.parametrize(("unknown", "options", "text"), [
    (("-pthread",), {}, r"needs gcc or clang, and a 64-bit system\. The compiler, cc, refuses the flags of .*baseline"),
    ((), {"kind": "msvc"}, r"Compilers of the kind 'msvc' cannot build it; on Windows use WSL\.")])
def test_a_compiler_that_cannot_build_it(unknown: tuple[str, ...], options: dict[str, str], text: str, x86: ModuleType) -> None:
    with pytest.raises(SystemExit, match=text):
        left_after(x86, *unknown, **options)


def test_other_architectures_get_a_baseline(x86: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86.levels.platform, "machine", lambda: "ppc64le")
    detect, baseline = x86.extensions()
    assert detect.name == "fastattn.cpu.detect" and baseline.name == "fastattn.cpu.isa.baseline"
    assert not [flag for flag in baseline.extra_compile_args if flag.startswith("-m")]
