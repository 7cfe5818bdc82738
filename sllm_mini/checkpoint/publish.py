"""All or nothing: a directory is written under a hidden name beside its target and appears in one rename.

A reader sees a whole directory or none; a writer that dies leaves only a hidden directory, which the next writer of
the same target removes. Linux only (renameat2). Not safe for two threads on one target; two processes may race: one
wins, the other gets CheckpointExistsError. Taught in chapter 01.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sllm_mini.errors import CheckpointExistsError, WriteError

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_MARKS = ("index.json", "config.json")  # what a checkpoint and a Hugging Face directory hold
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def publish(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty hidden directory beside `target`; when the body ends well, it becomes `target`, fsynced.

    With `overwrite`, an existing directory is exchanged atomically and then removed, if it is empty or holds a model or
    a checkpoint: a mistyped path costs nobody a home directory. If the body raises, nothing of it stays. Raises
    CheckpointExistsError if `target` exists and may not be replaced, WriteError (with the reason) for everything the
    file system refuses, a full disk included.
    """
    path = Path(os.path.abspath(target))
    check_target(path, overwrite)
    work: Path | None = None
    lock = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        while work is None:
            work, lock = _begin(path)
        yield work
        work.chmod(0o777 & ~_umask())
        _sync_tree(work)
        _rename(work, path, overwrite)
        work = work if os.path.lexists(work) else None  # after an exchange: the directory that was replaced
        _sync(path.parent)
    except OSError as error:
        raise WriteError(f"it cannot be written: {error.strerror or error}", path=error.filename or path) from error
    finally:
        if work is not None:
            _remove(work)
        if lock >= 0:
            os.close(lock)


def check_target(target: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises CheckpointExistsError if `publish` would refuse `target`, WriteError if it cannot be looked into."""
    path = Path(os.path.abspath(target))
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CheckpointExistsError("it exists already; choose another path or ask to overwrite it", path=path)
    if path.is_symlink() or not path.is_dir():
        raise CheckpointExistsError("it is not a directory and is not replaced; choose another path", path=path)
    try:
        held = os.listdir(path)
    except OSError as error:
        raise WriteError(f"it cannot be looked into: {error.strerror}", path=path) from error
    if held and not any(name in _MARKS or name.endswith(".safetensors") for name in held):
        raise CheckpointExistsError("it holds something other than a model and is not replaced; choose another path", path=path)


def keep_source(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raises CheckpointExistsError if overwriting `target` would delete `source`, from which it is to be made."""
    origin, path = os.path.realpath(source), os.path.realpath(target)
    if os.path.commonpath((origin, path)) == path:
        raise CheckpointExistsError("overwriting it would delete what it is to be made from; choose another path", path=path)


def _hidden_prefix(path: Path) -> str:
    return f".{path.name}.writing-"


def _begin(path: Path) -> tuple[Path | None, int]:
    """A hidden directory and a descriptor that holds its lock, which tells later writers that this one is alive; or
    (None, -1) if such a writer took the directory for an abandoned one before it was locked."""
    work = Path(tempfile.mkdtemp(prefix=_hidden_prefix(path), dir=path.parent))
    try:
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None, -1
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(work):
            return work, lock
    except OSError:
        os.close(lock)
        os.rmdir(work)
        raise
    os.close(lock)
    return None, -1


def _remove_abandoned(path: Path) -> None:
    for entry in path.parent.glob(f"{glob.escape(_hidden_prefix(path))}*"):
        try:
            fd = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # not a directory of ours, or already gone
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its writer is alive
        else:
            _remove(entry)
        finally:
            os.close(fd)


def _remove(path: Path) -> None:
    # As far as it goes: what stays is hidden, and the next writer tries again. (rmtree ignores most errors, not all.)
    with suppress(OSError):
        shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    # Asking os.umask sets it, for a moment and for every thread of the process.
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1], 8) for line in file if line.startswith("Umask:"))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(path: Path) -> None:
    for folder, _, files in os.walk(path):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _rename(source: Path, target: Path, overwrite: bool) -> None:
    while True:
        exchange = overwrite and os.path.lexists(target)
        flags = _RENAME_EXCHANGE if exchange else _RENAME_NOREPLACE
        if _libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
            return
        code = ctypes.get_errno()
        if not overwrite or code != (errno.ENOENT if exchange else errno.EEXIST) or not os.path.lexists(source):
            break  # else another writer made or removed the target just now: look again
    if code == errno.EEXIST:
        raise CheckpointExistsError("another writer made it meanwhile; choose another path or ask to overwrite it", path=target)
    if code in (errno.EINVAL, errno.ENOSYS) and not exchange:
        os.rename(source, target)  # a file system without the flag; a directory never replaces a non-empty one
        return
    if code in (errno.EINVAL, errno.ENOSYS):
        raise WriteError("this file system cannot exchange two directories; delete the old one first", path=target)
    raise OSError(code, os.strerror(code), os.fspath(target))
