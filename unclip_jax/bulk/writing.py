"""Records of rows, and the files that they tell of."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from unclip_jax.bulk import outputs
from unclip_jax.bulk.batches import Part
from unclip_jax.bulk.job import Job
from unclip_jax.bulk.making import Made
from unclip_jax.bulk.manifest import FAILED, MADE, PartRecords, Record
from unclip_jax.bulk.rows import PICTURES, Row, Stored
from unclip_jax.bulk.store import Store
from unclip_jax.conditioning.address import is_address, shown
from unclip_jax.pipelines.request import Request


def failed(row: Row, reason: str) -> Record:
    """The record of a row that cannot be made."""
    return {
        "row": row.number,
        "image": None,
        "status": FAILED,
        "reason": reason,
        "file": None,
        "sha256": None,
        "bytes": None,
        "seed": None,
        "index": None,
        "seconds": None,
        "recipe": None,
        "columns": row.others,
    }


def write(store: Store, job: Job, scheduler: str, part: Part, made: Made, number: int) -> Record:
    """Writes what image `number` of a row became, and returns its record. scheduler: the checkpoint's own.

    Raises OSError where the store refuses.
    """
    row, request = made.asked.row, made.asked.request
    assert request is not None
    keys = {"seed": int(request.seeds[number]), "index": int(request.indices[number])}
    given = {**job.settings, **row.values}
    used = {name: value for name, value in _used(request).items() if name not in given}
    recipe = {"scheduler": scheduler, **used, **_said(given), **keys}
    recipe |= {"pipeline": job.pipeline, "dtype": job.dtype, "version": job.version}
    data = outputs.encoded(job.save, made.values[number], recipe)
    name = outputs.file_name(job.save, row.number, number)
    if job.shards:
        store.write(staged(part.number, name), data)
    else:
        store.write(f"files/{part.number:06d}/{name}", data)
    return {
        "row": row.number,
        "image": number,
        "status": MADE,
        "reason": None,
        "file": f"{shard(part.number)}/{name}" if job.shards else f"files/{part.number:06d}/{name}",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        **keys,
        "seconds": round(made.seconds, 4),
        "recipe": recipe,
        "columns": row.others,
    }


def _used(request: Request[Any]) -> dict[str, Any]:
    """The steps and the guidance scale of a call, where nobody gave them: the checkpoint may have its own."""
    scales, solver = request.strengths.get("guidance_scale"), request.solver.recipe
    # Outside an interval the scale is 1, which the defaults are not below.
    used: dict[str, Any] = {"guidance_scale": 1.0 if scales is None else float(scales.max())}
    return used if solver is None else {**used, "num_inference_steps": solver.num_inference_steps}


def write_shard(store: Store, records: PartRecords) -> None:
    """Writes the tar of a part from what its batches left.

    The records in it are without seconds: whoever makes the part, and however often he is interrupted, the tar has the
    same bytes.
    """
    part = records.part.number
    names = {(r["row"], r["image"]): r["file"].rpartition("/")[2] for r in records.records if r["status"] == MADE}
    told = {(r["row"], r["image"]): {k: v for k, v in r.items() if k != "seconds"} for r in records.records}
    samples = ((names[key], store.read(staged(part, names[key])), told[key]) for key in sorted(names))
    store.write(shard(part), outputs.tar(samples))


def remove_leftovers(store: Store, part: int) -> None:
    """Removes the temporary files of a part that a killed process was writing.

    A part is made by one process, so nobody else writes files of these names meanwhile.
    """
    for folder in ("files", "working"):
        store.remove_leftovers(f"{folder}/{part:06d}")
    for folder in ("manifest", "shards"):
        store.remove_leftovers(folder, f"{part:06d}.")


def staged(part: int, name: str) -> str:
    """Where a file is until its shard is written."""
    return f"working/{part:06d}/{name}"


def shard(part: int) -> str:
    """The tar with the files of a part."""
    return f"shards/{part:06d}.tar"


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as a recipe has them, in the order of their names, whatever order they were given in.

    Of files and arrays it has what they are called, not what is in them.
    """
    recipe: dict[str, Any] = {}
    for name, value in sorted(values.items()):
        if name == "image":  # as recipes of single pictures have them
            recipe["images"] = [{"name": _short(one)} for one in (value if isinstance(value, list) else [value])]
        elif name == "controlnet":
            recipe[name] = [net.name for net in (value if isinstance(value, list | tuple) else [value])]
        else:
            recipe[name] = _short(value) if name in PICTURES or isinstance(value, Stored) else value
    return {name: value for name, value in recipe.items() if not isinstance(value, np.ndarray | jax.Array)}


def _short(value: Any) -> str | None:
    if isinstance(value, Stored):
        return shown(value.name) if is_address(value.name) else value.name
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else None
