"""Files and directories that are whole or not there: written under a temporary name, synced, renamed."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_directory(destination: Path) -> Iterator[Path]:
    """A temporary directory that becomes `destination` when the block ends well, and vanishes when it does not.

    Raises FileExistsError when `destination` exists. What earlier runs left behind when they were killed is removed.
    """
    with _partial(destination) as partial:
        partial.mkdir()
        with _locked(partial):
            yield partial
            _sync(partial)


@contextlib.contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """As `atomic_directory`, for a file: an empty one to write into, which becomes `destination`."""
    with _partial(destination) as partial:
        partial.touch(exist_ok=False)
        with _locked(partial):
            yield partial
            _sync(partial)


@contextlib.contextmanager
def _partial(destination: Path) -> Iterator[Path]:
    destination = destination.absolute()
    if destination.exists():
        raise FileExistsError(f"{destination} exists; choose another name or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.partial-"
    for leftover in destination.parent.glob(f"{prefix}*"):
        if _abandoned(leftover):
            _remove(leftover)
    partial = destination.parent / f"{prefix}{os.getpid()}"
    try:
        yield partial
        os.rename(partial, destination)
        _sync(destination.parent)
    except BaseException:
        _remove(partial)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock for as long as this process lives: by it others see that the path is in use."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
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
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
