"""What a bulk job has written, so that two jobs can be compared."""

import json

import pyarrow.parquet


def files(folder):
    """Every file under its name: its bytes, but of manifests the records, without the time that they took."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name.startswith("manifest/") and path.suffix == ".parquet":
            found[name] = without_seconds(pyarrow.parquet.read_table(path).to_pylist())
        elif name.startswith("manifest/") and path.suffix == ".jsonl":
            found[name] = without_seconds(map(json.loads, path.read_text("utf-8").splitlines()))
        else:
            found[name] = path.read_bytes()
    return found


def without_seconds(records):
    return [{**record, "seconds": None} for record in records]


def records(folder):
    """The records of a job's manifest, as JSON lines have them."""
    paths = sorted(folder.glob("manifest/*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]
