"""Images in webdataset's tar files: members of one name but for its suffix are one sample, `0001.jpg` and `0001.txt`.

Only the tars' headers are read at first, so that samples can be shuffled over all tars and read one by one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from unclip_jax.dataset_files import SUFFIXES, Member, sample_columns, tar_members
from unclip_jax.training.data import Record


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
    samples: dict[str, dict[str, Member]] = {}
    with path.open("rb") as file:
        for key, suffix, member in tar_members(file, path.stat().st_size, path.name):
            samples.setdefault(key, {})[suffix] = member
        found = [_record(path, file, key, members) for key, members in samples.items()]
    records = [record for record in found if record is not None]
    if not records:
        raise ValueError(f"{path.name}: holds no images")
    return records


def _record(path: Path, file: BinaryIO, key: str, members: dict[str, Member]) -> Record | None:
    image = next((members[suffix] for suffix in SUFFIXES if suffix in members), None)
    if image is None:
        return None
    columns = sample_columns(file, path.name, members)
    text = columns.get("text", columns.get("caption", ""))
    if not isinstance(text, str):
        raise ValueError(f"{path.name}: {members['.json'].name}: text is {text!r:.80}; want a string")
    rest = {name: value for name, value in columns.items() if name not in ("text", "caption")}
    return Record(path, text.strip(), rest, (image.offset, image.size), key)
