"""Opens text-to-image priors: Karlo's own checkpoint, and the parts of a diffusers folder."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import engine
from convert.architecture import prior as architecture
from convert.folder_weights import weights_file
from convert.readers import CheckpointError, TensorFile, TensorInfo, open_tensors
from convert.rules import diffusers
from convert.rules import prior as rules
from convert.statistics import STATISTICS, published_statistics, read_statistics
from convert.tokenizer import open_tokenizer
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import PriorCheckpointConfig
from unclip_jax.checkpoints.networks import abstract_network, abstract_params
from unclip_jax.conditioning.tokenizer import Tokenizer, openai_tokenizer_json
from unclip_jax.models.clip import TextEncoder
from unclip_jax.models.configs import PriorConfig, TextConfig
from unclip_jax.models.prior import Prior
from unclip_jax.reference import Reference

# Karlo's files, as published, and the suffixes under which `export.prior` puts the same beside a checkpoint.
KARLO_FILE = "prior-ckpt-step=01000000-of-01000000.ckpt"
KARLO_TEXT, KARLO_STATISTICS = "ViT-L-14.pt", "ViT-L-14_stats.th"
TEXT_SUFFIX, STATISTICS_SUFFIX, YAML_SUFFIX = ".text_encoder.safetensors", ".stats.npz", ".yaml"
MARK = "model.prd_emb"


def is_karlo_prior(path: Path) -> bool:
    """Whether the path is Karlo's prior: its file, or a folder of its files."""
    if path.is_dir():
        return (path / KARLO_FILE).is_file()
    with open_tensors(path) as file:
        return MARK in file.tensors


def is_prior_folder(folder: Path) -> bool:
    """Whether a folder holds a prior's parts as diffusers writes them, alone or among others."""
    return (folder / "prior" / "config.json").is_file()


def is_prior(path: Path) -> bool:
    """Whether the path is a prior on its own, rather than among the parts of a larger pipeline."""
    return is_karlo_prior(path) or (is_prior_folder(path) and not (path / "unet").is_dir())


def open_karlo_prior(
    path: Path,
    *,
    config: Path | None = None,
    text_encoder: Path | None = None,
    clip_stats: Path | None = None,
) -> Checkpoint:
    """Opens Karlo's prior from its files.

    The other three files are looked for beside the checkpoint: under Karlo's names, `ViT-L-14.pt` and
    `ViT-L-14_stats.th`, or under the checkpoint's name with a suffix, as an export writes them. Missing statistics are
    downloaded from where they are published.

    Args:
        path: Its checkpoint, or the folder that holds it.
        config: Karlo's yaml; None for the published architecture.
        text_encoder: OpenAI's ViT-L/14 as a state dict; the image tower is not read.
        clip_stats: The mean and standard deviation of image embeddings (`.th`, `.npz`).

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: The files are something else or incomplete.
    """
    with contextlib.ExitStack() as stack:
        karlo = _open_karlo(stack, path, config, text_encoder)
        if karlo.text is None:
            raise CheckpointError(
                f"{karlo.path.name}: Karlo keeps the text tower outside the prior: give OpenAI's ViT-L-14.pt as "
                "text_encoder=, or put it beside"
            )
        clip_stats = clip_stats or _beside(karlo.path, STATISTICS_SUFFIX, KARLO_STATISTICS)
        width = karlo.prior.embedding_dim
        if clip_stats is None:
            clip_stats = published_statistics(width, f"{karlo.path.name}: a prior of Karlo")
        statistics = read_statistics(clip_stats)
        if statistics[0].shape != (width,):
            raise CheckpointError(f"{clip_stats.name}: {len(statistics[0])} features; the prior gives {width}")
        try:
            settings = PriorCheckpointConfig(karlo.prior, karlo.text, Reference.ORIGINAL, architecture.KARLO_SCHEDULER)
        except ValueError as error:
            raise CheckpointError(f"{karlo.path.name}: {error}") from error
        parameters = engine.import_params(karlo.rules, karlo.params, karlo.tensors, karlo.read)
        parameters |= {name: Parameter.of(array) for name, array in zip(STATISTICS, statistics, strict=True)}
        tokenizer = Tokenizer.from_json(openai_tokenizer_json(), "open_clip", karlo.text.context_length)
        return Checkpoint(settings, tokenizer, parameters, str(path), (*karlo.files, clip_stats), stack.pop_all())


