"""`import fastattn` is quick and loads nothing heavy; the version is stated once; the wheel has what it should have."""
from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import zlib
from importlib import metadata
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parents[1]
HEAVY = {"numba", "llvmlite", "cuda", "cupy", "torch", "jax", "scipy", "Cython", "ml_dtypes", "multiprocessing", "fastattn.cpu",
         "fastattn.gpu"}


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def processor_seconds(module: str, compiled: Path) -> float:
    """Of a process that imports the module and ends. `compiled` has its bytecode, as an installed package does."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    code = f"import {module}, time; print(time.process_time())"
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
                                env=environment | {"PYTHONPYCACHEPREFIX": str(compiled)}).stdout)


def test_import_is_quick(tmp_path: Path) -> None:
    """A process with `import fastattn` takes at most 1.3 times as long as one with `import numpy`: the median of ten pairs, of more where a
    busy machine slows down some of them."""
    processor_seconds("fastattn", tmp_path)         # compiles both
    ratios: list[float] = []
    while len(ratios) < 10 or (statistics.median(ratios) >= 1.3 and len(ratios) < 40):
        of_numpy = processor_seconds("numpy", tmp_path)
        ratios.append(processor_seconds("fastattn", tmp_path) / of_numpy)
    assert statistics.median(ratios) < 1.3, ratios


def test_import_loads_nothing_heavy() -> None:
    loaded = set(printed("import sys, numpy; before = set(sys.modules); import fastattn; print(*set(sys.modules) - before)").split())
    assert "fastattn.api" in loaded
    assert not HEAVY & (loaded | {name.partition(".")[0] for name in loaded})


def test_a_call_loads_the_cpu_engine_and_no_gpu_package() -> None:
    code = "import sys, numpy, fastattn; x = numpy.ones((1, 2, 1, 8)); fastattn.attention(x, x, x); print(*sys.modules)"
    loaded = set(printed(code).split())
    assert "fastattn.cpu" in loaded
    assert not {"numba", "cuda", "cupy", "torch", "Cython"} & {name.partition(".")[0] for name in loaded}


def test_version_is_the_installed_one() -> None:
    try:
        installed = metadata.version("fastattn")
    except metadata.PackageNotFoundError:
        pytest.skip("fastattn is not installed, it is imported from its source tree")
    assert installed == fastattn.__version__


def test_public_names_are_there() -> None:
    assert all(callable(getattr(fastattn, name)) for name in fastattn.__all__)
    with pytest.raises(AttributeError, match="module 'fastattn' has no attribute 'attend'"):
        fastattn.attend  # noqa: B018


def test_dir_is_the_public_api() -> None:
    """Also in a fresh process, where nothing was loaded on first use; completion then offers these names and no others."""
    names = sorted([*fastattn.__all__, "__version__"])
    assert dir(fastattn) == names == printed("import fastattn; print(*dir(fastattn))").split()
    assert {"set_num_threads", "get_num_threads"} <= set(names)
    assert fastattn.__all__ == sorted(fastattn.__all__) and not [name for name in fastattn.__all__ if name.startswith("_")]


def test_the_example_of_the_readme() -> None:
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(code[0].splitlines()) <= 10                   # the others need torch, JAX and CuPy: test_docs.py runs them
    assert printed(code[0] + "print(dq.shape, dk.shape, dv.shape)") == "(2, 512, 8, 64) (2, 512, 2, 64) (2, 512, 2, 64)"


def test_a_wheel_stays_under_3_mb() -> None:
    """Compressed as a wheel compresses: what is installed, every compiled level included."""
    package = Path(fastattn.__file__).parent
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".pyi", ".so")]
    assert any(path.suffix == ".so" for path in files)
    assert sum(len(zlib.compress(path.read_bytes())) for path in files) < 3e6
