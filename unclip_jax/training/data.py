"""Training images from folders in Hugging Face's `imagefolder` convention, in an order determined by a seed.

Every host reads its own share of every batch. Where an iterator is, is a small mapping (`get_state`, `set_state`) that
is saved with a run, so that a resumed run neither repeats nor skips an image.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np

from unclip_jax.conditioning.clip_image import load_image
from unclip_jax.dataset_files import SUFFIXES, csv_rows, json_lines, points_outside, reason

T = TypeVar("T")

METADATA = ("metadata.jsonl", "metadata.csv")


class Record(NamedTuple):
    """An image that is not loaded yet: its file, its text ("" without), and the other columns of its metadata.

    Attributes:
        path: The file.
        text: The caption.
        columns: The other metadata.
        place: (offset, size) within the file; None for the whole file.
        key: The image's name within the file.
        folder: What file names in the columns begin from; None where there are no such files.
    """

    path: Path
    text: str
    columns: Mapping[str, Any]
    place: tuple[int, int] | None = None
    key: str = ""
    folder: Path | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.key}" if self.key else str(self.path)

    def read(self) -> bytes:
        """The image's stored bytes."""
        with self.path.open("rb") as file:
            if self.place is None:
                return file.read()
            file.seek(self.place[0])
            return file.read(self.place[1])


class Skipped:
    """The images that could not be read, by name and reason. A run continues without them and reports them."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)


def image_folder(folder: Path) -> list[Record]:
    """The images of a folder, in the order of their names, or of its metadata if there is any.

    `metadata.jsonl` or `metadata.csv` in the folder lists images as `file_name`, a path within it, with a `text` and
    any other columns. Without it every image in the folder and below is taken.

    Args:
        folder: The folder.

    Returns:
        The images.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The metadata is broken, repeats an image or points outside the folder. The message names file and
            line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder: no such folder: {folder}")
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder}: has {' and '.join(METADATA)}; want one of them")
    if not found:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        records = [Record(path, "", {}) for path in paths]
    else:
        read = json_lines if found[0].suffix == ".jsonl" else csv_rows
        with found[0].open(encoding="utf-8", newline="") as file:
            records = [_record(folder, row, where) for where, row in read(file, found[0].name)]
        paths = [record.path for record in records]
        if len(set(paths)) < len(paths):
            twice = next(path for index, path in enumerate(paths) if path in paths[:index])
            raise ValueError(f"{found[0].name}: {twice.name} is listed twice")
    if not records:
        raise ValueError(f"{folder}: holds no images")
    return records


def _record(folder: Path, row: Any, where: str) -> Record:
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise ValueError(f"{where}: has no file_name")
    name = row["file_name"]
    path = folder / name
    if points_outside(name):
        raise ValueError(f"{where}: file_name {name!r} points outside the folder")
    text = row.get("text") or ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: text is {text!r:.80}; want a string")
    columns = {key: value for key, value in row.items() if key not in ("file_name", "text")}
    return Record(path, text, columns, folder=folder)


def select(records: Sequence[Record], **ranges: tuple[float | None, float | None]) -> list[Record]:
    """The records whose columns lie in closed ranges: `select(records, p_unsafe=(None, 0.1), aesthetic=(4.5, None))`.

    Args:
        records: The records.
        **ranges: column -> (least, most); None leaves an end open.

    Returns:
        The records that fit.

    Raises:
        ValueError: A column is missing or is not a number. The message names image and column.
    """

    def fits(record: Record) -> bool:
        for column, (low, high) in ranges.items():
            try:
                value = float(record.columns[column])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{record}: column {column} is {record.columns.get(column)!r}; want a number"
                ) from error
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                return False
        return True

    return [record for record in records if fits(record)]


def load_rgb(record: Record) -> np.ndarray:
    """The image, (H, W, 3) uint8, as pipelines read it.

    Raises the errors of `unclip_jax.conditioning.clip_image.load_image`.
    """
    return load_image(record.read(), "image")


