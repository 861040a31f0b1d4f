"""What a bulk job is. It stands in the folder that the job writes to, and only the same job goes on there."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from unclip_jax import __version__
from unclip_jax.bulk.rows import argument_names
from unclip_jax.bulk.store import Store
from unclip_jax.pipelines.checks import MAX_IMAGES, check_integer
from unclip_jax.pipelines.pipeline import Pipeline

Format = Literal["png", "jpeg", "webp", "latents", "image_embeds"]
FILE = "job.json"
# Of the networks, so that other weights are told from these: small, and changed by every training.
TELLING = {"unet": "conv_out.kernel", "text_encoder": "final_layer_norm.scale", "vae": "decoder.conv_out.kernel"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is made of each row, and how it is kept. Two runs of equal jobs make equal files.

    Attributes:
        pipeline: its class's name. model: what tells its checkpoint and weights from others.
        settings: arguments of every call; a row's columns come before them.
        save: "png", "jpeg", "webp": pictures. "latents", "image_embeds": `.npy` files.
        shards: whether the files of a part are in one tar, as webdataset has it.
        batch_size: images at once. part_size: rows that are recorded together.
        names: columns of the input that are called otherwise.
        input: the input's name, as it was given.
    """

    pipeline: str
    model: str
    dtype: str
    settings: Mapping[str, Any]
    save: Format
    shards: bool
    batch_size: int
    part_size: int
    names: Mapping[str, str]
    input: str
    version: str = __version__


def describe(
    pipe: Pipeline,
    settings: Mapping[str, Any],
    *,
    save: Format,
    shards: bool,
    batch_size: int,
    part_size: int,
    names: Mapping[str, str],
    source: str,
) -> Job:
    """The job of a pipeline. Raises ValueError for what no row could be made with."""
    if {device.process_index for device in pipe.mesh.devices.flat} != {jax.process_index()}:
        raise ValueError("the pipeline has devices of other hosts; want this host's own, and `host` and `hosts`")
    if save not in get_args(Format):
        raise ValueError(f"save is {save!r}; accepted: {', '.join(get_args(Format))}")
    if save == "image_embeds" and pipe.config.image_encoder is None:
        raise ValueError("save is 'image_embeds', and this checkpoint has no image encoder")
    for name, value in (("batch_size", batch_size), ("part_size", part_size)):
        check_integer(name, value, 1, MAX_IMAGES)
    known = {field.name for field in dataclasses.fields(pipe.task.arguments)} - {"batch_size", "output_type"}
    if unknown := settings.keys() - known:
        raise ValueError(f"{', '.join(sorted(unknown))}: no argument of {type(pipe).__name__} that a job may have")
    if unknown := set(names.values()) - argument_names(pipe.task.arguments):
        raise ValueError(f"names: {', '.join(sorted(unknown))}: no argument of {type(pipe).__name__} for a column")
    return Job(
        pipeline=type(pipe).__name__,
        model=_fingerprint(pipe),
        dtype=jax.numpy.dtype(pipe.dtype).name,
        settings=settings,
        save=save,
        shards=shards,
        batch_size=batch_size,
        part_size=part_size,
        names=names,
        input=source,
    )


def begin(store: Store, job: Job) -> None:
    """Writes the job into its folder, or finds it there.

    Raises:
        ValueError: another job, or something else, is there.
    """
    said = json.loads(json.dumps(dataclasses.asdict(job), default=_plain, sort_keys=True))
    if not store.exists(FILE):
        if others := store.names():
            raise ValueError(f"{store.address}: holds {others[0]} and no {FILE}; want an empty folder, or one of a job")
        store.write(FILE, (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode())
        return
    store.remove_leftovers()  # a job.json that a killed process was writing
    try:
        found = json.loads(store.read(FILE))
    except ValueError as error:
        raise ValueError(f"{store.address}: {FILE} is not JSON: {error}") from error
    differs = [name for name in said if not isinstance(found, dict) or found.get(name) != said[name]]
    if differs:
        name = differs[0]
        was = found.get(name) if isinstance(found, dict) else found
        raise ValueError(
            f"{store.address}: holds another job: {name} is {was!r:.200} there, and {said[name]!r:.200} here; want "
            "another folder, or the same job"
        )


def _fingerprint(pipe: Pipeline) -> str:
    digest = hashlib.sha256(repr(pipe.config).encode())
    for network, name in TELLING.items():
        parameter = pipe.networks[network].params.get(name)
        if isinstance(parameter, jax.Array) and parameter.is_fully_addressable:  # those of free_networks are shapes
            digest.update(np.asarray(parameter, np.float32).tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """JSON of what settings may hold: arrays by their contents, other values by what they say of themselves."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | jax.Array) else repr(value)
