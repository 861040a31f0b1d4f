"""Opens a checkpoint wherever it is: a converted directory, a diffusers folder, an original file, or on the hub."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, get_args

from unclip_jax.checkpoints.checkpoint import Checkpoint, family_config, prior_config
from unclip_jax.checkpoints.config import predicting
from unclip_jax.checkpoints.directory import is_directory_checkpoint, open_directory
from unclip_jax.checkpoints.hub import download
from unclip_jax.checkpoints.places import place_of
from unclip_jax.conditioning.address import shown
from unclip_jax.conditioning.clip_image import Preprocess
from unclip_jax.demo import demo_model
from unclip_jax.sampling.schedule import PREDICTION_TYPES

OPEN_CLIP = "open_clip:"


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

    source: a converted directory, a diffusers folder, an original `.ckpt`/`.safetensors` file, or one of these on the
        hub, see `local_path`; or a CLIP model on its own: open_clip's file, transformers' folder,
        "open_clip:ViT-H-14/laion2b_s32b_b79k"; or a text-to-image prior on its own, see `open_prior`; None is the
        bundled demo model
    config, clip_stats, ema: for original files, see `convert.source.open_original`; text_encoder: for Karlo's prior,
        see `convert.prior.open_karlo_prior`; each file may be on the hub as well
    prediction_type: what the UNet predicts, "epsilon" or "v_prediction", instead of what the checkpoint says
    vae, unet: another one than the checkpoint's own, from any source, see `convert.part.with_part`
    variant: for diffusers folders, such as "fp16"; revision, subfolder, mirrors: see `local_path`
    preprocess: how pictures become pixel values, instead of the checkpoint's own way

    Raises FileNotFoundError when there is nothing there, ValueError for a file that is refused (one line).
    """
    if preprocess is not None and preprocess not in get_args(Preprocess):
        raise ValueError(f"preprocess is {preprocess!r}; accepted: {', '.join(get_args(Preprocess))}")
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; accepted: {', '.join(PREDICTION_TYPES)}")
    source = demo_model() if source is None else source
    if str(source).startswith(OPEN_CLIP):
        from convert.clip import open_open_clip

        return open_open_clip(str(source))
    path = local_path(source, revision=revision, variant=variant, subfolder=subfolder, mirrors=mirrors)
    options = {"config": config, "clip_stats": clip_stats, "text_encoder": text_encoder, "ema": ema}
    given: dict[Literal["unet", "vae"], Any] = {"unet": unet, "vae": vae}
    parts = {part: value for part, value in given.items() if value is not None}
    checkpoint = _open(path, options, variant, prediction_type, tuple(parts))
    if parts:
        from convert.part import with_part

        for part, value in parts.items():
            with contextlib.ExitStack() as stack:
                stack.enter_context(checkpoint)
                checkpoint = with_part(checkpoint, part, _part_path(part, value, mirrors))
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

    source: a converted directory; a diffusers folder with the parts `prior`, `prior_scheduler`, `prior_text_encoder`
        and `prior_tokenizer`, alone or among those of StableUnCLIPPipeline, or as in "kakaobrain/karlo-v1-alpha"; one
        of these on the hub, see `local_path`; or Karlo's own checkpoint, or the folder that it lies in
    config, text_encoder, clip_stats: for Karlo's own, see `convert.prior.open_karlo_prior`
    variant: for diffusers folders, such as "fp16"; revision, subfolder, mirrors: see `local_path`

    Raises FileNotFoundError when there is nothing there, ValueError for a file that is refused (one line).
    """
    path = local_path(source, revision=revision, variant=variant, subfolder=subfolder, mirrors=mirrors)
    karlo = {"config": config, "text_encoder": text_encoder, "clip_stats": clip_stats}
    checkpoint = _open_prior(path, {name: value for name, value in karlo.items() if value is not None}, variant)
    if checkpoint is None:
        raise ValueError(f"{path}: no text-to-image prior: neither converted, nor diffusers' (prior), nor Karlo's")
    try:
        prior_config(checkpoint)
    except ValueError:
        checkpoint.resources.close()
        raise
    return checkpoint


def _open_prior(path: Path, karlo: dict[str, Any], variant: str | None) -> Checkpoint | None:
    """None where there is no prior. karlo: those of `open_karlo_prior`'s options that are given."""
    from convert.prior import is_karlo_prior, is_prior_folder, open_diffusers_prior, open_karlo_prior

    converted = path.is_dir() and is_directory_checkpoint(path)
    if converted or (path.is_dir() and is_prior_folder(path)):
        if karlo:
            raise ValueError(f"{', '.join(karlo)}: only for Karlo's own files, and {path} is another folder")
        if not converted:
            return open_diffusers_prior(path, variant=variant)
        if variant is not None:
            raise ValueError(f"variant is {variant!r}, but {path} is a converted checkpoint: it has no variants")
        return open_directory(path)
    if not is_karlo_prior(path):
        return None
    if variant is not None:
        raise ValueError(f"variant is {variant!r}, but {path} is Karlo's own: only diffusers folders have variants")
    return open_karlo_prior(path, **{name: file_beside(name, value) for name, value in karlo.items()})


