"""An unCLIP pipeline of any width with random weights, without a file; and one of its runs, ready to be taken."""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.architecture.presets import PRESETS
from gpu_stages.run import Run, unet_settings
from unclip_jax import UnCLIPPipeline
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import Network, abstract_networks
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json
from unclip_jax.distributed.mesh import local_mesh, replicated
from unclip_jax.models.configs import VAEConfig
from unclip_jax.pipelines.opening import Opened
from unclip_jax.pipelines.parts import Parts
from unclip_jax.pipelines.run import RunSteps, begin, chunk_of
from unclip_jax.sampling.loop import Carry
from unclip_jax.sampling.schedule import alphas_cumprod

CONTEXT = 77


def config_of(run: Run) -> CheckpointConfig:
    """Stable Diffusion 2.1 unCLIP-H, as small as the run."""
    config, narrow = PRESETS["sd21-unclip-h"], unet_settings(run)
    channels, heads = (tuple(narrow[name]) for name in ("block_out_channels", "attention_head_dim"))
    levels = len(channels)
    unet = dataclasses.replace(
        config.unet,
        block_out_channels=channels,
        num_heads=heads,
        layers_per_block=narrow["layers_per_block"],
        attention_levels=(*[True] * (levels - 1), False),
        only_cross_attention=(False,) * levels,
    )
    assert isinstance(config.vae, VAEConfig)
    of_vae = tuple(run.scaled(channels, 32) for channels in config.vae.block_out_channels)
    return dataclasses.replace(
        config,
        unet=unet,
        vae=dataclasses.replace(config.vae, block_out_channels=of_vae),
    )


def random_pipeline(run: Run) -> UnCLIPPipeline:
    """On the first device, silent. Its CLIP towers have no weights: give embeddings and states."""
    config, mesh = config_of(run), local_mesh(jax.local_devices()[:1])
    assert config.image_noising is not None
    assert config.image_embedding_dim is not None
    networks = abstract_networks(config, jnp.dtype(run.dtype))
    ring = np.random.default_rng(0).standard_normal(1 << 24, np.float32)
    for name in ("unet", "vae"):
        network = networks[name]
        params = {key: jax.device_put(value(ring, key, spec)) for key, spec in network.params.items()}
        networks[name] = Network(network.graphdef, params)
    width: int = config.image_embedding_dim
    tables = {
        "alphas_cumprod": alphas_cumprod(config.image_noising, config.reference),
        "mean": np.zeros(width, np.float32),
        "std": np.ones(width, np.float32),
    }
    tokenizer = Tokenizer(clip_tokenizer_json(), config.tokenizer_dialect, CONTEXT)
    noising = jax.device_put(tables, replicated(mesh))
    pipe = UnCLIPPipeline(Opened(config, tokenizer, networks, noising, mesh, jnp.dtype(run.dtype)))
    pipe.progress = False
    return pipe


def value(ring: np.ndarray, name: str, spec: Any) -> np.ndarray:
    """Random numbers scaled by the fan-in, from one long draw: a draw for each of a billion would take its time."""
    if len(spec.shape) < 2:
        return np.full(spec.shape, name.endswith("scale"), spec.dtype)
    part = ring[zlib.crc32(name.encode()) % 9973 :]
    return (np.resize(part, spec.shape) / math.sqrt(math.prod(spec.shape[:-1]))).astype(spec.dtype)


def arguments(run: Run, latents: int, batch: int) -> dict[str, Any]:
    """Of a guided call for so many images of this size, of one embedding and prompt."""
    rng, config = np.random.default_rng(1), config_of(run)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((1, *shape), np.float32)

    states = CONTEXT, config.unet.cross_attention_dim
    return {
        "image_embeds": draw(config.unet.class_embedding_size // 2),  # type: ignore[operator]  # an unCLIP's
        "prompt_embeds": draw(*states),
        "negative_prompt_embeds": draw(*states),
        "height": latents * config.vae.factor,
        "width": latents * config.vae.factor,
        "num_images_per_prompt": batch,
        "num_inference_steps": run.steps,
    }


def begun(pipe: UnCLIPPipeline, parts: Parts, given: dict[str, Any]) -> tuple[Carry, RunSteps]:
    """A call before its first step. parts: the pipeline's, perhaps with other programs; given: `arguments`."""
    request = pipe.check(**given)
    chunk = chunk_of(pipe.parts, request, np.arange(request.batch))
    return begin(parts, request, pipe.task.conditions(parts, request), chunk)
