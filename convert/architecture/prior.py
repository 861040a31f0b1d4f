"""Reads the architecture of a text-to-image prior: Karlo's yaml, OpenAI's tensors, a diffusers folder's JSON files."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.architecture.diffusers import _Config, _text, read_json
from convert.architecture.original import _load
from convert.readers import CheckpointError, TensorInfo
from unclip_jax.checkpoints.config import PriorCheckpointConfig
from unclip_jax.models.configs import PriorConfig, TextConfig
from unclip_jax.models.prior import EXTRA_TOKENS
from unclip_jax.reference import Reference
from unclip_jax.sampling.solvers.unclip_scheduler import prior_solver

# What Karlo's own code does, in the settings of diffusers' scheduler for it. (Its diffusers folder clips at 5.)
KARLO_SCHEDULER: dict[str, Any] = {
    "_class_name": "UnCLIPScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "clip_sample_range": 10.0,
    "num_train_timesteps": 1000,
    "prediction_type": "sample",
    "variance_type": "fixed_small_log",
}
# Karlo's yaml: what stands beside the sizes.
KARLO_DIFFUSION = {
    "steps": 1000,
    "learn_sigma": False,
    "sigma_small": True,
    "noise_schedule": "squaredcos_cap_v2",
    "predict_xstart": True,
    "rescale_learned_sigmas": False,
}
KARLO_SIZES = {
    "embedding_dim": "clip_dim",
    "context_length": "text_ctx",
    "width": "xf_width",
    "layers": "xf_layers",
    "heads": "xf_heads",
}
# Options of PriorTransformer at the values that make it Karlo's.
FIXED: dict[str, tuple[Any, ...]] = {
    "additional_embeddings": (EXTRA_TOKENS,),
    "time_embed_act_fn": ("silu",),
    "norm_in_type": (None,),
    "embedding_proj_norm_type": (None,),
    "encoder_hid_proj_type": ("linear",),
    "added_emb_type": ("prd",),
}
CLASSES = {"prior": "PriorTransformer", "text_encoder": "CLIPTextModelWithProjection"}
PREFIX = "prior_"  # of the parts' names where they lie in the folder of a larger pipeline


def from_karlo_yaml(path: Path) -> PriorConfig:
    """The architecture in Karlo's yaml of a prior.

    Raises:
        CheckpointError: It is anything else. The message names the key.
    """
    root = _load(path)
    model = root.get("model") if isinstance(root, Mapping) else None
    if not isinstance(model, Mapping) or model.get("type") != "prior" or not isinstance(model.get("hparams"), Mapping):
        raise CheckpointError(f"{path.name}: no yaml of Karlo's prior: want model.type 'prior' and model.hparams")
    diffusion = root.get("diffusion", {})
    for key, wanted in KARLO_DIFFUSION.items():
        value = diffusion.get(key, wanted) if isinstance(diffusion, Mapping) else None
        if value != wanted:
            raise CheckpointError(f"{path.name}: diffusion.{key} is {value!r:.80}; accepted: {wanted!r}")
    if model["hparams"].get("xf_final_ln", True) is not True:
        raise CheckpointError(f"{path.name}: model.hparams.xf_final_ln is not true, which this network has")
    sizes = {}
    for ours, theirs in KARLO_SIZES.items():
        value = model["hparams"].get(theirs, getattr(PriorConfig, ours))
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 20:
            raise CheckpointError(f"{path.name}: model.hparams.{theirs} is {value!r:.80}; want a positive integer")
        sizes[ours] = value
    return _built(PriorConfig, path.name, **sizes)


def karlo_yaml(config: PriorConfig) -> dict[str, Any]:
    """Karlo's yaml for a prior, as plain data."""
    sizes = {theirs: getattr(config, ours) for ours, theirs in KARLO_SIZES.items()}
    return {
        "model": {
            "type": "prior",
            "diffusion_sampler": "uniform",
            "hparams": {**sizes, "xf_final_ln": True, "text_drop": 0.2},
        },
        "diffusion": {**KARLO_DIFFUSION, "use_kl": False, "timestep_respacing": ""},
    }