def local_path(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    mirrors: bool = True,
) -> Path:
    """Where a source is on this machine: a path as it is, anything on the hub after it is fetched.

    source: a path, which is taken where it exists; a hub id, "owner/name"; the path of a file or folder below one; or
        an address of the hub, see `unclip_jax.checkpoints.places.place_of`
    subfolder: within the source; revision, variant, mirrors: on the hub, see `unclip_jax.checkpoints.hub.download`

    Raises FileNotFoundError when there is nothing there, ValueError for what is no source or has no meaning for it,
    and what `download` raises.
    """
    subfolder = (subfolder or "").strip("/")
    if subfolder and any(part in ("", ".", "..") for part in subfolder.split("/")):
        raise ValueError(f"subfolder is {subfolder!r}; want the name of a folder within the source")
    place = place_of(os.fspath(source))
    if place is not None:
        if revision is not None and place.revision not in (None, revision):
            raise ValueError(f"revision is {revision!r}, but {shown(os.fspath(source))} names {place.revision!r}")
        path = "/".join(part for part in (place.path, subfolder) if part)
        revision = place.revision if revision is None else revision
        try:
            return download(place.repo_id, path, revision=revision, variant=variant, mirrors=mirrors)
        except (FileNotFoundError, ConnectionError) as error:
            if place.path and str(place) == os.fspath(source):  # most often a path that is mistaken
                text = f"source: no such file or folder: {source}; nor is it had from the hub: {error}"
                raise type(error)(text) from error
            raise
    if revision is not None:
        raise ValueError(f"revision is {revision!r}, but {source} is a local path: only hub ids have revisions")
    whole = Path(source)
    if not whole.exists():
        raise FileNotFoundError(f"source: no such file or folder, and not a hub id (owner/name): {source}")
    if subfolder and not (whole / subfolder).is_dir():
        raise FileNotFoundError(f"subfolder: no such folder: {whole / subfolder}")
    return whole / subfolder


def file_beside(name: str, value: str | os.PathLike[str], otherwise: str = "") -> Path:
    """The file that an option names, at a path or on the hub; of `clip_stats` also a repository that has them.

    otherwise: what a message adds. Raises FileNotFoundError, and what `local_path` raises.
    """
    if Path(value).exists():
        return Path(value)
    if (place := place_of(os.fspath(value))) is None:
        raise FileNotFoundError(f"{name}: no such file: {value}{otherwise}")
    return local_path(value, subfolder="image_normalizer" if name == "clip_stats" and not place.path else None)


def _part_path(part: str, value: str | os.PathLike[str], mirrors: bool) -> Path:
    """Where another UNet or VAE is: of a whole pipeline on the hub only the part is fetched."""
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
        if variant is not None:
            raise ValueError(f"variant is {variant!r}, but {path} is a converted checkpoint: it has no variants")
        return open_directory(path)
    # The one place where the library reaches the converter, imported late so that our own format opens without it.
    from convert.architecture.original import ARCHITECTURES
    from convert.architecture.presets import PRESETS
    from convert.clip import is_open_clip, is_transformers_clip, open_open_clip, open_transformers_clip
    from convert.prior import is_prior
    from convert.source import open_diffusers, open_original

    if is_prior(path):
        if original.pop("ema"):
            raise ValueError(f"ema: only for Stable Diffusion checkpoints, and {path} is a prior")
        checkpoint = _open_prior(path, {name: value for name, value in original.items() if value is not None}, variant)
        assert checkpoint is not None
        return checkpoint
    if original.pop("text_encoder"):
        raise ValueError(f"text_encoder: only for Karlo's prior, and {path} is none")
    if path.is_dir():
        if is_transformers_clip(path):
            return open_transformers_clip(path, variant=variant)
        return open_diffusers(path, variant=variant, without=without)
    if variant is not None:
        raise ValueError(f"variant is {variant!r}, but {path} is one file: only diffusers folders have variants")
    named = {*PRESETS, *ARCHITECTURES}
    for name in ("config", "clip_stats"):
        if original[name] is not None and not (name == "config" and str(original[name]) in named):
            advice = f", nor is it one of {', '.join(sorted(named))}" if name == "config" else ""
            original[name] = file_beside(name, original[name], advice)
    if is_open_clip(path):
        if foreign := [name for name in ("clip_stats", "ema") if original[name]]:
            raise ValueError(f"{', '.join(foreign)}: only for Stable Diffusion checkpoints, and {path} is open_clip's")
        return open_open_clip(path, config=original["config"])
    return open_original(path, prediction_type=prediction_type, without=without, **original)
