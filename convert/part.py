"""Replaces a checkpoint's UNet or VAE by another one, from a file or from any folder that has one."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

from convert import engine, layouts
from convert.architecture import diffusers
from convert.folder_weights import weights_file
from convert.kinds import kind_of
from convert.readers import CheckpointError, open_tensors
from convert.rules import diffusers as diffusers_names
from convert.tiny_vae import is_tiny_vae, open_tiny_vae
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter, family_config
from unclip_jax.checkpoints.config import CheckpointConfig, TinyVAECheckpointConfig
from unclip_jax.checkpoints.directory import is_directory_checkpoint, open_directory
from unclip_jax.checkpoints.networks import abstract_network, class_of

Part = Literal["unet", "vae"]


def with_part(checkpoint: Checkpoint, part: Part, path: Path, *, variant: str | None = None) -> Checkpoint:
    """A checkpoint with another UNet or VAE; it also holds the part's files open.

    Args:
        checkpoint: The open checkpoint.
        part: Which network to replace.
        path: A folder of diffusers' model or pipeline, a converted directory, or a file with the part's tensors, alone
            or among a checkpoint's, in any dialect. A file without a description must have the architecture of the
            checkpoint's own. A VAE may be a tiny autoencoder, see `convert.tiny_vae.open_tiny_vae`.
        variant: Of a diffusers folder's weights, such as "fp16".

    Returns:
        The checkpoint with the other part.

    Raises:
        CheckpointError: The part is something else, is incomplete, or does not fit the checkpoint.
    """
    config = family_config(checkpoint)
    with contextlib.ExitStack() as stack:
        other = _opened(stack, part, path, variant)
        if other is not None:
            tiny = part == "vae" and isinstance(other.config, TinyVAECheckpointConfig)
            settings = getattr(other.config if tiny else family_config(other), part)
            params = {name: p for name, p in other.params.items() if name.startswith(f"{part}.")}
        else:
            settings, file = _described(part, path, config, variant)
            params = _read(stack, part, settings, file)
        replaced = _fitting(config, part, settings, path.name)
        stack.push(checkpoint.resources.pop_all())
        return dataclasses.replace(
            checkpoint,
            config=replaced,
            params={**{n: p for n, p in checkpoint.params.items() if not n.startswith(f"{part}.")}, **params},
            files=(*checkpoint.files, path),
            resources=stack.pop_all(),
        )


def _opened(stack: contextlib.ExitStack, part: Part, path: Path, variant: str | None) -> Checkpoint | None:
    """A checkpoint that has the part, where it opens by itself; None for a part's own folder or file."""
    if path.is_dir() and is_directory_checkpoint(path):
        return stack.enter_context(open_directory(path))
    own = path / part if (path / "model_index.json").is_file() else path
    if part == "vae" and own.exists() and is_tiny_vae(own):
        return stack.enter_context(open_tiny_vae(path, variant=variant))
    return None


def _described(part: Part, path: Path, config: CheckpointConfig, variant: str | None) -> tuple[Any, Path]:
    """The part's architecture, and the file of its weights."""
    if not path.is_dir():
        return getattr(config, part), path
    folder = path / part if (path / "model_index.json").is_file() else path
    read = diffusers.read_unet if part == "unet" else diffusers.read_vae
    return read(folder), weights_file(folder, variant)


def _read(stack: contextlib.ExitStack, part: Part, settings: Any, path: Path) -> dict[str, Parameter]:
    file = stack.enter_context(open_tensors(path))
    own = [name for name in file.tensors if layouts.part_of(name) == part]
    # Alone in a file a part's tensors need no root.
    given = {f"{part}/{name}": name for name in own or file.tensors}
    places, names = layouts.locate(given, {part: diffusers_names.PLACES[part]})
    tensors = {name: file.tensors[given[full]] for name, full in names.items()}
    specs = abstract_network(class_of(part, settings), settings).params
    params = {f"{part}.{name}": spec for name, spec in specs.items()}
    place = places[part]
    dialect = layouts.PARTS[part][place.dialect]
    dialect.table(table := engine.Table(params), place.prefix, settings)
    unused = [engine.Unused(f".*({item.pattern})", item.reason) for item in (*dialect.unused, *layouts.BESIDE)]
    report = engine.check(table.rules, params, tensors, unused, {name: given[full] for name, full in names.items()})
    if report.missing and (kind := kind_of(file.tensors, layouts.PARTS.keys() - {part})):
        raise CheckpointError(f"{part}: {path.name} {kind}")
    engine.require_complete(report, f"{part}: {path.name}")
    read = {name: functools.partial(file.read, given[full]) for name, full in names.items()}
    return engine.import_params(table.rules, params, tensors, lambda name: read[name]())


def _fitting(config: CheckpointConfig, part: Part, settings: Any, where: str) -> CheckpointConfig:
    """The configuration with another part.

    Raises:
        CheckpointError: The other parts cannot work with it.
    """
    replaced = dataclasses.replace(config, **{part: settings})
    for what, have, want in (
        ("latent channels", replaced.vae.latent_channels, config.vae.latent_channels),
        ("output channels", replaced.unet.out_channels, config.unet.out_channels),
        ("a text width of", replaced.unet.cross_attention_dim, config.text_encoder.width),
        ("class labels", replaced.unet.class_embedding_size or 0, config.unet.class_embedding_size or 0),
    ):
        if have != want:
            raise CheckpointError(f"{part}: {where} has {what} {have}; this checkpoint needs {want}")
    if part == "unet" and replaced.task != config.task and {replaced.task, config.task} != {"text-to-image", "inpaint"}:
        raise CheckpointError(f"{part}: {where} is for {replaced.task}; this checkpoint is for {config.task}")
    # Of another UNet nothing says that it was distilled, too.
    return dataclasses.replace(replaced, distilled=config.distilled and part != "unet")
