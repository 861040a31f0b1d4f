"""The one door from this package to `convert`, which reads other programs' files. A test keeps it the only one.

`convert` is imported late, so that our own format opens without it, and only if it is ours: a user's script convert.py
in the working directory would be found before the package.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # this module is imported where --help has to answer without JAX
    import numpy as np

    from unclip_jax.adapters.lora import Lora
    from unclip_jax.checkpoints.checkpoint import Checkpoint
    from unclip_jax.checkpoints.config import CheckpointConfig
    from unclip_jax.checkpoints.networks import Network
    from unclip_jax.safety import SafetyChecker

NAME = "convert"
OURS = Path(__file__).parents[2] / NAME  # both packages lie side by side, in a checkout as in site-packages


def require_convert() -> None:
    """Checks, without running it, that the module called `convert` is ours: another may be the script that called us.

    Raises:
        ImportError: Another module hides ours. The message names its file.
    """
    loaded = sys.modules.get(NAME)
    if loaded is None:
        spec = importlib.util.find_spec(NAME)
        file = None if spec is None else spec.origin
    else:
        file = getattr(loaded, "__file__", None)
    if file is None or Path(file).parent == OURS:
        return  # of a package that is not there the import itself tells
    if not (OURS.is_dir() and os.path.samefile(Path(file).parent, OURS)):
        raise ImportError(
            f"another module called {NAME} hides the one that comes with unclip_jax: {file}; rename it or run elsewhere"
        )


def open_checkpoint(
    path: Path,
    original: Mapping[str, Any],
    variant: str | None,
    prediction_type: str | None,
    without: tuple[str, ...],
) -> "Checkpoint":
    """Opens what is not ours: a diffusers folder, an original file, a CLIP model, a prior, a ControlNet
    or a tiny autoencoder.

    Args:
        path: The file or folder.
        original: The options for single files, `config`, `clip_stats`, `text_encoder` and `ema`; None or False if not
            given.
        variant: For diffusers folders.
        prediction_type: See `convert.source.open_original`.
        without: See `convert.source.open_original`.

    Returns:
        The open checkpoint.

    Raises:
        FileNotFoundError: An option's file does not exist.
        ValueError: A file or an option is refused.
    """
    require_convert()
    from convert.architecture.original import ARCHITECTURES
    from convert.architecture.presets import PRESETS
    from convert.clip import is_open_clip, is_transformers_clip, open_open_clip, open_transformers_clip
    from convert.controlnet import is_controlnet
    from convert.prior import is_prior
    from convert.source import open_diffusers, open_original
    from convert.tiny_vae import is_tiny_vae
    from unclip_jax.checkpoints.local import file_beside

    given = {name: value for name, value in original.items() if value is not None and value is not False}
    if is_prior(path):
        if given.pop("ema", False):
            raise ValueError(f"ema: only for Stable Diffusion checkpoints, and {path} is a prior")
        return open_prior(path, given, variant)
    if is_controlnet(path):
        if others := [name for name in given if name != "config"]:
            raise ValueError(f"{', '.join(others)}: only for other checkpoints, and {path} is a ControlNet")
        return open_controlnet(path, given.get("config"), variant)
    if is_tiny_vae(path):
        if given:
            raise ValueError(f"{', '.join(given)}: only for other checkpoints, and {path} is a tiny autoencoder")
        return open_tiny_vae(path, variant)
    if "text_encoder" in given:
        raise ValueError(f"text_encoder is only for Karlo's prior, and {path} is not one")
    if path.is_dir():
        if is_transformers_clip(path):
            return open_transformers_clip(path, variant=variant)
        return open_diffusers(path, variant=variant, without=without)
    if variant is not None:
        raise ValueError(f"variant is {variant!r}, but {path} is one file: only diffusers folders have variants")
    named = {*PRESETS, *ARCHITECTURES}
    for name in ("config", "clip_stats"):
        if name in given and not (name == "config" and str(given[name]) in named):
            advice = f", nor is it one of {', '.join(sorted(named))}" if name == "config" else ""
            given[name] = file_beside(name, given[name], advice)
    if is_open_clip(path):
        if foreign := [name for name in ("clip_stats", "ema") if name in given]:
            raise ValueError(f"{', '.join(foreign)}: only for Stable Diffusion checkpoints, and {path} is open_clip's")
        return open_open_clip(path, **given)
    return open_original(path, prediction_type=prediction_type, without=without, **given)


def open_prior(path: Path, karlo: Mapping[str, Any], variant: str | None) -> "Checkpoint":
    """Opens a text-to-image prior that is not ours, in a diffusers folder or Karlo's own.

    karlo: the options of `convert.prior.open_karlo_prior` that are given. Raises the errors of `open_checkpoint`.
    """
    require_convert()
    from convert.prior import is_karlo_prior, is_prior_folder, open_diffusers_prior, open_karlo_prior
    from unclip_jax.checkpoints.local import file_beside

    if path.is_dir() and is_prior_folder(path):
        if karlo:
            raise ValueError(f"{', '.join(karlo)}: only for Karlo's own files, and {path} is another folder")
        return open_diffusers_prior(path, variant=variant)
    if not is_karlo_prior(path):
        raise ValueError(
            f"{path}: not a text-to-image prior; want a converted one, a diffusers folder (prior) or Karlo's"
        )
    if variant is not None:
        raise ValueError(f"variant is {variant!r}, but {path} is Karlo's own: only diffusers folders have variants")
    return open_karlo_prior(path, **{name: file_beside(name, value) for name, value in karlo.items()})


def open_controlnet(path: Path, config: str | os.PathLike[str] | None, variant: str | None) -> "Checkpoint":
    """Opens a ControlNet that is not ours; see `convert.controlnet.open_controlnet`.

    Raises the errors of `open_checkpoint`.
    """
    require_convert()
    from convert.controlnet import open_controlnet
    from unclip_jax.checkpoints.local import file_beside

    if path.is_dir():
        if config is not None:
            raise ValueError(f"config: only for single files, and {path} is a folder")
    elif variant is not None:
        raise ValueError(f"variant is {variant!r}, but {path} is one file: only diffusers folders have variants")
    return open_controlnet(path, config=None if config is None else file_beside("config", config), variant=variant)


def open_tiny_vae(path: Path, variant: str | None) -> "Checkpoint":
    """Opens a tiny autoencoder that is not ours; see `convert.tiny_vae.open_tiny_vae`.

    Raises the errors of `open_checkpoint`.
    """
    require_convert()
    from convert.tiny_vae import open_tiny_vae

    if variant is not None and not path.is_dir():
        raise ValueError(f"variant is {variant!r}, but {path} is one file: only diffusers folders have variants")
    return open_tiny_vae(path, variant=variant)


def open_published_clip(name: str) -> "Checkpoint":
    """Opens one of open_clip's models, "open_clip:NAME/TAG"; see `convert.clip.open_open_clip`."""
    require_convert()
    from convert.clip import open_open_clip

    return open_open_clip(name)


