"""Fixtures of the GPU tests."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tools.devices import device_count

# Imports of the GPU engine stand inside: a module skips itself where its packages are not installed.


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> None:
    """The kernels of all selected tests, compiled before the first test that needs one, in as many processes as there are processors."""
    if device_count():
        from tests.tools.gpu.cases import compile_kernels

        compile_kernels(request.session.items)


@pytest.fixture
def fresh_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel cache as in a new process: no warning or write has happened yet. Others cannot write the files that tests create."""
    from fastattn.gpu.runtime import cache

    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(cache, "_writes", 0)
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the kernel cache, which does not exist yet."""
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys of kernels that were compiled because the cache did not have them."""
    from fastattn.gpu.runtime import compile as compiler

    seen, build = list[str](), compiler.build

    def counted(source: Any, arch: str, output: str = "cubin", overlapped: Any = ()) -> Any:
        seen.append(source.key)
        return build(source, arch, output, overlapped)
    monkeypatch.setattr(compiler, "build", counted)
    yield seen


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake stat, see `Owners`."""
    from tests.tools.gpu.cache import Owners

    return Owners(monkeypatch)
