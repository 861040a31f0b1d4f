"""Opens a foreign checkpoint (an original file or a diffusers folder) as our `Checkpoint`."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import engine, layouts
from convert.architecture import diffusers as diffusers_architecture
from convert.architecture import original, presets, recognise
from convert.architecture.distilled import as_distilled, is_named_turbo
from convert.controlnet import check_controlnet, is_controlnet
from convert.ema import ema_names
from convert.folder_weights import weights_file
from convert.kinds import kind_of
from convert.layouts import ZERO_SNR
from convert.prior import check_prior, is_prior
from convert.readers import CheckpointError, TensorFile, TensorInfo, open_tensors
from convert.rules import diffusers, ldm
from convert.statistics import embedding_statistics, published_statistics
from convert.tiny_vae import check_tiny_vae, is_tiny_vae
from convert.tokenizer import open_tokenizer
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import CheckpointConfig, predicting
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json


def open_original(
    path: Path,
    *,
    config: Path | str | None = None,
    prediction_type: str | None = None,
    clip_stats: Path | None = None,
    ema: bool = False,
    without: Collection[str] = (),
) -> Checkpoint:
    """Opens a `.ckpt`, `.pt`, `.pth`, `.bin` or `.safetensors` file in the original's layout, whoever wrote it.

    Args:
        path: The file.
        config: The original's yaml, or a name in `convert.architecture.presets.PRESETS`. By default a yaml with the
            file's name beside it is read, or else the file must hold the tensors of a published checkpoint.
        prediction_type: What the UNet predicts, "epsilon" or "v_prediction". By default what the description or the
            file says, or else a guess, with a warning.
        clip_stats: The mean and standard deviation of the image embeddings, which the original keeps outside the
            checkpoint (`.th`, `.npz`, diffusers' image_normalizer). By default 0 and 1, which is right for ViT-H; for
            the OpenAI encoder the published ones are downloaded.
        ema: Read the UNet's EMA weights.
        without: Parts that come from elsewhere, which the file need not have.

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: The file is something else or incomplete.
    """
    with contextlib.ExitStack() as stack:
        plan = _plan_original(stack, path, config, prediction_type, ema, without)
        vision = plan.config.image_encoder
        if clip_stats is None and vision is not None and vision.activation == "quick_gelu":
            clip_stats = published_statistics(vision.projection_dim, f"{path.name}: its image encoder is OpenAI's")
        statistics = embedding_statistics(plan.config, clip_stats)
        parameters = engine.import_params(plan.rules, plan.params, plan.tensors, plan.read)
        for name, array in statistics.items():
            parameters[name] = Parameter.of(array)
        length = plan.config.text_encoder.context_length
        tokenizer = Tokenizer.from_json(clip_tokenizer_json(), "open_clip", context_length=length)
        files = (*plan.files, *(() if clip_stats is None else (clip_stats,)))
        return Checkpoint(plan.config, tokenizer, parameters, str(path), files, stack.pop_all())


def open_diffusers(folder: Path, *, variant: str | None = None, without: Collection[str] = ()) -> Checkpoint:
    """Opens a folder that diffusers saved (`save_pretrained`), with or without a variant such as "fp16".

    Args:
        folder: The folder.
        variant: Of the weights.
        without: Parts whose weights come from elsewhere.

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: The folder is incomplete or has an unsupported architecture.
    """
    with contextlib.ExitStack() as stack:
        plan = _plan_diffusers(stack, folder, variant, without)
        parameters = engine.import_params(plan.rules, plan.params, plan.tensors, plan.read)
        tokenizer = open_tokenizer(folder / "tokenizer", plan.config.text_encoder.context_length)
        return Checkpoint(plan.config, tokenizer, parameters, str(folder), plan.files, stack.pop_all())


def check_source(
    path: Path,
    *,
    config: Path | str | None = None,
    prediction_type: str | None = None,
    text_encoder: Path | str | None = None,
    variant: str | None = None,
    ema: bool = False,
    without: Collection[str] = (),
) -> engine.Report:
    """Proves a file or diffusers folder complete from names, shapes and dtypes; reads no tensor data.

    Takes the options of `open_original`, `open_diffusers`, `convert.prior.check_prior`,
    `convert.controlnet.check_controlnet` and `convert.tiny_vae.check_tiny_vae`, and raises their errors.

    Returns:
        The findings.
    """
    if is_prior(path):
        given = {"config": config, "text_encoder": text_encoder}
        return check_prior(path, variant=variant, **{name: Path(p) for name, p in given.items() if p is not None})
    if is_controlnet(path):
        return check_controlnet(path, config=None if config is None else Path(config), variant=variant)
    if is_tiny_vae(path):
        return check_tiny_vae(path, variant=variant)
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            return _plan_diffusers(stack, path, variant, without).report
        return _plan_original(stack, path, config, prediction_type, ema, without, reads_data=False).report


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A foreign checkpoint found complete, and how to convert it: parameters by name, and what to read them from."""

    config: CheckpointConfig
    rules: list[engine.Rule]
    params: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    files: tuple[Path, ...]
    report: engine.Report


def _plan_original(
    stack: contextlib.ExitStack,
    path: Path,
    config: Path | str | None,
    prediction_type: str | None,
    ema: bool,
    without: Collection[str],
    *,
    reads_data: bool = True,
) -> _Plan:
    file = stack.enter_context(open_tensors(path))
    places, names = layouts.locate(file.tensors, ldm.PLACES)
    tensors = {name: file.tensors[own] for name, own in names.items()}

    def read(name: str) -> np.ndarray:
        return file.read(names[name])

    described = config if config is not None else _beside(path)
    preset, note = None, ""
    if described is not None:
        preset = presets.PRESETS.get(str(described))
        architecture = preset or original.from_yaml(Path(described), tensors, places)
        if prediction_type is not None:
            architecture = predicting(architecture, prediction_type)
    else:
        with _saying_what_it_is(file.tensors, path.name, without):
            architecture, note = recognise.recognise(
                tensors,
                places,
                path.name,
                metadata=file.metadata,
                prediction=prediction_type,
                read=read if reads_data else None,
                without=without,
                otherwise="epsilon" if is_named_turbo(path) else None,
            )
    if ZERO_SNR in tensors:
        architecture = recognise.ending_without_signal(architecture)
    elif is_named_turbo(path):
        architecture = as_distilled(architecture)
    params = layouts.file_params(architecture, without)
    rules = layouts.table(architecture, params, places).rules
    report = engine.check(rules, params, tensors, layouts.unused(architecture, places, without), names)
    if report.missing or report.misshapen:
        with _saying_what_it_is(file.tensors, path.name, without):
            engine.require_complete(report, path.name)
    engine.require_complete(report, path.name)
    if note and reads_data:
        warnings.warn(note, stacklevel=2)
    elif note:
        report = dataclasses.replace(report, notes=(note,))
    twins = ema_names(rules, tensors, places, path.name) if ema else {}
    files = (path, *([Path(described)] if described is not None and preset is None else []))
    return _Plan(architecture, rules, params, tensors, lambda name: read(twins.get(name, name)), files, report)


@contextlib.contextmanager
def _saying_what_it_is(tensors: Mapping[str, TensorInfo], where: str, without: Collection[str]) -> Iterator[None]:
    """If tensors lack much, the error says what the file is instead, where that is known."""
    try:
        yield
    except CheckpointError as error:
        if kind := kind_of(tensors, without):
            raise CheckpointError(f"{where}: {kind}") from error
        raise


def _beside(path: Path) -> Path | None:
    """The yaml of a file, if there is one: with the suffix changed, or with it added."""
    return next((p for p in (path.with_suffix(".yaml"), path.with_name(f"{path.name}.yaml")) if p.is_file()), None)


def _plan_diffusers(stack: contextlib.ExitStack, folder: Path, variant: str | None, without: Collection[str]) -> _Plan:
    architecture = diffusers_architecture.from_folder(folder)
    params = {name: spec for name, spec in abstract_params(architecture).items() if name.split(".")[0] not in without}
    components = sorted({name.split(".")[0] for name in params})
    paths = {component: weights_file(folder / component, variant) for component in components}
    if variant is not None and not any(f".{variant}" in path.name for path in paths.values()):
        raise CheckpointError(f"{folder.name}: no component has weights of variant {variant!r}")
    held: dict[str, tuple[TensorFile, str]] = {}
    for component, path in paths.items():
        file = stack.enter_context(open_tensors(path))
        held |= {f"{component}/{name}": (file, name) for name in file.tensors}
    places, names = layouts.locate(held, diffusers.PLACES)
    readers = {name: functools.partial(held[own][0].read, held[own][1]) for name, own in names.items()}
    tensors = {name: held[own][0].tensors[held[own][1]] for name, own in names.items()}
    rules = layouts.table(architecture, params, places).rules
    report = engine.check(rules, params, tensors, layouts.unused(architecture, places, without), names)
    engine.require_complete(report, folder.name)
    return _Plan(architecture, rules, params, tensors, lambda name: readers[name](), tuple(paths.values()), report)
