"""The disk cache of compiled kernels: one file a kernel, in folders that only the user or root can write.

Loaded machine code runs as the user, so an entry is as trustworthy as those who could have written it. A folder or a
file that belongs to neither the user nor root, or that others can write, is refused with one warning. Folders are
walked descriptor by descriptor from the root: what is checked is what is opened, although a name can mean something
else a moment later.

An entry is a header, a label that says what it is, and the code. The header has a hash of all and of the entry's name,
which detects damage, another length, and another kernel's entry under this name. Entries are renamed into place when
they are complete. Above a limit, the least recently used are removed.
"""
from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("fastattn")

MAGIC = b"fastatt2"         # with the version of this format
HEADER = struct.Struct("<8s32sQII")     # MAGIC, sha256, bytes of code, of shared memory, of the label
SUFFIX = ".cubin"
ENTRY, UNFINISHED = re.compile(r"[0-9a-f]{64}\.cubin"), re.compile(r"[0-9a-f]{64}\.cubin\.[0-9a-f]{16}")
LIMIT_MB = 512              # of a folder's entries, those of other versions too; a kernel has 20 to 200 KB
WRITES_BETWEEN_CHECKS = 64  # of that limit; the first write of a process checks, too
DAY, HOUR = 86400.0, 3600.0
LONGEST_LABEL = 4096        # bytes of a label that are shown; a kernel's key has some hundred
MOST_LINKS = 40             # on the way to a folder, as in the kernel
ROOT = 0
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC        # also opens a folder that cannot be listed, and a link itself

_warned: set[str] = set()
_writes = 0


class Binary(NamedTuple):
    """A compiled kernel."""

    code: bytes
    shared_memory: int      # bytes of dynamic shared memory of a launch
    label: str = ""         # for people: architecture and key


class Entry(NamedTuple):
    """A file of the cache. `used`: when it was last used, in seconds since 1970, exact to a day."""

    name: str
    size: int
    used: float


class RefusedError(OSError):
    """Other users could have written this folder or file. The text says why, and what would work."""


# ---------------------------------------------------------------- where
def folders() -> list[Path]:
    """Where kernels are looked for, in this order; new ones go into the last.

    FASTATTN_CACHE, else fastattn in the user's cache folder. A FASTATTN_CACHE that belongs to root is shared: the
    user's own comes second.
    """
    given = _given()
    if given is None:
        return [_own()]
    return [given, _own()] if _is_shared(given) else [given]


def _given() -> Path | None:
    text = os.environ.get("FASTATTN_CACHE")
    return _absolute(text) if text else None


@cache
def _absolute(text: str) -> Path:
    """Computed once: a relative folder stays where it was at its first use, even if the process changes its folder
    later."""
    return Path(os.path.abspath(text))


def _own() -> Path:
    """The user's own folder. A relative XDG_CACHE_HOME is ignored, as its specification says."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if caches.is_absolute():
        return caches / "fastattn"
    with contextlib.suppress(RuntimeError):     # a user without a home
        home = Path.home()
        if home.is_absolute():
            return home / ".cache" / "fastattn"
    import tempfile
    return Path(tempfile.gettempdir(), f"fastattn-{os.geteuid()}")


def _is_shared(path: Path) -> bool:
    """Whether the folder belongs to root and the user is not root."""
    try:
        with _opened(path) as folder:
            return os.fstat(folder).st_uid != os.geteuid()
    except OSError:
        return False


# ---------------------------------------------------------------- who could have written it
@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a folder that only the user or root can write or replace. RefusedError says why there is none.

    Folders above it may be sticky, as /tmp is: only an entry's owner can move it there. Links that the user or root
    made are followed.
    """
    at, walked, left, links = os.open("/", _PATH | os.O_DIRECTORY), Path("/"), [*reversed(path.parts[1:])], 0
    try:
        trusted = {ROOT, os.geteuid(), os.fstat(at).st_uid}     # in a user namespace root's folders may show another owner
        while left:
            _check(os.fstat(at), walked, trusted, sticky=True)
            name = left.pop()
            target = _link(at, name, walked, trusted)
            if target is not None:
                links += 1
                if links > MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                left += reversed(target.parts)
                continue
            below = os.open(name, _PATH | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at, walked = below, walked / name
        _check(os.fstat(at), walked, {ROOT, os.geteuid()})
        yield at
    finally:
        os.close(at)


def _link(folder: int, name: str, path: Path, trusted: set[int]) -> Path | None:
    """The target of `name` in a folder, None if it is not a link."""
    descriptor = os.open(name, _PATH, dir_fd=folder)       # of the link itself
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISLNK(status.st_mode):
            return None
        _check_owner(status, path / name, trusted)
        return Path(os.readlink("", dir_fd=descriptor))
    finally:
        os.close(descriptor)


def _check(status: os.stat_result, path: Path, trusted: set[int], sticky: bool = False) -> None:
    _check_owner(status, path, trusted)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (sticky and status.st_mode & stat.S_ISVTX):
        raise RefusedError(f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}); `chmod go-w {path}` works, or "
                           "FASTATTN_CACHE with a folder that only you can write")


