"""The kernel cache and `python -m fastattn precompile`. Nothing here needs a GPU.

A hit compiles nothing, a bad folder or a damaged entry costs only time, nothing is loaded that another user could have written, and
everything that changes machine code changes the key.
"""
from __future__ import annotations

import hashlib
import importlib
import logging
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from numba import cuda, int32, uint64

import fastattn
from fastattn import __main__ as command
from fastattn import gpu
from fastattn.arrays import streams
from fastattn.gpu import precompile
from fastattn.gpu.ptx.memory import store_b32
from fastattn.gpu.runtime import cache
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime.arch import ARCHITECTURES, arch_of, arch_of_number, parse_arch

ROOT = Path(__file__).parents[2]
ARCH = "sm_80"


def _kernel(a):
    store_b32(uint64(a.dst + uint64(4 * cuda.threadIdx.x)), int32(a.n))


SOURCE = compiler.Source("test cache", lambda: (_kernel, 48), (("dst", "l"), ("n", "i")), 32)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No warning or write has happened yet, and others cannot write the files that tests create."""
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(cache, "_writes", 0)
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys that were compiled and not found."""
    seen, build = list[str](), compiler.build

    def counted(source: compiler.Source, arch: str, output: str = "cubin") -> Any:
        seen.append(source.key)
        return build(source, arch, output)
    monkeypatch.setattr(compiler, "build", counted)
    yield seen


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


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


