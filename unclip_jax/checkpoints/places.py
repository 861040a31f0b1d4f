"""Ways to name something on the hub: an id, a path below an id, or an address as a browser shows it."""

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from unclip_jax.conditioning.address import shown

HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w(?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)
ORIGINAL_SUFFIXES = (".safetensors", ".ckpt")
FILE_SUFFIXES = (*ORIGINAL_SUFFIXES, ".pt", ".pth", ".bin", ".th", ".npz", ".yaml", ".json")
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# Before NAME/TAG of one of open_clip's published models.
OPEN_CLIP = "open_clip:"
# Between a repository's address and a revision; of these the first four go on with a path.
ROUTES = ("resolve", "blob", "raw", "tree", "commit", "commits")
OTHER_KINDS = ("datasets", "spaces", "buckets", "collections", "papers", "blog", "docs", "api")
# Branches of the hub's own whose names have slashes, as in refs/pr/1.
REFS = ("refs", ("pr", "convert"))


class HubPlace(NamedTuple):
    """A repository on the hub, or a file or folder in it.

    Attributes:
        repo_id: "owner/name".
        path: The file or folder; "" for the whole repository.
        revision: A branch, tag or commit, if one is named.
    """

    repo_id: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.path}" if self.path else self.repo_id


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, "owner/name", and is neither an existing path nor named like a file."""
    named_like_a_file = text.lower().endswith(FILE_SUFFIXES)
    return bool(HUB_ID.fullmatch(text)) and not named_like_a_file and not os.path.lexists(text)


def place_of(text: str) -> HubPlace | None:
    """The place on the hub that a text names; None for an existing path and for other texts.

    Args:
        text: "owner/name"; "owner/name/" and the path of a file or folder in it; or an address at the hub, or at
            HF_ENDPOINT, of a repository or of something in it (`.../resolve/REVISION/PATH`, `.../blob/...`,
            `.../tree/...`), with or without "https://". Its query is ignored.

    Returns:
        The place, or None.

    Raises:
        ValueError: The address is at another host, or is not of a model.
    """
    if os.path.lexists(text):
        return None
    below = _below_the_hub(text)
    if below is not None:
        return _at_address(below, text)
    if scheme := re.match(r"([a-z][a-z0-9+.-]*):/+(?:[^/]*@)?([^/?#]*)", text, re.IGNORECASE):
        if scheme[1].lower() not in ("http", "https"):
            raise ValueError(f"source is an address of {scheme[1]}://; want a path, a hub id or an address of the hub")
        raise ValueError(
            f"source is an address at {scheme[2]!r}, and only the hub's are fetched: download the file and give its "
            "path (a mirror of the hub is named by HF_ENDPOINT)"
        )
    owner, _, rest = text.partition("/")
    name, _, path = rest.partition("/")
    if not path:
        return HubPlace(text) if is_hub_id(text) else None
    parts = path.split("/")
    if not HUB_ID.fullmatch(f"{owner}/{name}") or any(part in ("", ".", "..") for part in parts):
        return None
    return HubPlace(f"{owner}/{name}", path)


def cached_place(path: Path) -> HubPlace | None:
    """The place on the hub of which a path in huggingface_hub's cache is a copy; None for other paths."""
    match = re.search(r"/models--([^/]+)--([^/]+)/snapshots/([^/]+)(?:/(.+))?$", path.as_posix())
    if match is None or not HUB_ID.fullmatch(repo_id := f"{match[1]}/{match[2]}"):
        return None
    return HubPlace(repo_id, match[4] or "", match[3])


def _below_the_hub(text: str) -> str | None:
    """What follows the hub's own address in an address there, without its query; None for other texts."""
    from huggingface_hub import constants

    hub = "|".join(re.escape(host) for host in (*HOSTS, constants.ENDPOINT.partition("://")[2].rstrip("/")))
    match = re.fullmatch(rf"(?:https?:/+(?:[^/?#]*@)?)?(?:{hub})(?:/([^?#]*))?(?:[?#].*)?", text, re.IGNORECASE)
    return None if match is None else match[1] or ""


def _at_address(below: str, text: str) -> HubPlace:
    # Divided first: a slash within a part is written as %2F.
    parts = [unquote(part) for part in below.split("/") if part]
    repo_id, rest = "/".join(parts[:2]), parts[2:]
    if len(parts) < 2 or parts[0] in OTHER_KINDS or not HUB_ID.fullmatch(repo_id):
        raise ValueError(
            f"source is {shown(text)!r}, which is no address of a model; want https://huggingface.co/OWNER/NAME"
        )
    if not rest or rest[0] not in ROUTES:
        return HubPlace(repo_id, "/".join(rest))
    length = 3 if rest[1:2] == [REFS[0]] and rest[2:3] and rest[2] in REFS[1] else 1
    revision, path = "/".join(rest[1 : 1 + length]), "/".join(rest[1 + length :])
    if not revision:
        raise ValueError(f"source is {shown(text)!r}, which names no revision after {rest[0]!r}")
    return HubPlace(repo_id, path, revision)