def named_image(record: Record, column: str) -> np.ndarray:
    """Another image of a record, (H, W, 3) uint8: the file that a column names.

    Args:
        record: The record.
        column: The column's name.

    Returns:
        The image.

    Raises:
        ValueError: The column names no file within the folder, or it is no image. FileNotFoundError: There is no such
            file.
    """
    name = record.columns.get(column)
    if record.folder is None or not isinstance(name, str) or points_outside(name):
        raise ValueError(f"column {column} is {name!r:.80}; want the name of an image file in the folder")
    return load_image(record.folder / name, column)


def stacked(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Examples as one batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def skipping(
    load: Callable[[T, np.random.Generator], Mapping[str, Any]], skipped: Skipped
) -> Callable[[T, np.random.Generator], Mapping[str, Any] | None]:
    """`load`, but None for an image that cannot be read, which is added to `skipped`."""

    def row(record: T, rng: np.random.Generator) -> Mapping[str, Any] | None:
        try:
            return load(record, rng)
        except (OSError, ValueError) as error:
            skipped.reasons[str(record)] = reason(error)
            return None

    return row


class Batches:
    """An endless iterator of batches, and where it is in the order of images."""

    def __init__(self, rows: Any, batch_size: int, host: int, hosts: int):
        self.rows, self.batch_size, self.host, self.hosts = rows, batch_size, host, hosts

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch: dict[str, np.ndarray] = next(self.rows)
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where this host is, in JSON types."""
        state: dict[str, Any] = self.rows.get_state()
        return state

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Goes to where the hosts of a run were, given the state of each.

        As many hosts as these are where they were. Another number begins with the batch of the host that was least
        far: no image is skipped. Where all images can be read, all hosts are as far, and none is repeated either.
        """
        if len(states) == self.hosts:
            self.rows.set_state(dict(states[self.host]))
            return
        done = min(state["next_index"] for state in states) * len(states) // (self.batch_size * self.hosts)
        self.rows.set_state({"next_index": done * self.batch_size})


def batches(
    records: Sequence[T],
    load: Callable[[T, np.random.Generator], Mapping[str, Any]],
    *,
    batch_size: int,
    seed: int,
    host: int = 0,
    hosts: int = 1,
    threads: int = 4,
    skipped: Skipped | None = None,
) -> Batches:
    """An endless iterator of batches; every pass is in another order.

    The batches of all hosts, one after the other, are the batch of a single one that takes as many images as they do
    together (as long as all can be read).

    Args:
        records: What to load.
        load: (record, its random generator for this pass) -> one example: arrays and numbers of the same shape for all.
            OSError and ValueError from it skip the record, which is added to `skipped`.
        batch_size: Examples per batch.
        seed: Determines the order.
        host: This machine's index; each machine with the same seed reads its own part of every batch.
        hosts: The number of machines.
        threads: The number of images read at a time. It does not affect the order.
        skipped: Collects what could not be read.

    Returns:
        An iterator of mappings of arrays, with `batch_size` along the first axis.

    Raises:
        ValueError: There are fewer records than the batch of all hosts.
    """
    if not 0 <= host < hosts:
        raise ValueError(f"host is {host}; want 0 to {hosts - 1}")
    if batch_size < 1 or len(records) < hosts * batch_size:
        each = f" on each of {hosts} hosts" if hosts > 1 else ""
        raise ValueError(f"batch_size is {batch_size}{each}; there are only {len(records)} images")
    skipped = Skipped() if skipped is None else skipped

    load_or_skip = skipping(load, skipped)

    def row(record: T, rng: np.random.Generator) -> Mapping[str, Any] | None:
        made = load_or_skip(record, rng)
        if made is None and len(skipped) >= len(records):
            raise ValueError(f"no image can be read; {record}: {skipped.reasons[str(record)]}")
        return made

    order = grain.MapDataset.source(list(records)).shuffle(seed=seed).repeat().seed(seed).random_map(row)

    def mine(number: int) -> Any:
        batch, place = divmod(number, batch_size)
        return order[(batch * hosts + host) * batch_size + place]

    share = grain.MapDataset.range(sys.maxsize).map(mine)
    rows = share.to_iter_dataset(grain.ReadOptions(num_threads=threads)).filter(lambda made: made is not None)
    return Batches(iter(rows.batch(batch_size, drop_remainder=True)), batch_size, host, hosts)
