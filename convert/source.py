"""Opens a foreign checkpoint - an original file or a diffusers folder - as our `Checkpoint`."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import engine
from convert.architecture import diffusers as diffusers_architecture
from convert.architecture import original, presets
from convert.prior import check_prior, is_prior
from convert.readers import CheckpointError, TensorInfo, open_tensors
from convert.rules import diffusers, ldm
from convert.statistics import STATISTICS, embedding_statistics, published_statistics
from convert.weights import weights_file
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json, tokenizer_json_from_folder


def open_original(
    path: Path, *, config: Path | str | None = None, clip_stats: Path | None = None, ema: bool = False
) -> Checkpoint:
    """A `.ckpt`, `.pt`, `.pth`, `.bin` or `.safetensors` file in the original repository's layout.

    config: the original's yaml, or the name of one of `convert.architecture.presets.PRESETS`; left out, the file must
    hold the tensors of a published checkpoint, and of one only. clip_stats: the mean and standard deviation of the
    image embeddings, which the original keeps outside the checkpoint (`.th`, `.npz`, diffusers' image_normalizer);
    without it they are 0 and 1, right for ViT-H, and for the OpenAI encoder those that are published, which are
    fetched. ema: take the UNet's moving averages.

    Raises CheckpointError in one line for anything that is not such a file or is incomplete.
    """
    with contextlib.ExitStack() as stack:
        plan = _plan_original(stack, path, config, ema)
        vision = plan.config.image_encoder
        if clip_stats is None and vision is not None and vision.activation == "quick_gelu":
            clip_stats = published_statistics(vision.projection_dim, f"{path.name}: its image encoder is OpenAI's")
        statistics = embedding_statistics(plan.config, clip_stats)
        parameters = engine.import_params(plan.rules, plan.params, plan.tensors, plan.read)
        for name, array in statistics.items():
            parameters[name] = Parameter.of(array)
        length = plan.config.text_encoder.context_length
        tokenizer = Tokenizer.from_json(clip_tokenizer_json(), "open_clip", context_length=length)
        files = (*plan.files, *(p for p in (config, clip_stats) if p and str(p) not in presets.PRESETS))
        return Checkpoint(plan.config, tokenizer, parameters, str(path), files, stack.pop_all())


def open_diffusers(folder: Path, *, variant: str | None = None) -> Checkpoint:
    """A folder that diffusers saved (`save_pretrained`), with or without a variant such as "fp16".

    Raises CheckpointError in one line for a folder that is incomplete or of an architecture these networks are not.
    """
    with contextlib.ExitStack() as stack:
        plan = _plan_diffusers(stack, folder, variant)
        parameters = engine.import_params(plan.rules, plan.params, plan.tensors, plan.read)
        try:
            text = tokenizer_json_from_folder(folder / "tokenizer")
            length = plan.config.text_encoder.context_length
            tokenizer = Tokenizer.from_json(text, "transformers", context_length=length)
        except (ValueError, FileNotFoundError) as error:
            raise CheckpointError(f"tokenizer: {error}") from error
        return Checkpoint(plan.config, tokenizer, parameters, str(folder), plan.files, stack.pop_all())


def check_source(
    path: Path,
    *,
    config: Path | str | None = None,
    text_encoder: Path | str | None = None,
    variant: str | None = None,
    ema: bool = False,
) -> engine.Report:
    """Proves a file or diffusers folder complete from names, shapes and dtypes; reads no tensor data.

    Takes the options of `open_original`, `open_diffusers` and `convert.prior.check_prior`, and raises as they do.
    """
    if is_prior(path):
        given = {"config": config, "text_encoder": text_encoder}
        return check_prior(path, variant=variant, **{name: Path(p) for name, p in given.items() if p is not None})
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            return _plan_diffusers(stack, path, variant).report
        try:
            return _plan_original(stack, path, config, ema).report
        except presets.Ambiguous as error:  # the tensors are the same in all of them
            return _plan_original(stack, path, error.names[0], ema).report


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A foreign checkpoint found complete, and how it becomes ours: parameters by name, and what to read them from."""

    config: CheckpointConfig
    rules: list[engine.Rule]
    params: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    files: tuple[Path, ...]
    report: engine.Report


def _plan_original(stack: contextlib.ExitStack, path: Path, config: Path | str | None, ema: bool) -> _Plan:
    file = stack.enter_context(open_tensors(path))
    tensors: Mapping[str, TensorInfo] = file.tensors
    if config is None:
        architecture = presets.from_inventory(tensors, path.name)
    else:
        architecture = presets.PRESETS.get(str(config)) or original.from_yaml(Path(config), tensors)
    params = {name: spec for name, spec in abstract_params(architecture).items() if name not in STATISTICS}
    rules = ldm.table(architecture, params).rules
    report = engine.check(rules, params, tensors, ldm.unused(architecture))
    engine.require_complete(report, path.name)
    twins = _moving_averages(rules, tensors, path.name) if ema else {}
    return _Plan(architecture, rules, params, tensors, lambda name: file.read(twins.get(name, name)), (path,), report)


def _plan_diffusers(stack: contextlib.ExitStack, folder: Path, variant: str | None) -> _Plan:
    architecture = diffusers_architecture.from_folder(folder)
    params = abstract_params(architecture)
    tensors: dict[str, TensorInfo] = {}
    readers: dict[str, Callable[[], np.ndarray]] = {}
    components = sorted({name.split(".")[0] for name in params})
    paths = {component: weights_file(folder / component, variant) for component in components}
    if variant is not None and not any(f".{variant}" in path.name for path in paths.values()):
        raise CheckpointError(f"{folder.name}: no component has weights of variant {variant!r}")
    for component, path in paths.items():
        file = stack.enter_context(open_tensors(path))
        for name, info in file.tensors.items():
            ours = diffusers.canonical(f"{component}/{name}")
            if ours in tensors:
                raise CheckpointError(f"{component}/{path.name}: {name} is there twice, in two dialects")
            tensors[ours] = info
            readers[ours] = functools.partial(file.read, name)
    rules = diffusers.table(architecture, params).rules
    report = engine.check(rules, params, tensors, diffusers.unused(architecture))
    engine.require_complete(report, folder.name)
    return _Plan(architecture, rules, params, tensors, lambda name: readers[name](), tuple(paths.values()), report)


def _moving_averages(rules: list[engine.Rule], tensors: Mapping[str, TensorInfo], where: str) -> dict[str, str]:
    """The name of each UNet tensor -> that of its moving average: the same without dots, after "model_ema."."""
    if not any(name.startswith("model_ema.") for name in tensors):
        raise CheckpointError(f"{where}: holds no moving averages (model_ema.*)")
    twins = {}
    for name in dict.fromkeys(rule.foreign for rule in rules):
        if name.startswith(f"{ldm.UNET}."):
            twin = "model_ema." + name.removeprefix("model.").replace(".", "")
            if twin not in tensors or tensors[twin].shape != tensors[name].shape:
                raise CheckpointError(f"{where}: {name} has no moving average {twin} of its shape")
            twins[name] = twin
    return twins
