"""A cache of what frozen networks compute for every image: latents' moments, embeddings, encoded captions.

A cache is a folder of safetensors files with a few hundred examples each, and `cache.json`, which records what was
cached from what. It is written part by part, so an interrupted one resumes. An image that could not be read is left
out. Several hosts share the folder: all encode, and the first writes.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unclip_jax.checkpoints.atomic import replaced_file, write_json
from unclip_jax.checkpoints.strict_json import read_object
from unclip_jax.distributed.hosts import once
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
    part_examples: int = 256,
    progress: bool = True,
) -> None:
    """Encodes every record into a folder; parts that are already there are left alone.

    Args:
        folder: The cache's folder.
        records: What to encode.
        load: A record -> its example; None leaves it out.
        encode: A batch -> the arrays to keep, with the same first axis. The last batch of a part is filled up with its
            last example, so that encode is compiled once.
        facts: What the cache is made from, in JSON types.
        batch_size: Examples per batch.
        part_examples: Examples per part.
        progress: Show a progress bar.

    Raises:
        ValueError: The folder holds a cache with other facts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**facts, "records": len(records), "part_examples": part_examples}
    if once((folder / FACTS).exists):
        if (there := read_object(folder / FACTS)) != json.loads(json.dumps(facts)):
            odd = sorted(key for key in {*there, *facts} if there.get(key) != facts.get(key))
            raise ValueError(f"{folder}: holds another cache ({', '.join(odd)} differ); choose another folder")
    else:
        once(functools.partial(write_json, folder / FACTS, facts))
    with Progress("caching", len(records), unit="image", enabled=progress) as bar:
        for number, first in enumerate(range(0, len(records), part_examples)):
            chosen = records[first : first + part_examples]
            path = folder / f"part-{number:05d}.safetensors"
            if not once(path.exists):
                rows = [row for record in chosen if (row := load(record)) is not None]
                encoded = [
                    _encoded(rows[i : i + batch_size], encode, batch_size) for i in range(0, len(rows), batch_size)
                ]
                arrays = {name: np.concatenate([e[name] for e in encoded]) for name in encoded[0]} if encoded else {}
                once(functools.partial(_write_part, path, arrays))
            bar.update(len(chosen))


def _write_part(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with replaced_file(path) as partial:
        save_file(arrays, partial)


def _encoded(rows: list[Mapping[str, Any]], encode: Any, batch_size: int) -> dict[str, np.ndarray]:
    batch = pad_batch(stacked(rows), batch_size)
    return {name: np.ascontiguousarray(np.asarray(value)[: len(rows)]) for name, value in encode(batch).items()}


class CachedExamples(Sequence[dict[str, np.ndarray]]):
    """The examples of a cache, read one by one from its files.

    Raises:
        ValueError: The cache is incomplete.
    """

    def __init__(self, folder: Path):
        folder = Path(folder)
        facts = read_object(folder / FACTS)
        count = -(-facts["records"] // facts["part_examples"])
        self._files, self._places = [], []
        for number in range(count):
            path = folder / f"part-{number:05d}.safetensors"
            try:
                file = safe_open(path, framework="numpy")
                names = sorted(file.keys())
                rows = file.get_slice(names[0]).get_shape()[0] if names else 0
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: a broken part of a cache: {error}") from error
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