def text_from_tensors(tensors: Mapping[str, TensorInfo], where: str) -> TextConfig:
    """The text tower that OpenAI's loader builds for these tensors: heads are 64 wide, and the GELU is the quick one.

    tensors: under OpenAI's own names.

    Raises:
        CheckpointError: There is no such tower.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != axes:
            raise CheckpointError(f"{where}: no text tower of OpenAI's CLIP: no {name} of {axes} axes")
        return tensors[name].shape

    vocabulary, width = shape("token_embedding.weight", 2)
    length, _ = shape("positional_embedding", 2)
    _, projection = shape("text_projection", 2)
    mlp, _ = shape("transformer.resblocks.0.mlp.c_fc.weight", 2)
    layers = {m[1] for name in tensors if (m := re.match(r"transformer\.resblocks\.(\d{1,6})\.", name))}
    return _built(
        TextConfig,
        where,
        vocab_size=vocabulary,
        context_length=length,
        width=width,
        layers=len(layers),
        heads=max(1, width // 64),
        mlp_width=mlp,
        activation="quick_gelu",
        projection_dim=projection,
    )


def part_names(folder: Path) -> dict[str, str]:
    """The sub-folders of a prior's parts, with StableUnCLIPPipeline's prefix or without it, as in Karlo's folder."""
    names = ("text_encoder", "tokenizer")
    prefix = PREFIX if (folder / f"{PREFIX}text_encoder").is_dir() else ""
    return {"prior": "prior", "scheduler": f"{PREFIX}scheduler", **{name: prefix + name for name in names}}


def from_folder(folder: Path) -> PriorCheckpointConfig:
    """The prior that a diffusers folder describes.

    Args:
        folder: Holds `prior`, `prior_scheduler`, and the text encoder and tokenizer with or without "prior_" before
            their names; other contents are not read. A `model_index.json`, if there is one, must name the classes.

    Returns:
        The configuration.

    Raises:
        CheckpointError: It is not supported or not described. The message names file and key.
    """
    names = part_names(folder)
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        for part, wanted in CLASSES.items():
            entry = index.get(names[part])
            if not isinstance(entry, list) or len(entry) != 2 or entry[1] != wanted:
                raise CheckpointError(f"model_index.json: {names[part]} is {entry!r:.80}; want a {wanted}")
    c = _Config(folder / "prior" / "config.json")
    dim = c.integer("embedding_dim", 768)
    heads = c.integer("num_attention_heads", 32)
    width = c.size("num_attention_heads times attention_head_dim", heads * c.integer("attention_head_dim", 64))
    c.expect(FIXED)
    for key, same in (("embedding_proj_dim", dim), ("clip_embed_dim", dim), ("time_embed_dim", width)):
        c.expect({key: (None, same)})
    prior = c.build(
        PriorConfig,
        embedding_dim=dim,
        context_length=c.integer("num_embeddings", 77),
        width=width,
        layers=c.integer("num_layers", 20),
        heads=heads,
    )
    text = _Config(folder / names["text_encoder"] / "config.json")
    tower = dataclasses.replace(_text(text), projection_dim=text.integer("projection_dim", 512))
    scheduler = read_json(folder / names["scheduler"] / "scheduler_config.json")
    try:
        prior_solver(scheduler, 25)
    except ValueError as error:
        raise CheckpointError(f"{names['scheduler']}/scheduler_config.json: {error}") from error
    return _built(
        PriorCheckpointConfig,
        folder.name,
        prior=prior,
        text_encoder=tower,
        reference=Reference.DIFFUSERS,
        scheduler_config=scheduler,
    )


def _built(cls: Any, where: str, **values: Any) -> Any:
    """cls(**values), whose errors then name the file."""
    try:
        return cls(**values)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
