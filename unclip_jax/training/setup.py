"""What every task sets up from its settings: images, devices, the run, and the resulting checkpoint."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unclip_jax.checkpoints import directory
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import (
    CheckpointConfig,
    ClipConfig,
    ControlNetCheckpointConfig,
    TinyVAECheckpointConfig,
)
from unclip_jax.distributed.hosts import each, once
from unclip_jax.distributed.mesh import gathered, local_mesh
from unclip_jax.models.configs import AutoencoderTinyConfig, ControlNetConfig
from unclip_jax.training import reports
from unclip_jax.training.data import Record, Skipped, batches, image_folder, select
from unclip_jax.training.optimizer import adamw, learning_rate
from unclip_jax.training.run import Report, train
from unclip_jax.training.settings import DataSettings, TrainSettings
from unclip_jax.training.step import Losses, TrainState, start_training
from unclip_jax.training.webdataset import tar_samples

# (record, its random generator) -> its example.
Load = Callable[[Any, np.random.Generator], Mapping[str, Any]]


def training_records(data: DataSettings) -> list[Record]:
    """The images that the settings name and that pass the filters.

    Raises:
        ValueError: No image passes.
    """
    found = (
        image_folder(Path(data.image_folder))
        if data.image_folder is not None
        else tar_samples([Path(path) for path in data.tars or ()])
    )
    chosen = select(found, **{column: tuple(limits) for column, limits in data.filters.items()})
    if not chosen:
        raise ValueError(f"data.filters: none of {len(found)} images passes them")
    return chosen


def validation_records(data: DataSettings) -> list[Record]:
    """The images of the validation folder, as many as the settings ask for; none without a folder."""
    return (
        [] if data.validation_folder is None else image_folder(Path(data.validation_folder))[: data.validation_images]
    )


def examples_of(records: Sequence[Record], load: Load, seed: int) -> list[Mapping[str, Any]]:
    """The examples of some images, the same every time."""
    return [load(record, np.random.default_rng([seed, number])) for number, record in enumerate(records)]


def mesh_of(settings: TrainSettings) -> Mesh:
    """The devices of a run.

    Raises:
        ValueError: There are fewer devices, or they cannot share the batch evenly; or there are several hosts and not
            all devices are wanted.
    """
    devices = jax.devices()
    count = len(devices) if settings.devices is None else settings.devices
    least = 1 if jax.process_count() == 1 else len(devices)
    if not least <= count <= len(devices):
        raise ValueError(f"devices is {count}; want {least} to {len(devices)}")
    if settings.batch_size % count:
        raise ValueError(f"batch_size is {settings.batch_size}; want a multiple of the {count} devices")
    return local_mesh(devices[:count])


def run(
    settings: TrainSettings,
    losses: Losses,
    params: Mapping[str, jax.Array],
    records: Sequence[Any],
    load: Load,
    mesh: Mesh,
    progress: bool,
    **hooks: Any,
) -> TrainState:
    """Trains to the end by the settings, and reports skipped images. hooks: `validate` and `samples`."""
    o, folder = settings.optimizer, Path(settings.out)
    rate = learning_rate(o.learning_rate, o.warmup_steps, o.decay, settings.run.total_steps // o.accumulate)
    optimizer = adamw(
        rate,
        betas=(o.betas[0], o.betas[1]),
        eps=o.eps,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
        accumulate=o.accumulate,
    )
    hosts = jax.process_count()
    skipped = Skipped()
    data = batches(
        records,
        load,
        batch_size=settings.batch_size // hosts,
        seed=settings.seed,
        host=jax.process_index(),
        hosts=hosts,
        threads=settings.data.threads,
        skipped=skipped,
    )
    state = train(
        losses,
        optimizer,
        start_training(dict(params), optimizer),
        data,
        folder,
        settings.run,
        mesh=mesh,
        reports=[_report(name, folder) for name in settings.reports] if jax.process_index() == 0 else [],
        progress=progress,
        **hooks,
    )
    reasons = {name: reason for of_host in each(skipped.reasons) for name, reason in of_host.items()}
    if reasons and jax.process_index() == 0:
        (folder / "skipped.txt").write_text("".join(f"{n}: {r}\n" for n, r in reasons.items()), "utf-8")
        print(f"{len(reasons)} images could not be read and were skipped: {folder / 'skipped.txt'}")
    return state


def _report(name: str, folder: Path) -> Report:
    if name == "tensorboard":
        return reports.tensorboard(folder / "tensorboard")
    # One run of the service for one folder, also where it goes on.
    return reports.wandb(
        name.removeprefix("wandb:"), id=f"{folder.name}-{zlib.crc32(str(folder.absolute()).encode()):08x}"
    )


def averages(state: TrainState) -> dict[str, np.ndarray]:
    """The EMA weights of a run, on every host."""
    assert state.average is not None
    whole: dict[str, np.ndarray] = gathered(state.average.params)
    return whole


def save_checkpoint(
    base: Checkpoint,
    config: CheckpointConfig | ClipConfig,
    networks: Mapping[str, Mapping[str, Any]],
    destination: Path,
) -> None:
    """Writes a checkpoint in which these networks' weights replace the base's. Does not overwrite.

    Of several hosts the first writes it, and the others wait.
    """
    params = {**base.params, **_parameters(networks)}
    _write(Checkpoint(config, base.tokenizer, params, base.source), destination)


def save_controlnet(base: Checkpoint, config: ControlNetConfig, weights: Mapping[str, Any], destination: Path) -> None:
    """Writes a ControlNet that was trained beside a checkpoint, as `save_checkpoint` does."""
    params = _parameters({"controlnet": weights})
    _write(Checkpoint(ControlNetCheckpointConfig(config), None, params, base.source), destination)


def save_tiny_vae(
    base: Checkpoint, config: AutoencoderTinyConfig, weights: Mapping[str, Any], destination: Path
) -> None:
    """Writes a tiny autoencoder that was trained beside a checkpoint, likewise."""
    _write(Checkpoint(TinyVAECheckpointConfig(config), None, _parameters({"vae": weights}), base.source), destination)


def _parameters(networks: Mapping[str, Mapping[str, Any]]) -> dict[str, Parameter]:
    return {
        f"{part}.{name}": Parameter.of(value) for part, weights in networks.items() for name, value in weights.items()
    }


def _write(trained: Checkpoint, destination: Path) -> None:
    def write() -> None:
        if not destination.exists():
            directory.save(trained, destination, provenance={"trained_from": Path(trained.source).name})

    once(write)