def test_eight_threads_and_processes_at_once(folder: Path) -> None:
    """Five threads and three other processes compile one kernel: all get the same code."""
    script = ("import hashlib; from tests.gpu import test_cache as t; from fastattn.gpu.runtime import compile as c; "
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
        for text in ("a = 1\n", "a = 2\n"):
            (tmp_path / "gpu" / "ptx").mkdir(parents=True, exist_ok=True)
            (tmp_path / "gpu" / "compile.py").write_text("")
            (tmp_path / "gpu" / "ptx" / "mma.py").write_text(text)
            with monkeypatch.context() as patch:
                patch.setattr(compiler, "__file__", str(tmp_path / "gpu" / "compile.py"))
                compiler._fingerprint.cache_clear()
                keys.append(compiler._key(SOURCE, ARCH))
    finally:
        compiler._fingerprint.cache_clear()
    assert len(set(keys)) == len(keys) == 8
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


# ---------------------------------------------------------------- whose it is
KEY, ELF = "ab" * 32, cache.Binary(b"\x7fELF and more", 48)
ME, MALLORY = 1000, 1001


class Owners:
    """A fake stat: the user is ME, and every file is root's unless given to another. Real owners will not do, because
    the tests may run as root."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of, self.fstat = dict[tuple[int, int], int](), os.fstat
        monkeypatch.setattr(os, "geteuid", lambda: ME)
        monkeypatch.setattr(os, "fstat", self.status)

    def give(self, path: Path, owner: int) -> None:
        status = path.lstat()
        self.of[status.st_dev, status.st_ino] = owner

    def status(self, descriptor: int) -> os.stat_result:
        real = self.fstat(descriptor)
        values = list(real[:10])
        values[4] = self.of.get((real.st_dev, real.st_ino), cache.ROOT)
        return os.stat_result(values)


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> Owners:
    return Owners(monkeypatch)


def kept(folder: Path, mode: int = 0o755) -> Path:
    """A folder with one entry."""
    cache._make(folder, 0o755)
    entry = folder / f"{KEY}.cubin"
    entry.write_bytes(cache._packed(KEY, ELF))
    folder.chmod(mode)
    return entry


@pytest.mark.parametrize("whose", ["mine", "root's"])
def test_what_only_the_user_or_root_can_write_is_used(whose: str, folder: Path, owners: Owners, caplog: pytest.LogCaptureFixture) -> None:
    entry = kept(folder)
    if whose == "mine":
        owners.give(folder, ME)
        owners.give(entry, ME)
    assert cache.read(KEY) == ELF and not caplog.records


@pytest.mark.parametrize(("name", "owner", "mode", "said"), [
    ("cache", MALLORY, 0o700, "belongs to user 1001, neither to you (user 1000) nor to root"),
    ("cache", ME, 0o770, "can be written by others (mode 0770); `chmod go-w"), ("cache", cache.ROOT, 0o1777, "(mode 1777)"),
    ("cache/entry", MALLORY, 0o600, "belongs to user 1001"), ("cache/entry", ME, 0o664, "(mode 0664)"), ("cache/entry", ME, 0o646, "0646"),
    ("above", MALLORY, 0o755, "belongs to user 1001"), ("above", ME, 0o777, "(mode 0777)")])
def test_what_others_could_have_written_is_refused_once(name: str, owner: int, mode: int, said: str, tmp_path: Path, owners: Owners,
                                                        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "above" / "cache"
    entry = kept(folder)
    monkeypatch.setenv("FASTATTN_CACHE", str(folder))
    owners.give(folder, ME)
    owners.give(entry, ME)
    bad = {"above": folder.parent, "cache": folder, "cache/entry": entry}[name]
    owners.give(bad, owner)
    bad.chmod(mode)
    for _ in range(3):
        assert cache.read(KEY) is None
    [record] = caplog.records
    assert record.levelname == "WARNING" and f"{bad} " in record.message and said in record.message and "works" in record.message
    if bad is not entry:
        cache.write("cd" * 32, ELF)
        assert entries(folder) == [entry] and len(caplog.records) == 1
        assert "not used" in cache.described() and str(bad) in cache.described()


def test_a_refused_folder_costs_time_only(folder: Path, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    compiler.binary(SOURCE, ARCH)
    folder.chmod(0o777)
    for _ in range(2):
        assert compiler.binary(SOURCE, ARCH).code[:4] == b"\x7fELF"
    assert len(builds) == 3 and len(caplog.records) == 1 and f"chmod go-w {folder}" in caplog.text


def test_a_folder_in_a_sticky_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owners: Owners,
                                  caplog: pytest.LogCaptureFixture) -> None:
    """Only its owner can move a folder in /tmp, but anyone can create it first."""
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    entry = kept(shared / "mine", 0o700)
    monkeypatch.setenv("FASTATTN_CACHE", str(entry.parent))
    owners.give(entry.parent, ME)
    owners.give(entry, ME)
    assert cache.read(KEY) == ELF and not caplog.records
    owners.give(entry.parent, MALLORY)
    assert cache.read(KEY) is None and "user 1001" in caplog.text


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("FASTATTN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"fastattn-{os.geteuid()}"
    assert cache.folders() == [folder]
    cache.write(KEY, ELF)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and cache.read(KEY) == ELF


@pytest.mark.parametrize(("owner", "found"), [(cache.ROOT, ELF), (ME, ELF), (MALLORY, None)])
@pytest.mark.parametrize("relative", [False, True])
def test_links_to_a_folder_are_followed_where_the_user_made_them(owner: int, found: Any, relative: bool, tmp_path: Path, owners: Owners,
                                                                 monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    kept(tmp_path / "real" / "cache")
    link = tmp_path / "link"
    link.symlink_to("real" if relative else tmp_path / "real")
    owners.give(link, owner)
    monkeypatch.setenv("FASTATTN_CACHE", str(link / "cache"))
    assert cache.read(KEY) == found and ("user 1001" in caplog.text) == (found is None)


def test_links_in_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "a"))
    assert cache.read(KEY) is None and "Too many levels of symbolic links" in caplog.text


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_an_entry_is_a_file(kind: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pipe in an entry's place does not make the reader wait."""
    entry = kept(folder)
    entry.rename(tmp_path / "elsewhere")
    {"link": lambda: entry.symlink_to(tmp_path / "elsewhere"), "pipe": lambda: os.mkfifo(entry, 0o600), "folder": entry.mkdir}[kind]()
    assert cache.read(KEY) is None and len(caplog.records) == 1 and str(entry) in caplog.text


def test_what_is_opened_is_what_was_checked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owners: Owners) -> None:
    """Another folder is put under the same name just after the check: its entries are not read."""
    entry, other = kept(folder), kept(tmp_path / "other")
    entry.unlink()
    owners.give(other.parent, MALLORY)
    check, swapped = cache._check, list[bool]()

    def swap(status: os.stat_result, path: Path, *more: Any, **options: Any) -> None:
        check(status, path, *more, **options)
        if path == folder and not swapped:
            swapped.append(True)
            folder.rename(tmp_path / "away")
            other.parent.rename(folder)
    monkeypatch.setattr(cache, "folders", lambda: [folder])
    monkeypatch.setattr(cache, "_check", swap)
    assert cache.read(KEY) is None and swapped


