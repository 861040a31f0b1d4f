"""What frozen networks say of every image, computed once: latents' moments, embeddings, encoded captions.

A cache is a folder of safetensors files of some hundred rows each, and `cache.json`, which says what was cached of
what. It is written part by part, so an interrupted one goes on; a row without its image (it could not be read) is not
in it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unclip_jax.checkpoints.atomic import replaced_file
from unclip_jax.checkpoints.strict_json import read_object
from unclip_jax.distributed.mesh import pad_batch
from unclip_jax.progress import Progress
from unclip_jax.training.data import stacked

T = TypeVar("T")
FACTS = "cache.json"


def write_cache(
    folder: Path,
    records: Sequence[T],
    load: Callable[[T], Mapping[str, Any] | None],
    encode: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]],
    facts: Mapping[str, Any],
    *,
    batch_size: int = 32,
    part_rows: int = 256,
    progress: bool = True,
) -> None:
    """Encodes every record into a folder; parts that are there already are left alone.

    load: a record -> its row, None for one to leave out. encode: a batch -> what is kept of it, arrays with the same
    rows; the last batch of a part is filled up with its last row, so that encode is compiled once. facts: what the
    cache was made of, JSON types. Raises ValueError where the folder holds a cache with other facts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**facts, "records": len(records), "part_rows": part_rows}
    if (folder / FACTS).exists():
        if (there := read_object(folder / FACTS)) != json.loads(json.dumps(facts)):
            odd = sorted(key for key in {*there, *facts} if there.get(key) != facts.get(key))
            raise ValueError(f"{folder}: holds a cache of something else ({', '.join(odd)} differ); choose another")
    else:
        with replaced_file(folder / FACTS) as partial:
            partial.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    with Progress("caching", len(records), unit="image", enabled=progress) as bar:
        for number, first in enumerate(range(0, len(records), part_rows)):
            chosen = records[first : first + part_rows]
            path = folder / f"part-{number:05d}.safetensors"
            if not path.exists():
                rows = [row for record in chosen if (row := load(record)) is not None]
                encoded = [
                    _encoded(rows[i : i + batch_size], encode, batch_size) for i in range(0, len(rows), batch_size)
                ]
                arrays = {name: np.concatenate([e[name] for e in encoded]) for name in encoded[0]} if encoded else {}
                with replaced_file(path) as partial:
                    save_file(arrays, partial)
            bar.update(len(chosen))


def _encoded(rows: list[Mapping[str, Any]], encode: Any, batch_size: int) -> dict[str, np.ndarray]:
    batch = pad_batch(stacked(rows), batch_size)
    return {name: np.ascontiguousarray(np.asarray(value)[: len(rows)]) for name, value in encode(batch).items()}


class CachedRows(Sequence[dict[str, np.ndarray]]):
    """The rows of a cache, read one by one from its files. Raises ValueError for a cache that is not whole."""

    def __init__(self, folder: Path):
        folder = Path(folder)
        facts = read_object(folder / FACTS)
        count = -(-facts["records"] // facts["part_rows"])
        self._files, self._places = [], []
        for number in range(count):
            path = folder / f"part-{number:05d}.safetensors"
            try:
                file = safe_open(path, framework="numpy")
                names = sorted(file.keys())
                rows = file.get_slice(names[0]).get_shape()[0] if names else 0
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a whole part of a cache: {error}") from error
            self._files.append((file, names))
            self._places += [(number, row) for row in range(rows)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        number, row = self._places[index]
        file, names = self._files[number]
        return {name: file.get_slice(name)[row] for name in names}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[index] for index in range(len(self)))
