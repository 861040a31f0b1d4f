"""Images in webdataset's tar files: members of one name but for its suffix are one sample, `0001.jpg` and `0001.txt`.

Only the tars' headers are read at first, so that samples can be shuffled over all tars and read one by one.
"""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip_jax.training.data import SUFFIXES, Record

MAX_TEXT_BYTES = 1 << 20


def tar_samples(paths: Sequence[Path]) -> list[Record]:
    """The samples of tar files, in their order.

    A sample is an image, the text of `.txt` or of "text" or "caption" in `.json`, and the other entries of `.json` as
    columns. Samples without an image are left out.

    Args:
        paths: The tar files.

    Returns:
        The images.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A tar is broken, compressed (its members cannot be found without unpacking all), or holds no image.
            The message names it.
    """
    return [record for path in paths for record in _samples(Path(path))]


def _samples(path: Path) -> list[Record]:
    if not path.is_file():
        raise FileNotFoundError(f"tars: no such file: {path}")
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                # The name ends at the first point of the last part, as webdataset has it: "a.b/0001.seg.png".
                folder, _, last = member.name.rpartition("/")
                stem, point, suffix = last.partition(".")
                if member.isreg() and stem and point:
                    members.setdefault(f"{folder}/{stem}", {})[f".{suffix.lower()}"] = member
            if path.stat().st_size - tar.offset < tarfile.BLOCKSIZE:  # of zeros, after the last member
                raise tarfile.ReadError("cut off")
            found = [_record(path, file, key, parts) for key, parts in members.items()]
    except tarfile.TarError as error:
        raise ValueError(f"{path.name}: not an uncompressed tar: {error}") from error
    records = [record for record in found if record is not None]
    if not records:
        raise ValueError(f"{path.name}: holds no images")
    return records


def _record(path: Path, file: Any, key: str, parts: dict[str, tarfile.TarInfo]) -> Record | None:
    image = next((parts[suffix] for suffix in SUFFIXES if suffix in parts), None)
    if image is None:
        return None

    def read(suffix: str) -> str:
        member = parts[suffix]
        if member.size > MAX_TEXT_BYTES:
            raise ValueError(f"{path.name}: {member.name} has {member.size} bytes; want at most {MAX_TEXT_BYTES}")
        file.seek(member.offset_data)
        try:
            return file.read(member.size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name}: {member.name}: {error}") from error

    columns: dict[str, Any] = {}
    if ".json" in parts:
        try:
            columns = json.loads(read(".json"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name}: {parts['.json'].name}: not JSON: {error}") from error
        if not isinstance(columns, dict):
            raise ValueError(f"{path.name}: {parts['.json'].name}: want an object")
    given = read(".txt") if ".txt" in parts else columns.get("text", columns.get("caption", ""))
    if not isinstance(given, str):
        raise ValueError(f"{path.name}: {parts['.json'].name}: text is {given!r:.80}; want a string")
    rest = {name: value for name, value in columns.items() if name not in ("text", "caption")}
    return Record(path, given.strip(), rest, (image.offset_data, image.size), key.removeprefix("/"))