def _check_owner(status: os.stat_result, path: Path, trusted: set[int]) -> None:
    if status.st_uid not in trusted:
        raise RefusedError(f"{path} belongs to user {status.st_uid}, neither to you (user {os.geteuid()}) nor to root; FASTATTN_CACHE with "
                           "a folder that only you can write works")


def _warn_once(kind: str, text: str) -> None:
    """Log one warning of each kind in a process: it concerns every kernel."""
    if kind not in _warned:
        _warned.add(kind)
        log.warning("fastattn: %s", text)


def _complain(what: str, path: Path, error: OSError) -> None:
    if isinstance(error, RefusedError):
        _warn_once("refused", f"a kernel cache is refused: {error}. Kernels are compiled in every process until then.")
    else:
        _warn_once(what, f"cannot {what} the kernel cache {path}: {error}")


# ---------------------------------------------------------------- entries
def read(key: str) -> Binary | None:
    """The kernel of a key (64 hexadecimal digits), None if there is none, it is damaged or refused."""
    for path in folders():
        try:
            with _opened(path) as folder:
                data = _content(folder, path, key + SUFFIX)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            _complain("read", path, error)
            continue
        found = _unpacked(key, data)
        if found is not None:
            return found
        log.warning("fastattn: %s is damaged and is compiled again", path / (key + SUFFIX))
    return None


def _content(folder: int, path: Path, name: str) -> bytes:
    """Content of an entry that only the user or root can have written. The entry is marked as used, once a day."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RefusedError(f"{path / name} is a link; removing it works") from error
        raise
    try:
        status = os.fstat(descriptor)
        _check(status, path / name, {ROOT, os.geteuid()})
        if not stat.S_ISREG(status.st_mode):
            raise RefusedError(f"{path / name} is not a file; removing it works")
        if time.time() - status.st_mtime > DAY:
            with contextlib.suppress(OSError):      # root's, or read-only
                os.utime(descriptor)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _hash(key: str, binary: Binary) -> bytes:
    text = f"{key} {len(binary.code)} {binary.shared_memory} {binary.label}\n"
    return hashlib.sha256(text.encode() + binary.code).digest()


def _packed(key: str, binary: Binary) -> bytes:
    label = binary.label.encode()
    return HEADER.pack(MAGIC, _hash(key, binary), len(binary.code), binary.shared_memory, len(label)) + label + binary.code


def _unpacked(key: str, data: bytes) -> Binary | None:
    """The kernel in an entry, None if it is not the whole entry of this key."""
    if len(data) <= HEADER.size:
        return None
    magic, digest, length, shared_memory, label = HEADER.unpack_from(data)
    start = HEADER.size + label
    found = Binary(data[start:], shared_memory, data[HEADER.size:start].decode(errors="replace"))
    return found if magic == MAGIC and length == len(found.code) and digest == _hash(key, found) else None


def write(key: str, binary: Binary) -> None:
    """Write a kernel to the last folder, atomically. A cache that cannot be written costs time only."""
    global _writes
    path = folders()[-1]
    try:
        _make(path, 0o755 if path == _given() else 0o700)
        with _opened(path) as folder:
            _put(folder, key + SUFFIX, _packed(key, binary))
            if _writes % WRITES_BETWEEN_CHECKS == 0:
                _remove_oldest(folder, _limit())
            _writes += 1
    except OSError as error:
        _complain("write", path, error)


def _make(path: Path, mode: int) -> None:
    """Make a folder and those above it."""
    try:
        path.mkdir(mode)
    except FileNotFoundError:
        _make(path.parent, mode)
        path.mkdir(mode, exist_ok=True)
    except OSError:
        if not path.is_dir():
            raise


def _put(folder: int, name: str, data: bytes) -> None:
    """Write a file under another name and rename it when it is complete. All users may read it, because a cache can be
    shared."""
    unfinished = f"{name}.{os.urandom(8).hex()}"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(unfinished, dir_fd=folder)
        raise


# ---------------------------------------------------------------- how much
def _limit() -> int:
    """Most bytes of a folder's entries: FASTATTN_CACHE_MB, or LIMIT_MB."""
    text = os.environ.get("FASTATTN_CACHE_MB", str(LIMIT_MB))
    if not text.isdecimal():
        _warn_once("limit", f"FASTATTN_CACHE_MB is {text!r}; expected a number of megabytes. {LIMIT_MB} are used.")
        text = str(LIMIT_MB)
    return int(text) * 1_000_000


