"""Opens tiny autoencoders: a folder of diffusers, or TAESD's own files, one for each half."""

import contextlib
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from convert import engine, layouts
from convert.architecture import tiny_vae as architecture
from convert.architecture.diffusers import TINY_VAE, read_json, torch_class
from convert.folder_weights import weights_file
from convert.kinds import kind_of, kind_of_folder
from convert.layouts import Place
from convert.readers import CheckpointError, TensorFile, TensorInfo, open_tensors
from convert.rules.tiny_vae import DIALECTS
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.config import TinyVAECheckpointConfig
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.models.configs import AutoencoderTinyConfig

PART, HALVES = "vae", ("encoder", "decoder")
SUFFIXES = (".safetensors", ".pth", ".pt")
# A half's tensors alone in a file have no name before the number: a convolution or a block's.
_BARE = re.compile(r"\d+\.(?:conv\.[024]\.)?(?:weight|bias)")


def is_tiny_vae(path: Path) -> bool:
    """Whether the path is a tiny autoencoder on its own, rather than among the parts of a pipeline."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return _class_name(path / "config.json") == TINY_VAE
        return not (path / "model_index.json").is_file() and _halves_in(path) is not None
    signs = [_BARE.pattern, *(dialect.sign for dialect in DIALECTS.values())]
    with open_tensors(path) as file:
        names = list(map(_within, file.tensors))
        return bool(names) and any(all(re.fullmatch(sign, name) for name in names) for sign in signs)


def open_tiny_vae(path: Path, *, variant: str | None = None) -> Checkpoint:
    """Opens a tiny autoencoder that is not ours.

    Args:
        path: The folder of diffusers' model, or of a pipeline with it as `vae`; a file of both halves in diffusers'
            or TAESD's names; a folder of TAESD's two files, or one of them, with the other beside it: their names
            differ in "encoder" and "decoder" alone.
        variant: Of a diffusers folder's weights, such as "fp16".

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: It is something else, is incomplete, or has another architecture.
    """
    with contextlib.ExitStack() as stack:
        plan = _plan(stack, path, variant)
        settings = TinyVAECheckpointConfig(plan.config)
        return Checkpoint(settings, None, plan.parameters, str(path), plan.files, stack.pop_all())


def check_tiny_vae(path: Path, *, variant: str | None = None) -> engine.Report:
    """Proves a tiny autoencoder complete from names, shapes and dtypes; reads no tensor data.

    The arguments and errors are those of `open_tiny_vae`.
    """
    with contextlib.ExitStack() as stack:
        return _plan(stack, path, variant).report


class _Plan(NamedTuple):
    config: AutoencoderTinyConfig
    parameters: dict[str, Parameter]
    files: tuple[Path, ...]
    report: engine.Report


def _plan(stack: contextlib.ExitStack, path: Path, variant: str | None) -> _Plan:
    settings, files = None, _files(path, variant)
    if path.is_dir() and "" in files:
        settings = architecture.from_config(files[""].parent / "config.json")
    held: dict[str, tuple[TensorFile, str]] = {}
    for half, weights in files.items():
        file = stack.enter_context(open_tensors(weights))
        held |= {f"{half}.{name}" if half else _within(name): (file, name) for name in file.tensors}
    places, names = layouts.locate((f"{PART}/{name}" for name in held), {PART: Place(f"{PART}/", "tiny")})
    own = {name: held[full.removeprefix(f"{PART}/")] for name, full in names.items()}
    tensors = {name: file.tensors[within] for name, (file, within) in own.items()}
    prefix, dialect = places[PART]
    bare = {name.removeprefix(prefix): info for name, info in tensors.items()}
    settings = settings or _shown(bare, path.name)
    params = abstract_params(TinyVAECheckpointConfig(settings))
    layouts.PARTS[PART][dialect].table(table := engine.Table(params), prefix, settings)
    report = engine.check(table.rules, params, tensors, (), {name: within for name, (_, within) in own.items()})
    engine.require_complete(report, path.name)
    readers = {name: functools.partial(file.read, within) for name, (file, within) in own.items()}
    parameters = engine.import_params(table.rules, params, tensors, lambda name: readers[name]())
    return _Plan(settings, parameters, tuple(files.values()), report)


def _files(path: Path, variant: str | None) -> dict[str, Path]:
    """The files of the weights: of both halves as "", or by half.

    Raises:
        CheckpointError: There are none.
    """
    if not path.is_dir():
        return _both_of(path) or {"": path}
    folder = path
    if (path / "model_index.json").is_file():
        entry = read_json(path / "model_index.json").get(PART)
        if not isinstance(entry, list) or len(entry) != 2 or torch_class(entry[1]) != TINY_VAE:
            raise CheckpointError(f"{path.name}: model_index.json: vae is {entry!r:.80}; want an {TINY_VAE}")
        folder = path / PART
    elif _class_name(path / "config.json") != TINY_VAE:
        if not (path / "config.json").is_file() and (halves := _halves_in(path)):
            return halves
        kind = kind_of_folder(path) or f"not a tiny autoencoder: want the config.json of diffusers' {TINY_VAE}"
        raise CheckpointError(f"{path.name}: {kind}")
    weights = weights_file(folder, variant)
    if variant is not None and f".{variant}" not in weights.name:
        raise CheckpointError(f"{path.name}: no weights of variant {variant!r}")
    return {"": weights}


def _halves_in(folder: Path) -> dict[str, Path] | None:
    """TAESD's two files in a folder that holds one such pair; None: there is none, or several."""
    found = [
        pair
        for suffix in SUFFIXES
        for encoder in sorted(folder.glob(f"*encoder*{suffix}"))
        if (decoder := encoder.with_name(encoder.name.replace("encoder", "decoder"))).is_file()
        and (pair := {"encoder": encoder, "decoder": decoder})
    ]
    stems = {pair["encoder"].stem for pair in found}
    return found[0] if len(stems) == 1 else None


def _both_of(path: Path) -> dict[str, Path] | None:
    """A file of one half, and the other's; None for a file of both.

    Raises:
        CheckpointError: The other half is missing.
    """
    with open_tensors(path) as file:
        if not all(_BARE.fullmatch(name) for name in file.tensors):
            return None
    half = next((half for half in HALVES if half in path.name), None)
    if half is None:
        raise CheckpointError(f"{path.name}: half of a tiny autoencoder; want 'encoder' or 'decoder' in its name")
    files = {other: path.with_name(path.name.replace(half, other)) for other in HALVES}
    if missing := [file for file in files.values() if not file.is_file()]:
        raise CheckpointError(
            f"{path.name}: half of a tiny autoencoder; the other, {missing[0].name}, is not beside it"
        )
    return files


def _shown(tensors: Mapping[str, TensorInfo], where: str) -> AutoencoderTinyConfig:
    """The architecture that tensors show; if they are something else, the error says what, where that is known."""
    try:
        return architecture.from_tensors(tensors, where)
    except CheckpointError as error:
        own = any(re.fullmatch(dialect.sign, name) for dialect in DIALECTS.values() for name in tensors)
        if not own and (kind := kind_of(tensors)):
            raise CheckpointError(f"{where}: {kind}") from error
        raise


def _within(name: str) -> str:
    """A tensor's name without that of the part, which some files have."""
    return name.removeprefix(f"{PART}.").removeprefix("first_stage_model.")


def _class_name(config: Path) -> str:
    """The class that a config.json names; "" if there is none."""
    with contextlib.suppress(CheckpointError):
        return str(torch_class(read_json(config).get("_class_name")))
    return ""