# ---------------------------------------------------------------- shared ones
def test_a_cache_of_root_serves_other_users(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[str]) -> None:
    """Everyone can read its files unless the umask forbids it; missing kernels go into the user's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    shared = replace(SOURCE, key="test cache, shared")
    compiler.binary(shared, ARCH)                                          # as root
    [entry] = entries(folder)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o644 and stat.S_IMODE(folder.stat().st_mode) == 0o755
    owners, own = Owners(monkeypatch), tmp_path / "caches" / "fastattn"    # another user from here on
    assert cache.folders() == [folder, own]
    compiler.binary(shared, ARCH)
    assert builds == [shared.key]
    cache._make(own, 0o700)
    owners.give(own, ME)
    compiler.binary(SOURCE, ARCH)
    [mine] = entries(own)
    assert entries(folder) == [entry] and stat.S_IMODE(own.stat().st_mode) == 0o700
    owners.give(mine, ME)
    compiler.binary(SOURCE, ARCH)
    assert builds == [shared.key, SOURCE.key]
    entry.write_bytes(b"damaged")                                           # is not the user's to repair
    compiler.binary(shared, ARCH)
    assert entry.read_bytes() == b"damaged" and len(entries(own)) == 2


@pytest.mark.parametrize(("umask", "of_folder", "of_file"), [(0o077, 0o700, 0o600), (0o002, 0o755, 0o644), (0, 0o755, 0o644)])
def test_modes(umask: int, of_folder: int, of_file: int, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files follow the umask, but others can never write them."""
    os.umask(umask)
    cache.write(KEY, ELF)
    [entry] = entries(folder)
    assert (stat.S_IMODE(folder.stat().st_mode), stat.S_IMODE(entry.stat().st_mode)) == (of_folder, of_file)
    assert cache.read(KEY) == ELF and not caplog.records


def test_an_unreadable_entry_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    kept(folder)
    opened = os.open

    def denied(path: Any, *more: Any, **options: Any) -> int:
        if str(path).endswith(".cubin"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *more, **options)
    monkeypatch.setattr(os, "open", denied)
    assert cache.read(KEY) is None and cache.read(KEY) is None
    [record] = caplog.records
    assert record.message == f"fastattn: cannot read the kernel cache {folder}: [Errno 13] Permission denied"


# ---------------------------------------------------------------- old entries
def aged(folder: Path, name: str, size: int, days: float) -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - 86400 * days,) * 2)
    return path


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


# ---------------------------------------------------------------- the command
def test_show_config_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["show-config"]):
        assert command.main(arguments) == 0
        assert "cache folder" in capsys.readouterr().out


@pytest.fixture
def plain_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel of the simplest family instead of the command's default lists, compiled in a child of this process."""
    monkeypatch.setattr(precompile, "wants_of", lambda dims, dtypes, features: [precompile.Want(dtypes[0], dims[0], packed=True)])