def _listed(folder: int, pattern: re.Pattern[str]) -> list[Entry]:
    """The files of a folder whose name matches. Links do not count."""
    listing, found = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder), list[Entry]()
    try:
        with os.scandir(listing) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):    # another process removes, too
                    if pattern.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                        status = file.stat(follow_symlinks=False)
                        found.append(Entry(file.name, status.st_size, status.st_mtime))
    finally:
        os.close(listing)
    return found


def _remove(folder: int, entry: Entry) -> None:
    """Remove an entry. A process that has it open can still read it."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(entry.name, dir_fd=folder)


def _remove_oldest(folder: int, limit: int) -> None:
    """Remove entries, least recently used first, until `limit` bytes are left, and unfinished ones of processes that
    were killed."""
    for entry in _listed(folder, UNFINISHED):
        if time.time() - entry.used > HOUR:
            _remove(folder, entry)
    entries = sorted(_listed(folder, ENTRY), key=lambda entry: entry.used)
    size = sum(entry.size for entry in entries)
    for entry in entries:
        if size <= limit:
            break
        _remove(folder, entry)
        size -= entry.size


def entries(path: Path) -> list[Entry]:
    """Entries of one folder, none if it does not exist. OSError: it cannot be read; RefusedError: it is refused."""
    try:
        with _opened(path) as folder:
            return _listed(folder, ENTRY)
    except FileNotFoundError:
        return []


def labels(path: Path) -> list[tuple[Entry, str]]:
    """The entries of one folder, last used first, with their labels: "" for one that this version cannot read. Raises what
    `entries` raises."""
    try:
        with _opened(path) as folder:
            found = sorted(_listed(folder, ENTRY), key=lambda entry: -entry.used)
            return [(entry, _label(folder, entry)) for entry in found]
    except FileNotFoundError:
        return []


def _label(folder: int, entry: Entry) -> str:
    with contextlib.suppress(OSError):      # removed meanwhile, or another user's: no kernel is loaded here
        descriptor = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with open(descriptor, "rb") as file:
            header = file.read(HEADER.size)
            if len(header) == HEADER.size and header.startswith(MAGIC):
                return file.read(min(HEADER.unpack(header)[4], LONGEST_LABEL)).decode(errors="replace")
    return ""


def clear(path: Path) -> list[Entry]:
    """Remove all entries of one folder, unfinished ones too, and nothing else. Returns what was removed. Raises what
    `entries` raises."""
    try:
        with _opened(path) as folder:
            found = _listed(folder, ENTRY)
            for entry in (*found, *_listed(folder, UNFINISHED)):
                _remove(folder, entry)
            return found
    except FileNotFoundError:
        return []


def refusal(path: Path) -> str | None:
    """None, or why a folder is not used."""
    try:
        entries(path)
    except OSError as error:
        return str(error)
    return None


def described() -> str:
    """The folders in their order, with the reason if one is not used."""
    return ", then ".join(f"{path} (not used: {why})" if (why := refusal(path)) else str(path) for path in folders())
