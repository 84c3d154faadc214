"""The kernel cache: entries, keys and folders. Nothing here needs a GPU.

A hit compiles nothing, a bad folder or a damaged entry costs only time, and everything that changes machine code changes the key.
"""
from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")


import fastattn
from fastattn.gpu.runtime import cache
from fastattn.gpu.runtime import compile as compiler
from tests.tools.gpu.cache import ARCH, ELF, KEY, SOURCE, aged, entries, kept
from tests.tools.processes import ROOT

pytestmark = pytest.mark.usefixtures("fresh_cache")


def test_a_hit_compiles_nothing(folder: Path, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastattn"):
        first = compiler.binary(SOURCE, ARCH).code
    assert first[:4] == b"\x7fELF" and builds == [SOURCE.key] and len(entries(folder)) == 1
    assert re.search(rf"compiling {SOURCE.key} for {ARCH}", caplog.text) and re.search(r"compiled in [\d.]+ s, \d+ registers", caplog.text)
    assert {record.levelname for record in caplog.records} == {"INFO"}
    caplog.clear()
    with caplog.at_level(logging.INFO, "fastattn"):
        assert compiler.binary(SOURCE, ARCH).code == first
    assert len(builds) == 1 and not caplog.records


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:20], lambda data: data[:-1], lambda data: data[:-1] + b"?",
                                    lambda data: b"\0" * len(data), lambda data: data + b"\0", lambda data: hashlib.sha256(b"").digest(),
                                    lambda data: cache._packed("0" * 64, cache.Binary(b"forged", 0))],
                         ids=["empty", "short", "truncated", "changed", "zeros", "longer", "hash of nothing", "another kernel's"])
def test_a_damaged_entry_is_compiled_again(damage: Any, folder: Path, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    compiler.binary(SOURCE, ARCH)
    [entry] = entries(folder)
    entry.write_bytes(damage(entry.read_bytes()))
    again = compiler.binary(SOURCE, ARCH).code
    assert again[:4] == b"\x7fELF" and len(builds) == 2
    assert "damaged" in caplog.text and str(entry) in caplog.text
    assert compiler.binary(SOURCE, ARCH).code == again and len(builds) == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[str],
                                      caplog: pytest.LogCaptureFixture) -> None:
    """A file is where the folder should be; unlike permissions, this stops root too."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "file" / "cache"))
    assert compiler.binary(SOURCE, ARCH).code[:4] == b"\x7fELF"
    assert "cannot write the kernel cache" in caplog.text and len(builds) == 1


def test_a_read_only_folder(folder: Path, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("root writes anywhere")
    assert compiler.binary(SOURCE, ARCH).code[:4] == b"\x7fELF" and "cannot write" in caplog.text


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: Any, **folders: int) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    assert compiler.binary(SOURCE, ARCH).code[:4] == b"\x7fELF" and "No space left" in caplog.text
    assert not entries(folder)


def test_entries_appear_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ever written under an entry's own name: it is renamed into place when it is complete."""
    renamed, replace_file = list[tuple[bytes, str]](), os.replace

    def noted(a: Any, b: Any, **folders: int) -> None:
        assert not (folder / b).exists()
        renamed.append(((folder / a).read_bytes(), b))
        replace_file(a, b, **folders)
    monkeypatch.setattr(os, "replace", noted)
    code = compiler.binary(SOURCE, ARCH).code
    [(data, name)] = renamed
    assert cache._unpacked(name.removesuffix(".cubin"), data) == (code, 48, f"{ARCH} {SOURCE.key}") and entries(folder) == [folder / name]


