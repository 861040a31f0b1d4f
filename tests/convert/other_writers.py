"""A small checkpoint as other programs save it: parts in any dialect, under any root, in any container."""

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from convert import layouts
from convert.engine import export_tensors
from convert.layouts import Place
from convert.random import SMALL, TINY, random_parameter
from convert.rules import ldm
from tests.convert.torch_files import integer, mapping, storage, tensor, torch_bytes
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.models.configs import VisionConfig

VISION = VisionConfig(56, 14, width=32, layers=2, heads=2, mlp_width=64, projection_dim=16)
TEXT_TO_IMAGE = SMALL["tiny-text-to-image"]
# Two levels, so that there is one of everything that has a number.
UNCLIP = dataclasses.replace(
    TINY,
    unet=dataclasses.replace(TEXT_TO_IMAGE.unet, class_embedding="projection", class_embedding_size=32, sample_size=8),
    vae=TEXT_TO_IMAGE.vae,
    image_encoder=VISION,
)

KINDS = {"float32": "torch.FloatStorage", "float16": "torch.HalfStorage", "bfloat16": "torch.BFloat16Storage"}
KINDS |= {"float64": "torch.DoubleStorage", "int64": "torch.LongStorage"}
# The names of the VAE's attention that writers put in the place of a dialect's own; as matrices where they are Linears.
ATTENTION = {
    "q": ("q", "k", "v", "proj_out"),
    "query": ("query", "key", "value", "proj_attn"),
    "to_q": ("to_q", "to_k", "to_v", "to_out.0"),
}


@dataclasses.dataclass(frozen=True)
class Writer:
    """How a program writes: the place of each part, other spellings, what it leaves beside, dtype, and container."""

    places: dict[str, Place] = dataclasses.field(default_factory=dict)
    attention: str = "q"
    matrices: bool = False
    text_model: bool = True
    wrapper: str = ""
    beside: tuple[str, ...] = ()
    dtype: str = "float32"
    container: str = "safetensors"


def parameters(config):
    """Random parameters that an original file holds."""
    return {name: random_parameter(name, spec.shape, 0) for name, spec in layouts.file_params(config).items()}


def tensors(config, writer):
    """The checkpoint's arrays under the names that this writer gives them."""
    params = parameters(config)
    rules = layouts.table(config, params, {**ldm.PLACES, **writer.places}).rules
    made = {name: _respelt(name, tensor.read(), writer) for name, tensor in export_tensors(rules, params).items()}
    arrays = {name: np.ascontiguousarray(array.astype(np.dtype(writer.dtype))) for name, array in made.values()}
    return arrays | {name: BESIDE[name](arrays) for name in writer.beside}


BESIDE = {
    "betas": lambda arrays: np.zeros(1000, np.float32),
    "model_ema.num_updates": lambda arrays: np.zeros((), np.int64),
    "denoiser.sigmas": lambda arrays: np.zeros(1000, np.float32),
    "noise_augmentor.sqrt_alphas_cumprod": lambda arrays: np.zeros(1000, np.float32),
    "v_pred": lambda arrays: np.zeros(0, np.float32),
    "global_step": lambda arrays: np.zeros((), np.int64),
    "cond_stage_model.model.logit_scale": lambda arrays: np.zeros((), np.float32),
    "cond_stage_model.model.text_projection": lambda arrays: np.zeros((64, 64), np.float32),
    "cond_stage_model.model.transformer.text_projection.weight": lambda arrays: np.zeros((64, 64), np.float32),
    "cond_stage_model.model.transformer.text_model.embeddings.position_ids": lambda arrays: np.arange(77)[None],
    "cond_stage_model.transformer.text_model.embeddings.position_ids": lambda arrays: np.arange(77.0)[None],
    "embedder.model.visual.vision_model.embeddings.position_ids": lambda arrays: np.arange(17, dtype=np.int32)[None],
    "embedder.model.token_embedding.weight": lambda arrays: np.zeros((4, 4), np.float16),
    "first_stage_model.loss.logvar": lambda arrays: np.zeros((), np.float32),
}


def _respelt(name, array, writer):
    spellings = dict(zip(("q", "k", "v", "proj_out"), ATTENTION[writer.attention], strict=True))
    if match := re.fullmatch(r"(.*mid\.attn_1)\.(q|k|v|proj_out)\.(weight|bias)", name):
        name = f"{match[1]}.{spellings[match[2]]}.{match[3]}"
        array = array[:, :, 0, 0] if writer.matrices and array.ndim == 4 else array
    spellings = dict(zip(ATTENTION["to_q"], ATTENTION[writer.attention], strict=True))
    if match := re.fullmatch(r"(.*mid_block\.attentions\.0)\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)", name):
        name = f"{match[1]}.{spellings[match[2]]}.{match[3]}"
        array = array[:, :, None, None] if not writer.matrices and array.ndim == 2 else array
    if not writer.text_model:
        name = name.replace("text_model.", "")
    return f"{writer.wrapper}{name}", array


def write(folder, config, writer):
    """Writes the checkpoint; returns what to open."""
    arrays = tensors(config, writer)
    if writer.container == "safetensors":
        save_file(arrays, folder / "file.safetensors", {"format": "pt"})
        return folder / "file.safetensors"
    if writer.container == "shards":
        places = {name: f"part-{index % 3}.safetensors" for index, name in enumerate(arrays)}
        for shard in set(places.values()):
            save_file({name: arrays[name] for name in arrays if places[name] == shard}, folder / shard)
        (folder / "file.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return folder / "file.safetensors.index.json"
    return write_torch(folder / "file.ckpt", arrays, nested=writer.container == "lightning")


def write_torch(path, arrays, *, nested):
    """A file of torch.save without torch; nested: as Lightning wraps it."""
    held, storages = {}, {}
    for index, (name, array) in enumerate(arrays.items()):
        key = str(index)
        strides = [1] * array.ndim
        for axis in range(array.ndim - 2, -1, -1):
            strides[axis] = strides[axis + 1] * array.shape[axis + 1]
        held[name] = tensor(
            storage(key, KINDS[array.dtype.name], array.size), shape=array.shape, strides=tuple(strides)
        )
        storages[key] = array.tobytes()
    code = mapping(held)
    if nested:
        code = mapping({"epoch": integer(3), "global_step": integer(470_000), "state_dict": code})
    path.write_bytes(torch_bytes(code, storages))
    return path


def plain(config, dtype="float32"):
    """The parameters as the plain file of this dtype gives them."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return {name: Parameter.of(parameter.read().astype(dtype)) for name, parameter in parameters(config).items()}
