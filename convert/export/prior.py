"""Writes a text-to-image prior as Karlo's files, or as the parts of a diffusers folder."""

import io
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from convert.architecture.prior import CLASSES, PREFIX, karlo_yaml
from convert.engine import export_tensors
from convert.export.diffusers_configs import VERSION, _text
from convert.export.model_folder import json_text
from convert.export.tokenizer import tokenizer_files
from convert.prior import STATISTICS_SUFFIX, TEXT_SUFFIX, YAML_SUFFIX
from convert.rules import prior as rules
from convert.statistics import STATISTICS
from unclip_jax.checkpoints.atomic import atomic_directory, atomic_files
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter, prior_config
from unclip_jax.checkpoints.config import PriorCheckpointConfig
from unclip_jax.checkpoints.stream import Progress, write_safetensors
from unclip_jax.models.configs import PriorConfig
from unclip_jax.models.prior import EXTRA_TOKENS


def save_karlo_prior(
    checkpoint: Checkpoint, destination: Path, *, dtype: np.dtype | None, progress: Progress
) -> list[Path]:
    """Writes a `.safetensors` file under Karlo's names.

    What Karlo keeps in other files is written beside it: `<destination>.text_encoder.safetensors`, the text tower under
    OpenAI's names; `<destination>.stats.npz`; and `<destination>.yaml` for an architecture other than the published
    one.

    Args:
        checkpoint: The open checkpoint.
        destination: The file.
        dtype: The dtype to write; None keeps each tensor's own.
        progress: Called with the number of bytes written.

    Returns:
        Every file written, the prior last.

    Raises:
        ValueError: OpenAI's loader, which goes by the tensors only, would mistake the text tower for another.
    """
    config = prior_config(checkpoint)
    if config.text_encoder.activation != "quick_gelu" or config.text_encoder.width != 64 * config.text_encoder.heads:
        raise ValueError(
            f"the text tower has activation {config.text_encoder.activation!r} and heads {config.text_encoder.heads}; "
            "Karlo's is OpenAI's, with 'quick_gelu' and heads that are 64 wide"
        )
    params = {name: p for name, p in checkpoint.params.items() if name not in STATISTICS}
    parts: dict[str, dict[str, Parameter]] = {"": {}, TEXT_SUFFIX: {}}
    for name, tensor in export_tensors(rules.karlo(config.prior, config.text_encoder, params).rules, params).items():
        part = TEXT_SUFFIX if name.startswith(f"{rules.TEXT}/") else ""
        parts[part][name.removeprefix(f"{rules.TEXT}/")] = tensor
    mean, std = (checkpoint.params[name].read() for name in STATISTICS)
    np.savez(buffer := io.BytesIO(), mean=mean, std=std)
    beside = {STATISTICS_SUFFIX: buffer.getvalue()}
    if config.prior != PriorConfig():
        beside[YAML_SUFFIX] = yaml.safe_dump(karlo_yaml(config.prior), sort_keys=False).encode()
    places = {suffix: destination.with_name(destination.name + suffix) for suffix in (*beside, TEXT_SUFFIX)}
    with atomic_files(destination, *places.values()) as partial:
        for suffix, tensors in parts.items():
            write_safetensors(partial / (destination.name + suffix), tensors, dtype, {"format": "pt"}, progress)
        for suffix, content in beside.items():
            (partial / places[suffix].name).write_bytes(content)
    return [*places.values(), destination]


def save_diffusers_prior(
    checkpoint: Checkpoint, destination: Path, *, dtype: np.dtype | None, progress: Progress
) -> list[Path]:
    """Writes a folder of the four parts that StableUnCLIPPipeline takes, each of which opens by its `subfolder`.

    The scheduler is a DDPMScheduler: Karlo's own, UnCLIPScheduler, must be given each previous timestep, which that
    pipeline does not do.

    Args:
        checkpoint: The open checkpoint.
        destination: The folder to create.
        dtype: The dtype to write; None keeps each tensor's own.
        progress: Called with the number of bytes written.

    Returns:
        The folder's path, in a list of one.
    """
    config = prior_config(checkpoint)
    text = f"{PREFIX}text_encoder"
    components: dict[str, dict[str, Parameter]] = defaultdict(dict)
    for name, tensor in export_tensors(
        rules.diffusers(config, checkpoint.params, text).rules, checkpoint.params
    ).items():
        component, _, within = name.partition("/")
        components[component][within] = tensor
    kinds = Counter((tensor.dtype if dtype is None else dtype).name for tensor in components[text].values())
    tower = _text(config.text_encoder, kinds.most_common(1)[0][0]) | {"architectures": [CLASSES["text_encoder"]]}
    files: dict[str, Any] = {
        "prior/config.json": _prior(config.prior),
        f"{PREFIX}scheduler/scheduler_config.json": _scheduler(config),
        f"{text}/config.json": tower,
    }
    texts = {path: json_text(data) for path, data in files.items()}
    texts |= {f"{PREFIX}tokenizer/{path}": content for path, content in tokenizer_files(checkpoint.tokenizer).items()}
    with atomic_directory(destination) as partial:
        for path, content in texts.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_text(content, "utf-8")
        for component, tensors in components.items():
            stem = "model" if component == text else "diffusion_pytorch_model"
            write_safetensors(partial / component / f"{stem}.safetensors", tensors, dtype, {"format": "pt"}, progress)
    return [destination]


def _prior(config: PriorConfig) -> dict[str, Any]:
    return {
        "_class_name": "PriorTransformer",
        "_diffusers_version": VERSION,
        "additional_embeddings": EXTRA_TOKENS,
        "attention_head_dim": config.width // config.heads,
        "dropout": 0.0,
        "embedding_dim": config.embedding_dim,
        "num_attention_heads": config.heads,
        "num_embeddings": config.context_length,
        "num_layers": config.layers,
    }


def _scheduler(config: PriorCheckpointConfig) -> dict[str, Any]:
    settings = {"_diffusers_version": VERSION, **config.scheduler_config}
    if settings["_class_name"] != "UnCLIPScheduler":
        return settings
    # The same timesteps, which that class has under the name of their spacing.
    same = {"_class_name": "DDPMScheduler", "timestep_spacing": "linspace"}
    return {"beta_schedule": "squaredcos_cap_v2", **settings, **same}
