"""Every pipeline of the family with the smallest of models, and a good call of each."""

import dataclasses

import jax
import numpy as np

import unclip_jax
from tests import small_models
from unclip_jax import ProjectedGuidance
from unclip_jax.adapters.changes import LowRank
from unclip_jax.distributed.mesh import local_mesh

HEIGHT, WIDTH = 20, 24  # pixels; latents are 10x12, and of an upscaler as large as its image
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Kind:
    """model: of `small_models`. pipeline: of `unclip_jax`. settings: what a call has beside what all have."""

    model: str
    pipeline: str
    settings: dict = dataclasses.field(default_factory=dict)


def photo(seed=0, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def hole(height=HEIGHT, width=WIDTH):
    """White in the middle."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 3 : 2 * width // 3] = 255
    return mask


PROJECTED = ProjectedGuidance(0.5)
HOLE = {"image": photo(), "mask_image": hole()}
SIZE = {"height": HEIGHT, "width": WIDTH}
# Each with another kind of guidance.
KINDS = {
    "text to image": Kind("TEXT_TO_IMAGE", "TextToImagePipeline", {**SIZE, "guidance_rescale": 0.3}),
    "image to image": Kind("TEXT_TO_IMAGE", "ImageToImagePipeline", {"image": photo()}),
    "variation of latents": Kind(
        "SMALL", "ImageToImagePipeline", {"image": photo(), "noise_level": 100, "pag_scale": 2.0}
    ),
    "depth": Kind("DEPTH", "DepthToImagePipeline", {"image": photo()}),
    "inpainting": Kind("INPAINT", "InpaintPipeline", {**HOLE, "guidance_interval": (0.1, 5.0)}),
    "inpainting, four channels": Kind("TEXT_TO_IMAGE", "InpaintPipeline", HOLE),
    "inpainting by a picture": Kind(
        "SMALL", "InpaintPipeline", {**HOLE, "condition_image": photo(9), "projected_guidance": PROJECTED}
    ),
    "upscaling": Kind("UPSCALE", "UpscalePipeline", {"image": photo()}),
    "instruction": Kind(
        "INSTRUCT", "InstructPipeline", {"image": photo(), "image_guidance_scale": 1.7, "pag_scale": 1.5}
    ),
    "variations": Kind("SMALL", "UnCLIPPipeline", {**SIZE, "image": photo(), "noise_level": 300}),
}
COMMON = {"prompt": "a cat", "num_inference_steps": STEPS, "scheduler": "ddim", "eta": 1.0, "seed": 3}
COMMON |= {"guidance_scale": 4.0, "output_type": "latent"}


def open_pipeline(folder, pipeline, devices=1, *, dtype="float32", progress=True, **options):
    mesh = local_mesh(jax.local_devices()[:devices])
    pipe = getattr(unclip_jax, pipeline).from_pretrained(folder, dtype, mesh, **options)
    pipe.progress = progress
    return pipe


def arguments(name, **changes):
    """Of a good call of a kind, with changes."""
    return {**COMMON, **KINDS[name].settings, **changes}


class Compilations:
    """Counts the programs that XLA compiles, or fetches from the cache, while it is open."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *exc):
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event, duration, **details):
        self.count += event == "/jax/core/compile/backend_compile_duration"


def one_level(config):
    """A model with a UNet of one level, with attention in the middle alone: it is compiled in a third of the time."""
    level = {"block_out_channels": (32,), "attention_levels": (False,), "num_heads": (2,)}
    unet = dataclasses.replace(config.unet, **level, only_cross_attention=(False,))
    return dataclasses.replace(config, unet=unet)


def task_of(name):
    """The task of a kind, and the configuration of its model."""
    kind = KINDS[name]
    return getattr(unclip_jax, kind.pipeline).task, one_level(getattr(small_models, kind.model))


def write(name, folder):
    """A model of `small_models`, but of one level."""
    return small_models.write(one_level(getattr(small_models, name)), folder)


def without_encoder(width):
    """An unCLIP model without an image encoder, for embeddings of this width."""
    config = one_level(small_models.SMALL)
    unet = dataclasses.replace(config.unet, class_embedding_size=2 * width)
    return dataclasses.replace(config, unet=unet, image_encoder=None)


def random_lora(config, seed, rank=2):
    """Of a layer of the UNet, of one of the text encoder."""
    rng = np.random.default_rng(seed)
    width, context = config.text_encoder.width, config.unet.cross_attention_dim

    def change(inner, out):
        return LowRank(
            rng.standard_normal((inner, rank), np.float32), rng.standard_normal((rank, out), np.float32), np.float32(2)
        )

    name = "unet.mid_block.attentions.0.attn2.to_k.kernel"
    return {name: change(context, 32), "text_encoder.layers.0.q_proj.kernel": change(width, width)}
