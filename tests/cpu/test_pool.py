"""The pool of threads in C: a stress test that is built with and without sanitizers, and for each way of sleeping."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn
from tests.tools.processes import ROOT, not_sanitized, printed

BUILDS = {"plain": [], "threads": ["-fsanitize=thread"], "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]}
SLEEPS = {"futex": [], "portable": ["-DPORTABLE_SLEEP"]}


def compiled(folder: Path, flags: list[str]) -> Path:
    """stress.c with these flags."""
    program = folder / "stress"
    command = ["gcc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-pthread", *flags,
               f"-I{ROOT / 'fastattn/cpu'}", str(ROOT / "tests/cpu/stress.c"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and flags and "cannot find" in done.stderr:
        pytest.skip(f"no library for {flags}")
    assert done.returncode == 0, done.stderr
    return program


@not_sanitized
@pytest.mark.skipif(shutil.which("gcc") is None or not sys.platform.startswith("linux"), reason="needs gcc and Linux")
@pytest.mark.parametrize("sleep", SLEEPS)
@pytest.mark.parametrize("build", BUILDS)
def test_stress(build: str, sleep: str, tmp_path: Path) -> None:
    """Each task runs once, and items of a chain in order. Sanitizers do not survive a fork among threads."""
    program = compiled(tmp_path, [*BUILDS[build], *SLEEPS[sleep]])
    command = ["setarch", "-R"] if build == "threads" and shutil.which("setarch") else []      # ThreadSanitizer wants its usual addresses
    done = subprocess.run([*command, str(program), "300", "6", "10" if build == "plain" else "0"], capture_output=True, text=True,
                          timeout=200, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0 and done.stdout.startswith("ok") and not done.stderr, done.stdout + done.stderr


HELPERS = '''
import numpy as np, pathlib, time, {imports}
def helpers(expected):
    """The names of the pool's threads. A new one names itself once the system lets it run."""
    for _ in range(1000):
        names = (path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm"))
        found = sorted(name for name in names if name.startswith("fastattn-"))
        if len(found) >= expected:
            break
        time.sleep(0.01)
    return " ".join(found)
def call(heads):
    q = np.ones((1, 90, heads, 64), np.float32)          # a task a head
    return fastattn.attention(q, q, q)
'''
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@linux
def test_helpers_are_made_on_demand() -> None:
    """None for one thread, and at most as many as tasks. They have names."""
    assert printed(HELPERS.format(imports="fastattn") + """
fastattn.set_num_threads(1)
call(8)
print(helpers(0), end="; ")
for threads, heads, expected in ((2, 8, 1), (4, 2, 1), (4, 8, 3)):
    fastattn.set_num_threads(threads)
    call(heads)
    print(helpers(expected), end="; ")
""") == "; fastattn-1; fastattn-1; fastattn-1 fastattn-2 fastattn-3;"


def test_no_openmp_is_loaded() -> None:
    """So threadpoolctl does not see the pool, and other programs' OpenMP settings do not reach it."""
    code = "import threadpoolctl, fastattn.cpu; print([x['prefix'] for x in threadpoolctl.threadpool_info() if x['user_api'] == 'openmp'])"
    assert printed(code) == "[]"


def test_a_bad_switch_is_an_error() -> None:
    assert printed("""
import fastattn
try:
    fastattn.set_num_threads(2)
except ValueError as error:
    print(error)
""", FASTATTN_BORROW="yes") == "FASTATTN_BORROW is 'yes'; expected 0 or 1."


@linux
@pytest.mark.parametrize(("switch", "torch_threads", "expected"),
                         [("1", 2, ""), ("", 2, ""), ("0", 2, "fastattn-1"), ("1", 1, "fastattn-1"), ("1", 5, "fastattn-1")])
def test_torch_lends_its_threads(switch: str, torch_threads: int, expected: str) -> None:
    """Unless it has fewer than a call may use, or far more. Later calls may leave it alone, on a busy machine."""
    pytest.importorskip("torch")
    assert printed(HELPERS.format(imports="torch, fastattn") + f"""
torch.set_num_threads({torch_threads})
fastattn.set_num_threads(2)
expected = call(8).tobytes()
print(helpers({len(expected.split())}))
for _ in range(5):
    assert call(8).tobytes() == expected
""", FASTATTN_BORROW=switch) == expected


@linux
def test_torch_that_is_loaded_later_lends_too() -> None:
    pytest.importorskip("torch")
    assert printed(HELPERS.format(imports="fastattn") + """
fastattn.set_num_threads(2)
expected = call(8).tobytes()
import torch
torch.set_num_threads(3)
fastattn.set_num_threads(3)
assert call(8).tobytes() == expected
print(helpers(1))
""") == "fastattn-1"


def test_get_num_threads_is_the_setting() -> None:
    before = fastattn.get_num_threads()
    try:
        fastattn.set_num_threads(7)
        assert fastattn.get_num_threads() == 7
    finally:
        fastattn.set_num_threads(before)