@pytest.mark.slow
def test_eight_threads_and_processes_at_once(folder: Path) -> None:
    """Five threads and three other processes compile one kernel: all get the same code."""
    script = ("import hashlib; from tests.tools.gpu import cache as t; from fastattn.gpu.runtime import compile as c; "
              "print(hashlib.sha256(c.binary(t.SOURCE, t.ARCH).code).hexdigest())")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    others = [subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    with ThreadPoolExecutor(5) as pool:
        assert len(set(pool.map(lambda _: compiler.binary(SOURCE, ARCH).code, range(5)))) == 1
    said = [other.communicate(timeout=120)[0] for other in others]
    assert len(set(said)) == 1 and len(said[0].strip()) == 64
    assert len(entries(folder)) == 1


# ---------------------------------------------------------------- the key
def test_whatever_changes_code_changes_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = [compiler._key(SOURCE, ARCH), compiler._key(SOURCE, "sm_89"),
             compiler._key(replace(SOURCE, key="other"), ARCH),
             compiler._key(replace(SOURCE, fields=(("dst", "l"), ("n", "q"))), ARCH),
             compiler._key(replace(SOURCE, fields=(("n", "i"), ("dst", "l"))), ARCH)]
    compiler._fingerprint.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(compiler.importlib.metadata, "version", lambda package: "99")
            keys.append(compiler._key(SOURCE, ARCH))
        for place in ("gpu/runtime", "gpu/ptx", "flex"):
            (tmp_path / place).mkdir(parents=True)
        for name, text in itertools.product(("gpu/ptx/mma.py", "flex/ops.py"), ("a = 1\n", "a = 2\n")):
            (tmp_path / name).write_text(text)
            with monkeypatch.context() as patch:
                patch.setattr(compiler, "__file__", str(tmp_path / "gpu" / "runtime" / "compile.py"))
                compiler._fingerprint.cache_clear()
                keys.append(compiler._key(SOURCE, ARCH))
    finally:
        compiler._fingerprint.cache_clear()
    assert len(set(keys)) == len(keys) == 10
    assert compiler._key(SOURCE, ARCH) == keys[0]


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FASTATTN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folders() == [tmp_path / "fastattn"]
    assert fastattn.show_config()["cache folder"] == str(tmp_path / "fastattn")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "own"))
    assert cache.folders() == [tmp_path / "own"] == [Path(fastattn.show_config()["cache folder"])]
    monkeypatch.delenv("FASTATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")      # its specification: relative ones are ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folders() == [tmp_path / "home" / ".cache" / "fastattn"]


def test_a_relative_folder_stays_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "later").mkdir()
    monkeypatch.setenv("FASTATTN_CACHE", f"relative-{tmp_path.name}")
    monkeypatch.chdir(tmp_path)
    assert cache.folders() == [tmp_path / f"relative-{tmp_path.name}"]
    monkeypatch.chdir(tmp_path / "later")
    assert cache.folders() == [tmp_path / f"relative-{tmp_path.name}"]


# ---------------------------------------------------------------- old entries
def test_least_recently_used_entries_go(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other versions too; no other files, and nothing behind a link."""
    cache._make(folder, 0o755)
    old, middle, new = (aged(folder, f"{digit * 64}.cubin", 400_000, days) for digit, days in (("1", 3), ("2", 2), ("3", 0.5)))
    others = [aged(folder, "notes.cubin", 9_000_000, 9), aged(folder, "a" * 64, 10, 9)]
    unfinished = aged(folder, f"{KEY}.cubin.{'0' * 16}", 10, 1), aged(folder, f"{KEY}.cubin.{'1' * 16}", 10, 0)
    target = aged(tmp_path, "f" * 64 + ".cubin", 9_000_000, 9)
    link = folder / target.name
    link.symlink_to(target)
    monkeypatch.setenv("FASTATTN_CACHE_MB", "1")
    cache.write(KEY, ELF)
    assert entries(folder) == sorted([middle, new, folder / f"{KEY}.cubin", *others, unfinished[1], link]) and target.exists()
    middle.write_bytes(bytes(900_000))
    os.utime(middle, (time.time() - 86400,) * 2)
    cache.write(KEY, ELF)
    assert middle.exists()                              # rarely: it lists the folder
    monkeypatch.setattr(cache, "_writes", cache.WRITES_BETWEEN_CHECKS)
    cache.write(KEY, ELF)
    assert not middle.exists() and not old.exists() and new.exists()


def test_use_is_recorded_once_a_day(folder: Path) -> None:
    entry = kept(folder)
    for days, noted in ((0.5, False), (2.0, True)):
        then = time.time() - 86400 * days
        os.utime(entry, (then, then))
        assert cache.read(KEY) == ELF
        assert (entry.stat().st_mtime > then + 1) == noted


def test_entries_that_another_process_removes(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cache._make(folder, 0o755)
    for digit in "123":
        aged(folder, f"{digit * 64}.cubin", 10, 1)
    unlink = os.unlink

    def twice(path: Any, **options: Any) -> None:
        unlink(path, **options)
        unlink(path, **options)
    monkeypatch.setattr(os, "unlink", twice)
    monkeypatch.setenv("FASTATTN_CACHE_MB", "0")
    cache.write(KEY, ELF)
    assert not entries(folder) and not caplog.records


def test_a_limit_that_is_not_a_number(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FASTATTN_CACHE_MB", "1 GB")
    cache.write(KEY, ELF)
    assert cache.read(KEY) == ELF and "FASTATTN_CACHE_MB is '1 GB'; expected a number of megabytes" in caplog.text
