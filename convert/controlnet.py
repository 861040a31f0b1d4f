"""Opens ControlNets: a folder of diffusers, or one file in anybody's names."""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from convert import engine, layouts
from convert.architecture import controlnet as architecture
from convert.architecture.diffusers import read_json, torch_class
from convert.folder_weights import weights_file
from convert.kinds import CLASSES, CONTROLNET, OTHER_FAMILY, family_of, kind_by_mark, kind_of_folder, other_than
from convert.layouts import Place
from convert.readers import CheckpointError, TensorFile, TensorInfo, open_tensors
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import ControlNetCheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.models.configs import ControlNetConfig

PART = "controlnet"
CONFIG_SUFFIX = ".config.json"  # of the architecture beside a file, as `export.controlnet` writes it
BESIDE = [
    *layouts.OF_ANY_RUN,
    engine.Unused(
        r"(model|model_ema|first_stage_model|cond_stage_model)\..*", "the checkpoint that it was trained with"
    ),
]


def is_controlnet(path: Path) -> bool:
    """Whether the path is a ControlNet on its own, rather than among the parts of a pipeline."""
    if path.is_dir():
        kind = _class_name(path / "config.json")
        return not (path / "model_index.json").is_file() and re.fullmatch(CLASSES[CONTROLNET], kind) is not None
    with open_tensors(path) as file:
        return kind_by_mark(file.tensors) == CONTROLNET


def open_controlnet(path: Path, *, config: Path | None = None, variant: str | None = None) -> Checkpoint:
    """Opens a ControlNet that is not ours.

    Args:
        path: The folder of diffusers' model, or of a pipeline with it as `controlnet`; or a file of its tensors under
            the original's or diffusers' names, alone or among those of the checkpoint that it was trained with.
        config: For a file: diffusers' config.json. By default one is looked for beside the file, under the file's name
            with the suffix `.config.json` or as `config.json`, or else the tensors' shapes tell, if attention's heads
            are as wide as Stable Diffusion 2's.
        variant: Of a folder's weights, such as "fp16".

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: It is something else, is incomplete, or has another architecture.
    """
    with contextlib.ExitStack() as stack:
        plan = _plan(stack, path, config, variant)
        settings = ControlNetCheckpointConfig(plan.config)
        return Checkpoint(settings, None, plan.parameters, str(path), plan.files, stack.pop_all())


def check_controlnet(path: Path, *, config: Path | None = None, variant: str | None = None) -> engine.Report:
    """Proves a ControlNet complete from names, shapes and dtypes; reads no tensor data.

    The arguments and errors are those of `open_controlnet`.
    """
    with contextlib.ExitStack() as stack:
        return _plan(stack, path, config, variant).report


class _Plan(NamedTuple):
    config: ControlNetConfig
    parameters: dict[str, Parameter]
    files: tuple[Path, ...]
    report: engine.Report


def _plan(stack: contextlib.ExitStack, path: Path, config: Path | None, variant: str | None) -> _Plan:
    weights = path
    if path.is_dir():
        folder = _model_folder(path)
        config, weights = folder / "config.json", weights_file(folder, variant)
        if variant is not None and f".{variant}" not in weights.name:
            raise CheckpointError(f"{path.name}: no weights of variant {variant!r}")
    else:
        config = config or _beside(path)
    settings = None if config is None else architecture.from_config(config)
    file = stack.enter_context(open_tensors(weights))
    rooted = any(layouts.part_of(name) == PART for name in file.tensors)
    # Alone in a file its tensors need no root.
    given = {name if rooted else f"{PART}/{name}": name for name in file.tensors}
    with _saying_what_it_is(file, path.name):
        places, names = layouts.locate(given, {PART: Place(f"{PART}/", "diffusers")})
        tensors = {name: file.tensors[given[full]] for name, full in names.items()}
        prefix, dialect = places[PART]
        within = {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}
        if family := family_of(within):
            raise CheckpointError(f"{path.name}: is of {family}: {OTHER_FAMILY}")
        settings = settings or architecture.from_tensors(within, dialect, path.name)
        params = abstract_params(ControlNetCheckpointConfig(settings))
        layouts.PARTS[PART][dialect].table(table := engine.Table(params), prefix, settings)
        own = {name: given[full] for name, full in names.items()}
        unused = [engine.Unused(f"({PART}/)?({item.pattern})", item.reason) for item in BESIDE]
        report = engine.check(table.rules, params, tensors, unused, own)
        engine.require_complete(report, path.name)
    readers = {name: functools.partial(file.read, held) for name, held in own.items()}
    parameters = engine.import_params(table.rules, params, tensors, lambda name: readers[name]())
    return _Plan(settings, parameters, (weights, *([] if config is None else [config])), report)


def _model_folder(path: Path) -> Path:
    """The folder of the model itself.

    Raises:
        CheckpointError: There is none.
    """
    if (path / "model_index.json").is_file():
        entry = read_json(path / "model_index.json").get(PART)
        if not isinstance(entry, list) or len(entry) != 2 or torch_class(entry[1]) != architecture.CLASSES[0]:
            several = "; of several, name one's folder as subfolder=" if entry else ""
            raise CheckpointError(
                f"{path.name}: model_index.json: {PART} is {entry!r:.80}; want a {architecture.CLASSES[0]}{several}"
            )
        return path / PART
    if not is_controlnet(path):
        if (path / "config.json").is_file():
            read_json(path / "config.json")  # says what is wrong with it, if that is the reason
        kind = kind_of_folder(path) or "not a ControlNet: want the config.json of diffusers' ControlNetModel"
        raise CheckpointError(f"{path.name}: {kind}")
    return path


def _beside(path: Path) -> Path | None:
    """The architecture beside a file, if it is there."""
    own = path.with_name(path.name + CONFIG_SUFFIX)
    if own.is_file():
        return own
    shared = path.with_name("config.json")
    return shared if _class_name(shared) in architecture.CLASSES else None


def _class_name(config: Path) -> str:
    """The class that a config.json names; "" if there is none."""
    with contextlib.suppress(CheckpointError):
        return str(read_json(config).get("_class_name"))
    return ""


@contextlib.contextmanager
def _saying_what_it_is(file: TensorFile, where: str) -> Iterator[None]:
    """If it is no ControlNet, the error says what it is instead, where that is known."""
    try:
        yield
    except CheckpointError as error:
        tensors: Mapping[str, TensorInfo] = file.tensors
        if kind := other_than(CONTROLNET, tensors):
            raise CheckpointError(f"{where}: {kind}") from error
        raise