def test_precompile_without_a_gpu(folder: Path, plain_want: None, capsys: pytest.CaptureFixture[str], builds: list[str]) -> None:
    """A call of the same kind finds in the cache what the command put there."""
    arguments = ["precompile", "--arch", "8.0", "--head-dim", "64", "--dtype", "float16", "--processes", "1"]
    assert command.main(arguments) == 0, capsys.readouterr().out
    said = capsys.readouterr()
    assert re.search(rf"2 kernels for sm_80 in {folder}", said.out)
    d = precompile.absent_device("sm_80")
    for source in precompile.sources(*precompile.Want("float16", 64, packed=True).call(), d):
        compiler.binary(source, "sm_80")
    assert builds == [] and len(entries(folder)) == 2


def test_precompile_lists_every_kernel() -> None:
    wants = precompile.wants_of([64, 128], ["float16"], ["causal", "alibi+softcap"])
    assert len(wants) == len(set(wants)) == 72
    assert precompile.Want("float16", 128, alibi="float32", softcap=True, packed=True, lse=True) in wants


@pytest.mark.parametrize(("arguments", "said"), [
    (["--arch", "sm_70"], "sm_80, sm_86, sm_89, sm_90a, sm_120"), (["--arch", "hopper"], "sm_90a"),
    (["--arch", "sm_80", "--dtype", "int8"], "bfloat16"),
    (["--arch", "sm_80", "--head-dim", "wide"], "sizes from 1 to 576"), (["--arch", "sm_80", "--features", "flash"], "not one of full"),
    (["--arch", "sm_80", "--processes", "0"], "1 or more")])
