"""Files of any size anywhere: at a local path, or at an address that fsspec knows ("gs://b/x", "s3://", "memory://").

Local paths, `file://` among them, need no fsspec. Addresses may hold a secret: messages show them through `shown`.
"""

import contextlib
import glob
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from unclip_jax.checkpoints.atomic import replaced_file
from unclip_jax.conditioning.address import fetch, is_address, shown


class Entry(NamedTuple):
    """A file or a folder in a folder."""

    name: str
    is_folder: bool


def absolute(place: str | os.PathLike[str]) -> str:
    """A place that holds in every process: an absolute path, or an address, without a slash at its end.

    Raises:
        ValueError: fsspec knows no such kind of address.
        ModuleNotFoundError: fsspec, or the package of this kind of address, is missing. The message says which.
    """
    text = os.fspath(place)
    if text[:7].lower() == "file://":
        text = text[7:]
    if not is_address(text):
        return os.path.abspath(text)
    _opened(text)
    return text.rstrip("/") if not text.endswith("://") else text


def joined(folder: str, name: str) -> str:
    """The place of a file in a folder, by its name or its path from there."""
    if not is_address(folder):
        return os.path.join(folder, name)
    return f"{folder.removesuffix('/')}/{posixpath.normpath(name)}"


def folder_of(place: str) -> str:
    """The folder that a file is in."""
    return place.rpartition("/")[0] if is_address(place) else os.path.dirname(place)


def open_file(place: str) -> BinaryIO:
    """Opens a file for reading, in parts and by seeking.

    Raises:
        OSError: It cannot be opened; FileNotFoundError, where there is none.
    """
    if not is_address(place):
        return open(place, "rb")
    with _named(place):
        system, path = _opened(place)
        return system.open(path, "rb")


def read_file(place: str, part: tuple[int, int] | None = None) -> bytes:
    """The bytes of a file, or of a part of it.

    Addresses of `http`, `https` and data URIs are read as pictures are, within the limits of
    `unclip_jax.conditioning.address.fetch`.

    Args:
        place: Where it is.
        part: (offset, bytes). None: all.

    Returns:
        The bytes; fewer where the file ends before.

    Raises:
        OSError: It cannot be read; FileNotFoundError, where there is none.
    """
    if not is_address(place):
        with open(place, "rb") as file:
            if part is None:
                return file.read()
            file.seek(part[0])
            return file.read(part[1])
    if part is None and place.lower().startswith(("http://", "https://", "data:")):
        return fetch(place, "file")
    with _named(place):
        system, path = _opened(place)
        return system.cat_file(path) if part is None else system.cat_file(path, start=part[0], end=sum(part))


def write_file(place: str, data: bytes) -> None:
    """Writes a file, whole or not at all, in the place of one that is there.

    Local ones are written under a temporary name, synced and renamed; elsewhere it is one put, which object stores show
    when it is whole.

    Raises:
        OSError: It cannot be written.
    """
    if not is_address(place):
        local = Path(place)
        local.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(local) as partial:
            partial.write_bytes(data)
        return
    with _named(place):
        system, path = _opened(place)
        system.pipe_file(path, data)


def exists(place: str) -> bool:
    """Whether there is a file or a folder.

    Raises:
        OSError: The store does not say.
    """
    if not is_address(place):
        return os.path.exists(place)
    with _named(place):
        system, path = _listed(place)
        return system.exists(path)


def is_folder(place: str) -> bool:
    """Whether there is a folder: at an address, whether anything is below it.

    Raises:
        OSError: The store does not say.
    """
    if not is_address(place):
        return os.path.isdir(place)
    with _named(place):
        system, path = _listed(place)
        return system.isdir(path)


def entries(folder: str) -> list[Entry]:
    """What is in a folder, in any order. Links to folders are neither files nor folders, so that no way is endless.

    Raises:
        OSError: It cannot be listed; FileNotFoundError, where there is none.
    """
    if not is_address(folder):
        with os.scandir(folder) as found:
            return [
                Entry(entry.name, entry.is_dir(follow_symlinks=False))
                for entry in found
                if entry.is_file() or entry.is_dir(follow_symlinks=False)
            ]
    with _named(folder):
        system, path = _listed(folder)
        infos = [info for info in system.ls(path, detail=True) if info["name"].strip("/") != path.strip("/")]
        return [Entry(info["name"].rstrip("/").rpartition("/")[2], info["type"] == "directory") for info in infos]


def matching(pattern: str) -> list[str]:
    """The places that a pattern with `*`, `?` or `[...]` names, sorted.

    Raises:
        OSError: The store does not say.
    """
    if not is_address(pattern):
        return sorted(glob.glob(pattern))
    with _named(pattern):
        system, path = _listed(pattern)
        return sorted(system.unstrip_protocol(found) for found in system.glob(path))


def remove_file(place: str) -> None:
    """Removes a file, if there is one.

    Raises:
        OSError: It cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        if not is_address(place):
            os.unlink(place)
            return
        with _named(place):
            system, path = _opened(place)
            system.rm_file(path)


def like(error: Exception, message: str) -> OSError | ValueError:
    """An error with another message: of the same kind where that is Python's own, else an OSError."""
    if isinstance(error, ValueError):
        return ValueError(message)
    kind = type(error) if isinstance(error, OSError) and type(error).__module__ == "builtins" else OSError
    return kind(message)


def _opened(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in there. fsspec keeps file systems."""
    try:
        import fsspec.core
        from fsspec.registry import known_implementations
    except ImportError as error:
        raise ModuleNotFoundError(f"{shown(address)}: needs fsspec: pip install 'unclip-jax[bulk]'") from error
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        # "s3fs.S3FileSystem"; those of fsspec itself name in the error what they need
        package = known_implementations[address.partition("://")[0].lower()]["class"].partition(".")[0]
        hint = "" if package == "fsspec" else f": pip install {package}"
        raise ModuleNotFoundError(f"{shown(address)}: {error}{hint}") from error
    except ValueError as error:
        raise ValueError(f"{shown(address)}: {error}") from error


def _listed(address: str) -> tuple[Any, str]:
    """The same, without what the file system remembers of folders: others write there too."""
    system, path = _opened(address)
    system.invalidate_cache()
    return system, path


@contextlib.contextmanager
def _named(address: str) -> Iterator[None]:
    """Errors of the libraries below fsspec, of which few are OSErrors, as OSErrors that name the address."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(address)}: no such file") from None
    except ImportError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise like(error, f"{shown(address)}: {text}") from error