def open_diffusers_prior(folder: Path, *, variant: str | None = None) -> Checkpoint:
    """Opens the prior in a folder that diffusers saved.

    Its parts are `prior`, `prior_scheduler`, and a text encoder with its tokenizer: `prior_text_encoder` and
    `prior_tokenizer` (StableUnCLIPPipeline's) or else `text_encoder` and `tokenizer` (Karlo's own).

    Args:
        folder: The folder.
        variant: Of the weights, such as "fp16".

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: The folder is incomplete or has another architecture.
    """
    with contextlib.ExitStack() as stack:
        settings, found = _open_folder(stack, folder, variant)
        parameters = engine.import_params(found.rules, found.params, found.tensors, found.read)
        name = architecture.part_names(folder)["tokenizer"]
        tokenizer = open_tokenizer(folder / name, settings.text_encoder.context_length)
        return Checkpoint(settings, tokenizer, parameters, str(folder), found.files, stack.pop_all())


def check_prior(
    path: Path, *, config: Path | None = None, text_encoder: Path | None = None, variant: str | None = None
) -> engine.Report:
    """Proves a prior's files complete from names, shapes and dtypes; reads no tensor data.

    For Karlo's, the text tower is proved with the prior if it is given or lies beside it. The arguments and errors are
    those of the two functions above.
    """
    with contextlib.ExitStack() as stack:
        if path.is_dir() and not is_karlo_prior(path):
            return _open_folder(stack, path, variant)[1].report
        return _open_karlo(stack, path, config, text_encoder).report


@dataclasses.dataclass(frozen=True)
class _Found:
    """Foreign files found complete, and how to convert them: parameters by name, and what to read them from."""

    rules: list[engine.Rule]
    params: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    files: tuple[Path, ...]
    report: engine.Report


@dataclasses.dataclass(frozen=True)
class _Karlo(_Found):
    path: Path
    prior: PriorConfig
    text: TextConfig | None


def _beside(path: Path, suffix: str, published: str | None = None) -> Path | None:
    """A file that belongs to a checkpoint, if there is one."""
    places = [path.with_name(path.name + suffix), *([path.with_name(published)] if published else [])]
    return next((place for place in places if place.is_file()), None)


def _open_karlo(stack: contextlib.ExitStack, path: Path, config: Path | None, text_encoder: Path | None) -> _Karlo:
    path = path / KARLO_FILE if path.is_dir() else path
    config = config or _beside(path, YAML_SUFFIX)
    prior = PriorConfig() if config is None else architecture.from_karlo_yaml(config)
    specs = {f"prior.{name}": spec for name, spec in abstract_network(Prior, prior).params.items()}
    parts = {"": stack.enter_context(open_tensors(path))}
    text, files = None, [path, *([config] if config else [])]
    if text_encoder := text_encoder or _beside(path, TEXT_SUFFIX, KARLO_TEXT):
        parts[f"{rules.TEXT}/"] = file = stack.enter_context(open_tensors(text_encoder))
        text = architecture.text_from_tensors(file.tensors, text_encoder.name)
        specs |= _text_params(text)
        files.append(text_encoder)
    tensors, read = _together(parts)
    table = rules.karlo(prior, text, specs).rules
    report = engine.check(table, specs, tensors, rules.KARLO_UNUSED)
    if report.misshapen and config is None:
        raise CheckpointError(f"{path.name}: not the published prior, and no yaml of Karlo's as config=; {report}")
    engine.require_complete(report, path.name)
    return _Karlo(table, specs, tensors, read, tuple(files), report, path, prior, text)


def _open_folder(
    stack: contextlib.ExitStack, folder: Path, variant: str | None
) -> tuple[PriorCheckpointConfig, _Found]:
    settings = architecture.from_folder(folder)
    text = architecture.part_names(folder)["text_encoder"]
    paths = {part: weights_file(folder / part, variant) for part in ("prior", text)}
    if variant is not None and not any(f".{variant}" in path.name for path in paths.values()):
        raise CheckpointError(f"{folder.name}: no component has weights of variant {variant!r}")
    files = {f"{part}/": stack.enter_context(open_tensors(path)) for part, path in paths.items()}
    tensors, read = _together(files)
    specs = abstract_params(settings)
    table = rules.diffusers(settings, specs, text).rules
    report = engine.check(table, specs, tensors, rules.diffusers_unused(text))
    engine.require_complete(report, folder.name)
    return settings, _Found(table, specs, tensors, read, tuple(paths.values()), report)


def _together(parts: Mapping[str, TensorFile]) -> tuple[dict[str, TensorInfo], Callable[[str], np.ndarray]]:
    """Several files' tensors under the tables' names, with one prefix per file."""
    tensors: dict[str, TensorInfo] = {}
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for prefix, file in parts.items():
        for name, info in file.tensors.items():
            ours = diffusers.canonical(prefix + name)
            if ours in tensors:
                raise CheckpointError(f"{prefix}{name} is there twice, in two dialects")
            tensors[ours] = info
            readers[ours] = functools.partial(file.read, name)
    return tensors, lambda name: readers[name]()


def _text_params(text: TextConfig) -> dict[str, Any]:
    return {f"text_encoder.{name}": spec for name, spec in abstract_network(TextEncoder, text).params.items()}
