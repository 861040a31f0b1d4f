"""The records of a job: one for each image, and for each row that could not be made.

While a part is worked on, each of its batches leaves a file in `working/`. When it is done, they become
`manifest/NNNNNN.jsonl` and `.parquet`, and at last `.json`, which says that the part is whole.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from unclip_jax.bulk.batches import Begun, Part
from unclip_jax.bulk.rows import fingerprint
from unclip_jax.bulk.store import Store

Record = dict[str, Any]
MADE, FAILED = "made", "failed"
# Of the parquet files. What differs from job to job is JSON there.
COLUMNS = {
    "row": "int64",
    "image": "int32",
    "status": "string",
    "reason": "string",
    "file": "string",
    "sha256": "string",
    "bytes": "int64",
    "seed": "int64",
    "index": "int64",
    "seconds": "float64",
    "recipe": "string",
    "columns": "string",
}


class Whole(NamedTuple):
    """What is said of a part that is done. failed: rows that could not be made."""

    rows: int
    images: int
    failed: int
    input: str


class PartRecords:
    """The records of a part that is worked on.

    Attributes:
        records: all that are written down.
        batches: how many batches wrote them.
    """

    def __init__(self, store: Store, part: Part):
        self.store, self.part = store, part
        self.digest = digest(part)
        self.folder = _working(part.number)
        self.records: list[Record] = []
        self.batches = 0
        for name in store.names(self.folder):
            if not name.endswith(".jsonl"):
                continue
            if name.rpartition("/")[2].partition("-")[0] != self.digest[:16]:
                raise _other_input(store, part)
            self.records += [json.loads(line) for line in store.read(name).decode().splitlines()]
            self.batches += 1

    @property
    def begun(self) -> Begun:
        """The part, with what is recorded of it."""
        return Begun(self.part, {record["row"] for record in self.records}, self.batches)

    def add(self, number: int, records: Sequence[Record]) -> None:
        """Writes down what a batch made. Its files have to be there."""
        self.records += records
        self.store.write(f"{self.folder}/{self.digest[:16]}-{number:06d}.jsonl", _lines(records))

    def complete(self) -> None:
        """Writes the manifest of the part, and removes what its batches left."""
        self.records.sort(key=lambda record: (record["row"], record["image"] or 0))
        name = f"manifest/{self.part.number:06d}"
        failed = sum(record["status"] == FAILED for record in self.records)
        whole = Whole(len(self.part.rows), len(self.records) - failed, failed, self.digest)
        self.store.write(f"{name}.parquet", _parquet(self.records))
        self.store.write(f"{name}.jsonl", _lines(self.records))
        self.store.write(f"{name}.json", (json.dumps(whole._asdict(), indent=2) + "\n").encode())
        clear(self.store, self.part.number)


def clear(store: Store, part: int) -> None:
    """Removes what the batches of a part left."""
    for name in store.names(_working(part)):
        store.remove(name)
    store.remove_folder(_working(part))


def whole(store: Store, part: Part) -> Whole | None:
    """What is said of a part, if it is done. Raises ValueError if it was a part of another input."""
    try:
        said = Whole(**json.loads(store.read(f"manifest/{part.number:06d}.json")))
    except FileNotFoundError:
        return None
    if said.input != digest(part):
        raise _other_input(store, part)
    return said


def digest(part: Part) -> str:
    """SHA-256 of what the rows of a part say."""
    return hashlib.sha256("".join(map(fingerprint, part.rows)).encode()).hexdigest()


def _working(part: int) -> str:
    return f"working/{part:06d}"


def _other_input(store: Store, part: Part) -> ValueError:
    first, last = part.rows[0].number, part.rows[-1].number
    return ValueError(
        f"{store.address}: was begun with another input: rows {first} to {last} are not those of this input; want "
        "another folder, or the same input"
    )


def _lines(records: Sequence[Record]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in records).encode()


def _parquet(records: Sequence[Record]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    rows = [
        record | {name: json.dumps(record[name], ensure_ascii=False, sort_keys=True) for name in ("recipe", "columns")}
        for record in records
    ]
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in COLUMNS.items()])
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
    return file.getvalue()
