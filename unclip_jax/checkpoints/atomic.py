"""Files and directories that are either complete or absent: written under a temporary name, synced, then renamed.

A killed run leaves a hidden directory or file `.NAME.partial-PID` beside its destination. It is seen from a lock that
it is abandoned: the next run for the same destination removes such a directory, `remove_abandoned` such files.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = re.compile(r"\..+\.partial-\d+")
MOVED = ".moved"  # in a temporary directory: lists the files that are moved out of it before the last one


@contextlib.contextmanager
def atomic_directory(destination: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `destination` if the block succeeds, and is removed otherwise.

    What killed runs left behind is removed first.

    Args:
        destination: The directory to create.

    Raises:
        FileExistsError: `destination` exists.
    """
    with _temporary(destination, ()) as partial:
        yield partial
        _sync(partial)
        _require_absent(destination)
        os.rename(partial, destination)


@contextlib.contextmanager
def atomic_files(destination: Path, *beside: Path) -> Iterator[Path]:
    """Yields a temporary directory for files with these names, all of which the block must write.

    Args:
        destination: The file that is moved last.
        *beside: Files in the same folder that belong to `destination`. They are moved first, so that `destination` is
            never there without them. If a run is killed in between, the next one removes them.

    Raises:
        FileExistsError: One of the files exists.
    """
    with _temporary(destination, beside) as partial:
        yield partial
        (partial / MOVED).write_text("\n".join(path.name for path in beside), "utf-8")
        _sync(partial)
        try:
            for path in (*beside, destination):
                _require_absent(path)
                os.rename(partial / path.name, path)
        except BaseException:
            _take_back(partial, destination)
            raise
        _remove(partial)


@contextlib.contextmanager
def replaced_file(destination: Path) -> Iterator[Path]:
    """Yields a temporary path for a file that then replaces `destination`, whether or not that exists."""
    partial = destination.with_name(f"{_prefix(destination)}{os.getpid()}")
    try:
        with _locked(partial, os.O_CREAT):
            yield partial
            _sync_entry(partial)
            os.replace(partial, destination)
        _sync_entry(destination.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value of JSON types for people to read, whole or not at all, in the place of a file that is there."""
    with replaced_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def remove_abandoned(folder: str | os.PathLike[str], beginning: str = "") -> None:
    """Removes the temporary files that killed runs of `replaced_file` left in a folder, which need not be there.

    Nothing else may begin to write such files meanwhile: one that is just being made is not locked yet.

    Args:
        folder: Where they are; not those below it.
        beginning: Of the names of the files that were to be written.
    """
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            path = Path(folder, name)
            if PARTIAL.fullmatch(name) and name.startswith(f".{beginning}") and _abandoned(path):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary(destination: Path, beside: tuple[Path, ...]) -> Iterator[Path]:
    destination = destination.absolute()
    require_absent(destination, *beside)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.parent / f"{_prefix(destination)}{os.getpid()}"
    try:
        partial.mkdir()
        with _locked(partial):
            yield partial
        _sync_entry(destination.parent)
    except OSError as error:
        _remove(partial)
        if error.filename is None and error.errno is not None:  # from a write: which disk is full?
            raise type(error)(error.errno, error.strerror, str(destination)) from error
        raise
    except BaseException:
        _remove(partial)
        raise


def require_absent(destination: Path, *beside: Path) -> None:
    """Removes what killed runs for `destination` left behind, then checks that it is absent.

    Raises:
        FileExistsError: `destination` or a file beside it exists.
    """
    for leftover in _leftovers(destination):
        _take_back(leftover, destination)
        _remove(leftover)
    for path in (destination, *beside):
        _require_absent(path)


def _require_absent(path: Path) -> None:
    if os.path.lexists(path):  # a broken symlink too
        raise FileExistsError(f"{path} exists; choose another name or remove it")


def _prefix(destination: Path) -> str:
    return f".{destination.name}.partial-"


def _leftovers(destination: Path) -> list[Path]:
    """What killed runs left behind."""
    prefix = _prefix(destination)
    try:
        names = os.listdir(destination.parent)
    except OSError:
        return []
    found = [name for name in names if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()]
    return [path for path in map(destination.parent.joinpath, found) if _abandoned(path)]


def _take_back(partial: Path, destination: Path) -> None:
    """Removes the files that were moved out of `partial` ahead of `destination`, if `destination` is still in it."""
    if (partial / destination.name).exists() and (partial / MOVED).exists():
        for name in (partial / MOVED).read_text("utf-8").splitlines():
            if Path(name).name == name and not (partial / name).exists():
                destination.with_name(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[None]:
    """Holds a lock for as long as this process lives, which tells others that the path is in use.

    flags: of `os.open`. A file is made by it, so that it cannot be taken for abandoned, and be gone, before it is open.
    """
    descriptor = os.open(path, os.O_RDONLY | flags, 0o666)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        for _ in range(50):  # threads of a library that was interrupted may still be writing
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                return
            time.sleep(0.02)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Syncs everything in a directory to the disk, and then the directory's entries."""
    for path in folder.rglob("*"):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
