"""Opens a checkpoint wherever it is: a converted directory, a diffusers folder, an original file, or the hub."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from unclip_jax.checkpoints import foreign
from unclip_jax.checkpoints.checkpoint import (
    Checkpoint,
    controlnet_config,
    family_config,
    prior_config,
    tiny_vae_config,
)
from unclip_jax.checkpoints.config import predicting
from unclip_jax.checkpoints.directory import is_directory_checkpoint, open_directory
from unclip_jax.checkpoints.local import local_path
from unclip_jax.checkpoints.places import OPEN_CLIP, HubPlace, place_of
from unclip_jax.conditioning.clip_image import Preprocess
from unclip_jax.demo import demo_controlnet, demo_model, demo_tiny_vae
from unclip_jax.sampling.schedule import PREDICTION_TYPES


def open_checkpoint(
    source: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    clip_stats: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    unet: str | os.PathLike[str] | None = None,
    preprocess: Preprocess | None = None,
    variant: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    mirrors: bool = True,
    ema: bool = False,
) -> Checkpoint:
    """Opens a checkpoint for reading; use it as a context manager.

    Args:
        source: A converted directory, a diffusers folder, an original `.ckpt`/`.safetensors` file, or one of these on
            the hub, see `local_path`. Or a CLIP model on its own: open_clip's file, transformers' folder,
            "open_clip:ViT-H-14/laion2b_s32b_b79k". Or a text-to-image prior on its own, see `open_prior`, a
            ControlNet, see `open_controlnet`, or a tiny autoencoder, see `open_tiny_vae`. None is the bundled demo
            model.
        config: For original files, see `convert.source.open_original`; may be on the hub.
        prediction_type: What the UNet predicts, "epsilon" or "v_prediction", instead of what the checkpoint says.
        clip_stats: For original files, see `convert.source.open_original`; may be on the hub.
        text_encoder: For Karlo's prior, see `convert.prior.open_karlo_prior`; may be on the hub.
        vae: A VAE that replaces the checkpoint's own, from any source, see `convert.part.with_part`. It may be a tiny
            autoencoder.
        unet: A UNet that replaces the checkpoint's own, likewise.
        preprocess: How images become pixel values, instead of the checkpoint's own way.
        variant: For diffusers folders, such as "fp16".
        revision: See `local_path`.
        subfolder: See `local_path`.
        mirrors: See `local_path`.
        ema: For original files, see `convert.source.open_original`.

    Returns:
        The open checkpoint.

    Raises:
        FileNotFoundError: There is nothing at the source.
        ValueError: A file or an argument is refused.
    """
    if preprocess is not None and preprocess not in get_args(Preprocess):
        raise ValueError(f"preprocess is {preprocess!r}; accepted: {', '.join(get_args(Preprocess))}")
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; accepted: {', '.join(PREDICTION_TYPES)}")
    source = demo_model() if source is None else source
    if str(source).startswith(OPEN_CLIP):
        return foreign.open_published_clip(str(source))
    path = local_path(source, revision=revision, variant=variant, subfolder=subfolder, mirrors=mirrors)
    options = {"config": config, "clip_stats": clip_stats, "text_encoder": text_encoder, "ema": ema}
    given: dict[Literal["unet", "vae"], Any] = {"unet": unet, "vae": vae}
    parts = {part: value for part, value in given.items() if value is not None}
    checkpoint = _open(path, options, variant, prediction_type, tuple(parts))
    if parts:
        for part, value in parts.items():
            with contextlib.ExitStack() as stack:
                stack.enter_context(checkpoint)
                checkpoint = foreign.with_part(checkpoint, part, _part_path(part, value, mirrors))
                stack.pop_all()
    if prediction_type is not None:
        checkpoint = dataclasses.replace(checkpoint, config=predicting(family_config(checkpoint), prediction_type))
    if preprocess is not None:
        settings = dataclasses.replace(family_config(checkpoint), preprocess=preprocess)
        checkpoint = dataclasses.replace(checkpoint, config=settings)
    return checkpoint


def open_prior(
    source: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    clip_stats: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    mirrors: bool = True,
) -> Checkpoint:
    """Opens a text-to-image prior for reading; use it as a context manager.

    Args:
        source: A converted directory; a diffusers folder with the parts `prior`, `prior_scheduler`,
            `prior_text_encoder` and `prior_tokenizer`, alone or among those of StableUnCLIPPipeline, or as in
            "kakaobrain/karlo-v1-alpha"; one of these on the hub, see `local_path`; or Karlo's own checkpoint, or the
            folder that holds it.
        config: For Karlo's own, see `convert.prior.open_karlo_prior`.
        text_encoder: For Karlo's own, likewise.
        clip_stats: For Karlo's own, likewise.
        variant: For diffusers folders, such as "fp16".
        revision: See `local_path`.
        subfolder: See `local_path`.
        mirrors: See `local_path`.

    Returns:
        The open checkpoint.

    Raises:
        FileNotFoundError: There is nothing at the source.
        ValueError: A file or an argument is refused.
    """
    path = local_path(source, revision=revision, variant=variant, subfolder=subfolder, mirrors=mirrors)
    given = {"config": config, "text_encoder": text_encoder, "clip_stats": clip_stats}
    karlo = {name: value for name, value in given.items() if value is not None}
    if path.is_dir() and is_directory_checkpoint(path):
        if karlo:
            raise ValueError(f"{', '.join(karlo)}: only for Karlo's own files, and {path} is a converted checkpoint")
        checkpoint = _open_converted(path, variant)
    else:
        checkpoint = foreign.open_prior(path, karlo, variant)
    return _of_kind(checkpoint, prior_config)


def open_controlnet(
    source: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    mirrors: bool = True,
) -> Checkpoint:
    """Opens a ControlNet for reading; use it as a context manager.

    Args:
        source: A converted directory; the folder of diffusers' ControlNetModel, or of a pipeline with one; an original
            `.safetensors`, `.ckpt` or `.pth` file; or one of these on the hub, see `local_path`. None is the bundled
            demo model's.
        config: For a file, diffusers' config.json, see `convert.controlnet.open_controlnet`; may be on the hub.
        variant: For diffusers folders, such as "fp16".
        revision: See `local_path`.
        subfolder: See `local_path`.
        mirrors: See `local_path`.

    Returns:
        The open checkpoint.

    Raises:
        FileNotFoundError: There is nothing at the source.
        ValueError: A file or an argument is refused.
    """
    source = demo_controlnet() if source is None else source
    given: dict[str, Any] = {"revision": revision, "variant": variant, "mirrors": mirrors}
    place = place_of(os.fspath(source))
    if subfolder or place is None or place.path:
        path = local_path(source, subfolder=subfolder, **given)
    else:  # from a whole pipeline only the part is downloaded
        try:
            path = local_path(source, subfolder="controlnet", **given)
        except ValueError:
            if _is_pipeline(place, revision, mirrors):
                raise
            path = local_path(source, **given)
    if not (path.is_dir() and is_directory_checkpoint(path)):
        return foreign.open_controlnet(path, config, variant)
    if config is not None:
        raise ValueError(f"config: only for single files, and {path} is a converted checkpoint")
    return _of_kind(_open_converted(path, variant), controlnet_config)


def open_tiny_vae(
    source: str | os.PathLike[str] | None = None,
    *,
    variant: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    mirrors: bool = True,
) -> Checkpoint:
    """Opens a tiny autoencoder for reading; use it as a context manager.

    Args:
        source: A converted directory; the folder of diffusers' AutoencoderTiny, or of a pipeline with one; TAESD's own
            files; or one of these on the hub, see `local_path`. None is the bundled demo model's.
        variant: For diffusers folders, such as "fp16".
        revision: See `local_path`.
        subfolder: See `local_path`.
        mirrors: See `local_path`.

    Returns:
        The open checkpoint.

    Raises:
        FileNotFoundError: There is nothing at the source.
        ValueError: A file or an argument is refused.
    """
    source = demo_tiny_vae() if source is None else source
    path = local_path(source, revision=revision, variant=variant, subfolder=subfolder, mirrors=mirrors)
    if not (path.is_dir() and is_directory_checkpoint(path)):
        return foreign.open_tiny_vae(path, variant)
    return _of_kind(_open_converted(path, variant), tiny_vae_config)


def _of_kind(checkpoint: Checkpoint, config_of: Callable[[Checkpoint], Any]) -> Checkpoint:
    """The checkpoint, or, closed, `config_of`'s ValueError for one of another kind."""
    try:
        config_of(checkpoint)
    except ValueError:
        checkpoint.resources.close()
        raise
    return checkpoint