def test_precompile_says_what_is_wrong(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        command.main(["precompile", *arguments])


def test_precompile_needs_a_device_or_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    device = importlib.import_module("fastattn.gpu.runtime.device")

    def absent(ordinal: int) -> Any:
        raise streams.CudaError("cuInit failed: no device")
    monkeypatch.setattr(device, "device", absent)
    with pytest.raises(SystemExit, match=r"no CUDA device here .* --arch sm_90a"):
        command.main(["precompile"])


def test_precompile_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = [precompile.Built("one", "sm_80", 1.0), precompile.Built("two", "sm_80", 1.0, "BuildError: 8 bytes of stack")]
    monkeypatch.setattr(precompile, "build_all", lambda *_, **__: iter(results))
    assert command.main(["precompile", "--arch", "sm_80"]) == 1
    out = capsys.readouterr().out
    assert "1 kernels for sm_80" in out and "failed: two for sm_80: BuildError: 8 bytes of stack" in out


def test_precompile_says_where_it_cannot_write(folder: Path, plain_want: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel that was compiled and could not be stored counts as failed."""
    arguments = ["precompile", "--arch", "8.0", "--head-dim", "64", "--dtype", "float16", "--processes", "1"]
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(SystemExit, match=r"not used as a kernel cache: .* can be written by others .*chmod go-w"):
        command.main(arguments)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SystemExit, match="Not a directory"):
        command.main(arguments)
    monkeypatch.setattr(cache, "read", lambda key: None)
    monkeypatch.setattr(compiler, "binary", lambda *_, **__: None)
    jobs, _ = precompile.jobs_of([precompile.Want("float16", 64)], ["sm_80"], ("simt",))
    assert "the log says why" in str(precompile._build(jobs[0], ("simt",)).error)


def test_cache_shows_and_clears(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["cache"]) == 0 and capsys.readouterr().out == f"{folder}: 0 entries, 0.0 MB\n"
    cache._make(folder, 0o755)
    gone = [aged(folder, f"{digit * 64}.cubin", 400_000, 1) for digit in "123"] + [aged(folder, f"{KEY}.cubin.{'0' * 16}", 10, 0)]
    notes, target = aged(folder, "notes.cubin", 10, 1), aged(tmp_path, "f" * 64 + ".cubin", 10, 9)
    link = folder / target.name
    link.symlink_to(target)
    assert command.main(["cache"]) == 0 and capsys.readouterr().out == f"{folder}: 3 entries, 1.2 MB\n"
    assert command.main(["cache", "--clear"]) == 0 and capsys.readouterr().out == f"{folder}: 3 entries, 1.2 MB removed\n"
    assert not any(path.exists() for path in gone) and notes.exists() and target.exists() and link.is_symlink()
    folder.chmod(0o777)
    assert command.main(["cache", "--clear"]) == 1 and "not used" in capsys.readouterr().out


def test_only_the_users_own_folder_is_cleared(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    entry, own = kept(folder), tmp_path / "caches" / "fastattn"
    mine = kept(own)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own.parent))
    Owners(monkeypatch).give(own, ME)
    assert command.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"{folder}: 1 entries, 0.0 MB\n{own}: 1 entries, 0.0 MB removed\n"
    assert entry.exists() and not mine.exists()



@pytest.mark.parametrize("given", ["sm_90a", "sm_90", "90", "9.0", " SM_90A "])
def test_arch_names(given: str) -> None:
    assert parse_arch(given).name == "sm_90a"


def test_an_unknown_arch_names_all_that_are_known() -> None:
    with pytest.raises(ValueError, match="sm_75: kernels are compiled for sm_80, sm_86, sm_89, sm_90a, sm_120"):
        parse_arch("sm_75")
    with pytest.raises(ValueError, match="new: kernels"):
        parse_arch("new")
    with pytest.raises(SystemExit, match=r"--arch 7\.5: kernels are compiled for"):
        command.main(["precompile", "--arch", "7.5"])


def test_other_architectures_are_what_their_name_says() -> None:
    known = [arch_of(name) for name in ARCHITECTURES]
    assert [(arch.name, arch_of_number(arch.number)) for arch in known] == list(zip(ARCHITECTURES, known, strict=True))
    newer = arch_of_number(103)
    assert (newer.name, newer.capability, arch_of("sm_103"), newer.shared_memory) == ("sm_103", (10, 3), newer, 99)


def test_a_call_whose_kernels_are_kept_needs_no_numba() -> None:
    """A second process's first call would spend most of its time importing it."""
    script = ("import contextlib, sys; from fastattn import gpu; from fastattn.gpu import precompile\n"
              "for family in gpu.FAMILIES:\n"
              "    with gpu.use(family):\n"
              "        found = precompile.sources(*precompile.Want('float16', causal=True).call(), precompile.absent_device('sm_90a'))\n"
              "        want = precompile.Want('float16', causal=True, packed=True)\n"
              "        found += precompile.sources(*want.call(), precompile.absent_device('sm_90a'))\n"
              "        for more in ({}, {'bias': 'float16', 'sinks': 'float32'}, {'deterministic': True},\n"
              "                     {'packed': True, 'head_dim': 256}):\n"
              "            want = precompile.Want('float16', backward=True, **more)\n"
              "            with contextlib.suppress(NotImplementedError):\n"
              "                assert len(precompile.sources(*want.call(), precompile.absent_device('sm_90a'))) >= 3\n"
              "        print(*(source.key.split()[0] for source in found), {'numba', 'llvmlite'} & set(sys.modules))")
    said = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert said.stdout.splitlines() == [f"forward_{family} forward_{family} plan_packed set()" for family in gpu.FAMILIES], said.stderr


def test_a_want_lists_the_kernels_of_its_family() -> None:
    call, spec = precompile.Want("float16", 104, packed=True, causal=True, lengths="int64").call()
    with gpu.use("sm90"):
        keys = [source.key for source in precompile.sources(call, spec, precompile.absent_device("sm_90a"))]
        with pytest.raises(fastattn.UnsupportedError, match="sm90"):
            precompile.sources(call, spec, precompile.absent_device("sm_80"))
    assert sorted(key.split()[0] for key in keys) == ["forward_sm90", "plan_packed"] and any("plan_packed BLOCK_M" in key for key in keys)
