"""Opens CLIP models on their own: open_clip's checkpoints and transformers' folders."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import engine
from convert.architecture.diffusers import read_clip, read_json
from convert.architecture.original import ARCHITECTURES, read_open_clip
from convert.readers import CheckpointError, TensorInfo, open_tensors
from convert.rules import clip as names
from convert.rules.flax import flax_rules, is_flax
from convert.tokenizer import open_tokenizer
from convert.weights import weights_file
from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.checkpoints.places import OPEN_CLIP
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json

# open_clip's trainer saves what it wrapped for several devices under one more name.
WRAPPER = "module."


def is_open_clip(path: Path) -> bool:
    """Whether a file holds the tensors of an open_clip model, rather than a whole Stable Diffusion checkpoint."""
    with open_tensors(path) as file:
        return any(name.removeprefix(WRAPPER) == "visual.conv1.weight" for name in file.tensors)


def is_transformers_clip(folder: Path) -> bool:
    """Whether a folder was saved by transformers' CLIPModel."""
    try:
        return read_json(folder / "config.json").get("model_type") == "clip"
    except (OSError, CheckpointError):
        return False


def is_clip(path: Path) -> bool:
    """Whether the path is a CLIP model on its own."""
    return is_transformers_clip(path) if path.is_dir() else is_open_clip(path)


def open_open_clip(source: Path | str, *, config: Path | str | None = None) -> Checkpoint:
    """Opens an open_clip model with both towers.

    Args:
        source: Its weights; or "open_clip:NAME/TAG", which open_clip (extra `convert`) downloads, and whose
            architecture it knows. TAG may be a path.
        config: open_clip's JSON for the architecture, or a name in `convert.architecture.original.ARCHITECTURES`. By
            default an `open_clip_config.json` beside the file is read, or else the tensors must be those of ViT-H-14.

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: It is anything else.
        ImportError: open_clip is missing. The message says what to install.
    """
    if str(source).startswith(OPEN_CLIP):
        path, described = _published(str(source).removeprefix(OPEN_CLIP))
    else:
        path = Path(source)
        described = _description(path, config)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_tensors(path))
        own = {name.removeprefix(WRAPPER): name for name in file.tensors}
        tensors = {name: file.tensors[original] for name, original in own.items()}
        architecture = read_open_clip(described, path.name)
        params = abstract_params(architecture)
        rules = names.open_clip_model(architecture, params).rules
        engine.require_complete(engine.check(rules, params, tensors, names.OPEN_CLIP_UNUSED), path.name)
        parameters = engine.import_params(rules, params, tensors, lambda name: file.read(own[name]))
        length = architecture.text_encoder.context_length
        tokenizer = Tokenizer.from_json(clip_tokenizer_json(), "open_clip", length)
        return Checkpoint(architecture, tokenizer, parameters, str(source), (path,), stack.pop_all())


def open_transformers_clip(folder: Path, *, variant: str | None = None) -> Checkpoint:
    """Opens a folder of transformers' CLIPModel with its tokenizer.

    Args:
        folder: The folder.
        variant: Of the weights, such as "fp16".

    Returns:
        The open checkpoint.

    Raises:
        CheckpointError: The folder is broken.
    """
    with contextlib.ExitStack() as stack:
        architecture = read_clip(folder / "config.json")
        path = weights_file(folder, variant)
        file = stack.enter_context(open_tensors(path))
        tensors: Mapping[str, TensorInfo] = file.tensors
        params = abstract_params(architecture)
        rules = names.transformers_model(architecture, params).rules
        if is_flax(tensors):
            rules = flax_rules(rules)
        engine.require_complete(engine.check(rules, params, tensors, names.TRANSFORMERS_UNUSED), folder.name)
        parameters = engine.import_params(rules, params, tensors, file.read)
        tokenizer = open_tokenizer(folder, architecture.text_encoder.context_length)
        return Checkpoint(architecture, tokenizer, parameters, str(folder), (path,), stack.pop_all())


def _description(path: Path, config: Path | str | None) -> dict[str, Any]:
    if config is None:
        beside = path.with_name("open_clip_config.json")
        return _read(beside) if beside.is_file() else ARCHITECTURES["ViT-H-14"]
    return ARCHITECTURES.get(str(config)) or _read(Path(config))


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path)
    return data.get("model_cfg", data)


def _published(name: str) -> tuple[Path, dict[str, Any]]:
    """The weights and the description of NAME/TAG, from open_clip."""
    architecture, _, tag = name.partition("/")
    try:
        import open_clip as library
    except ImportError:
        raise ImportError(
            f"open_clip:{name}: needs the package open_clip_torch: pip install 'unclip-jax[convert]'"
        ) from None
    description = library.get_model_config(architecture)
    if description is None:
        raise CheckpointError(f"open_clip has no architecture {architecture!r}")
    if Path(tag).is_file():
        return Path(tag), description
    published = library.get_pretrained_cfg(architecture, tag)
    if not published:
        tags = ", ".join(library.list_pretrained_tags_by_model(architecture)) or "none"
        raise CheckpointError(f"open_clip has no weights {tag!r} of {architecture}; it has {tags}")
    # Weights that were trained with OpenAI's activation say so themselves.
    quick = {"quick_gelu": True} if published.get("quick_gelu") else {}
    return Path(library.download_pretrained(published)), {**description, **quick}
