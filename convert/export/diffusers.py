"""Writes a checkpoint as a complete diffusers folder: configurations, tokenizer, scheduler, weights."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from convert.engine import export_tensors
from convert.export.controlnet import save_diffusers_controlnet
from convert.export.diffusers_configs import diffusers_configs
from convert.export.model_folder import json_text
from convert.export.prior import save_diffusers_prior
from convert.export.tiny_vae import save_diffusers_tiny_vae
from convert.export.tokenizer import tokenizer_files
from convert.rules import diffusers
from unclip_jax.checkpoints.atomic import atomic_directory
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter, family_config
from unclip_jax.checkpoints.config import ControlNetCheckpointConfig, PriorCheckpointConfig, TinyVAECheckpointConfig
from unclip_jax.checkpoints.stream import Progress, write_safetensors

# Components that are transformers models name their weights otherwise than diffusers does.
TRANSFORMERS = ("text_encoder", "image_encoder", "depth_estimator")


def save_diffusers(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    dtype: np.dtype | None = None,
    progress: Progress = lambda nbytes: None,
) -> list[Path]:
    """Writes the folder that `DiffusionPipeline.from_pretrained` opens.

    Names are those of the older, prefixed dialect, which every release of transformers and diffusers reads. A prior
    becomes a folder of its four parts, see `convert.export.prior.save_diffusers_prior`; a ControlNet the folder of one
    model, see `convert.export.controlnet.save_diffusers_controlnet`, and a tiny autoencoder likewise. Needs memory for
    one tensor at a time.

    Args:
        checkpoint: The open checkpoint.
        destination: The folder to create.
        dtype: The dtype to write; None keeps each tensor's own.
        progress: Called with the number of bytes written.

    Returns:
        The folder's path, in a list of one.

    Raises:
        FileExistsError: `destination` exists.
    """
    if isinstance(checkpoint.config, PriorCheckpointConfig):
        return save_diffusers_prior(checkpoint, Path(destination), dtype=dtype, progress=progress)
    if isinstance(checkpoint.config, ControlNetCheckpointConfig):
        return save_diffusers_controlnet(checkpoint, Path(destination), dtype=dtype, progress=progress)
    if isinstance(checkpoint.config, TinyVAECheckpointConfig):
        return save_diffusers_tiny_vae(checkpoint, Path(destination), dtype=dtype, progress=progress)
    destination, config = Path(destination), family_config(checkpoint)
    components: dict[str, dict[str, Parameter]] = defaultdict(dict)
    rules = diffusers.table(config, checkpoint.params).rules
    for name, tensor in export_tensors(rules, checkpoint.params).items():
        component, _, within = name.partition("/")
        components[component][within] = tensor
    kinds = Counter((tensor.dtype if dtype is None else dtype).name for tensor in components["text_encoder"].values())
    with atomic_directory(destination) as partial:
        for path, data in diffusers_configs(config, kinds.most_common(1)[0][0]).items():
            _write(partial / path, json_text(data))
        for path, text in tokenizer_files(checkpoint.tokenizer).items():
            _write(partial / "tokenizer" / path, text)
        for component, tensors in components.items():
            stem = "model" if component in TRANSFORMERS else "diffusion_pytorch_model"
            (partial / component).mkdir(exist_ok=True)
            write_safetensors(partial / component / f"{stem}.safetensors", tensors, dtype, {"format": "pt"}, progress)
    return [destination]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