def _is_pipeline(place: HubPlace, revision: str | None, mirrors: bool) -> bool:
    """Whether a repository on the hub is a pipeline's folder."""
    try:
        local_path(f"{place.repo_id}/model_index.json", revision=revision or place.revision, mirrors=mirrors)
    except ValueError:
        return False
    return True


def _part_path(part: str, value: str | os.PathLike[str], mirrors: bool) -> Path:
    """The path of another UNet or VAE: from a whole pipeline on the hub only the part is downloaded."""
    place = place_of(os.fspath(value))
    if place is not None and not place.path:
        with contextlib.suppress(ValueError):  # a repository of the part alone has no such folder
            return local_path(value, subfolder=part, mirrors=mirrors)
    return local_path(value, mirrors=mirrors)


def _open(
    path: Path, original: dict[str, Any], variant: str | None, prediction_type: str | None, without: tuple[str, ...]
) -> Checkpoint:
    given = [name for name, value in original.items() if value]
    if path.is_dir() and given:
        raise ValueError(f"{', '.join(given)}: only for original files, and {path} is a folder")
    if path.is_dir() and is_directory_checkpoint(path):
        return _open_converted(path, variant)
    return foreign.open_checkpoint(path, original, variant, prediction_type, without)


def _open_converted(path: Path, variant: str | None) -> Checkpoint:
    if variant is not None:
        raise ValueError(f"variant is {variant!r}, but {path} is a converted checkpoint: it has no variants")
    return open_directory(path)
