"""Whose the kernel cache is: nothing is loaded that another user could have written. Nothing here needs a GPU."""
from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")


from fastattn.gpu.runtime import cache
from fastattn.gpu.runtime import compile as compiler
from tests.tools.gpu.cache import ARCH, ELF, KEY, MALLORY, ME, SOURCE, Owners, entries, kept

pytestmark = pytest.mark.usefixtures("fresh_cache")


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