def with_part(checkpoint: "Checkpoint", part: Literal["unet", "vae"], path: Path) -> "Checkpoint":
    """A checkpoint with another UNet or VAE; see `convert.part.with_part`."""
    require_convert()
    from convert.part import with_part

    return with_part(checkpoint, part, path)


def open_inception(path: Path) -> "Network":
    """FID's Inception from its published file; see `convert.inception.open_inception`."""
    require_convert()
    from convert.inception import open_inception

    return open_inception(path)


def open_safety_checker(folder: str | os.PathLike[str]) -> "SafetyChecker":
    """The safety checker of a diffusers folder; see `convert.safety.open_safety_checker`."""
    require_convert()
    from convert.safety import open_safety_checker

    return open_safety_checker(folder)


def read_adapter(
    source: str | os.PathLike[str] | Mapping[str, Any], config: "CheckpointConfig", weight_name: str | None
) -> "tuple[Lora, dict[str, np.ndarray]]":
    """A LoRA, and the textual inversions that come with it; see `convert.adapters.read_adapter`."""
    require_convert()
    from convert.adapters import read_adapter

    return read_adapter(source, config, weight_name)


def read_textual_inversion(
    source: str | os.PathLike[str] | Mapping[str, Any],
    config: "CheckpointConfig",
    token: str | None,
    weight_name: str | None,
) -> "dict[str, np.ndarray]":
    """Textual inversions, (n, width) by token; see `convert.adapters.read_textual_inversion`."""
    require_convert()
    from convert.adapters import read_textual_inversion

    return read_textual_inversion(source, config, token, weight_name)


def save_lora(config: "CheckpointConfig", lora: "Lora", path: Path) -> Path:
    """Writes a LoRA as diffusers reads it; see `convert.export.lora.save_lora`."""
    require_convert()
    from convert.export.lora import save_lora

    return save_lora(config, lora, path)


def save_textual_inversion(word: str, rows: "np.ndarray", path: Path) -> Path:
    """Writes a textual inversion as diffusers reads it; see `convert.export.textual_inversion`."""
    require_convert()
    from convert.export.textual_inversion import save_textual_inversion

    return save_textual_inversion(word, rows, path)


def save_diffusers(
    checkpoint: "Checkpoint",
    destination: Path,
    *,
    dtype: "np.dtype | None" = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[Path]:
    """Writes a checkpoint as a diffusers folder; see `convert.export.diffusers.save_diffusers`."""
    require_convert()
    from convert.export.diffusers import save_diffusers

    return save_diffusers(checkpoint, destination, dtype=dtype, progress=progress)


def model_card(
    checkpoint: "Checkpoint", repo_id: str, sources: Sequence[str] | None = None, method: str | None = None
) -> str:
    """The README.md of a checkpoint on the hub; see `convert.export.card.model_card`."""
    require_convert()
    from convert.export.card import model_card

    return model_card(checkpoint, repo_id, sources, method)


def run_converter(arguments: Sequence[str], program: str) -> int:
    """Runs `python -m convert` under another name in its usage line; returns the exit status."""
    require_convert()
    from convert.__main__ import main

    return main(arguments, program)
