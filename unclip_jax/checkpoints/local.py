"""The local path of a source: the path itself, or the hub's cache after a download."""

import os
from pathlib import Path

from unclip_jax.checkpoints.hub import download
from unclip_jax.checkpoints.places import place_of
from unclip_jax.conditioning.address import shown


def local_path(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    mirrors: bool = True,
) -> Path:
    """The local path of a source: a path as it is, or something on the hub after downloading it.

    Args:
        source: An existing path; a hub id, "owner/name"; the path of a file or folder below one; or an address of the
            hub, see `unclip_jax.checkpoints.places.place_of`.
        subfolder: A folder within the source.
        revision: On the hub, see `unclip_jax.checkpoints.hub.download`.
        variant: On the hub, likewise.
        mirrors: On the hub, likewise.

    Returns:
        The path of a file or folder.

    Raises:
        FileNotFoundError: There is nothing at the source.
        ValueError: The source is not one of these, or an argument has no meaning for it.
        OSError: As in `download`, with the same subclasses.
    """
    subfolder = (subfolder or "").strip("/")
    if subfolder and any(part in ("", ".", "..") for part in subfolder.split("/")):
        raise ValueError(f"subfolder is {subfolder!r}; want the name of a folder within the source")
    place = place_of(os.fspath(source))
    if place is not None:
        if revision is not None and place.revision not in (None, revision):
            raise ValueError(f"revision is {revision!r}, but {shown(os.fspath(source))} names {place.revision!r}")
        path = "/".join(part for part in (place.path, subfolder) if part)
        revision = place.revision if revision is None else revision
        try:
            return download(place.repo_id, path, revision=revision, variant=variant, mirrors=mirrors)
        except (FileNotFoundError, ConnectionError) as error:
            if place.path and str(place) == os.fspath(source):  # most often a path that is mistaken
                text = f"source: no such file or folder: {source}; nor is it had from the hub: {error}"
                raise type(error)(text) from error
            raise
    if revision is not None:
        raise ValueError(f"revision is {revision!r}, but {source} is a local path: only hub ids have revisions")
    whole = Path(source)
    if not whole.exists():
        raise FileNotFoundError(f"source: no such file or folder, and not a hub id (owner/name): {source}")
    if subfolder and not (whole / subfolder).is_dir():
        raise FileNotFoundError(f"subfolder: no such folder: {whole / subfolder}")
    return whole / subfolder


def file_beside(name: str, value: str | os.PathLike[str], otherwise: str = "") -> Path:
    """The path of a file that an option names, local or on the hub.

    Args:
        name: The option's name.
        value: What was given; for `clip_stats` it may also be a repository that has them.
        otherwise: Added to the message if there is no such file.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: As in `local_path`.
    """
    if Path(value).exists():
        return Path(value)
    if (place := place_of(os.fspath(value))) is None:
        raise FileNotFoundError(f"{name}: no such file: {value}{otherwise}")
    return local_path(value, subfolder="image_normalizer" if name == "clip_stats" and not place.path else None)
