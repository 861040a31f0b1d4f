"""A tiny autoencoder beside a pipeline: it decodes the previews of `stream`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from unclip_jax.checkpoints.checkpoint import Checkpoint, tiny_vae_config
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import Network
from unclip_jax.checkpoints.source import open_tiny_vae
from unclip_jax.compilation import use_compilation_cache
from unclip_jax.models.configs import AutoencoderTinyConfig
from unclip_jax.pipelines.opening import fill_network
from unclip_jax.pipelines.parts import one_by_one
from unclip_jax.progress import Progress


class TinyVAE:
    """A tiny autoencoder on its devices, for `Pipeline.tiny_vae`. Open it with `from_pretrained`.

    Args:
        config: Its architecture.
        network: Its network, with parameters.
        mesh: The devices.
        dtype: Of weights and computation.
        source: Where it came from, for messages.
    """

    def __init__(self, config: AutoencoderTinyConfig, network: Network, mesh: Mesh, dtype: Any, source: str):
        self.config, self.network, self.mesh, self.dtype, self.source = config, network, mesh, dtype, source
        self._program = jax.jit(functools.partial(_decode, network.graphdef))

    def __repr__(self) -> str:
        return f"TinyVAE({Path(self.source).name!r}, {jnp.dtype(self.dtype).name})"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        **options: Any,
    ) -> TinyVAE:
        """Opens a tiny autoencoder and puts it on the devices.

        Args:
            source: The folder of diffusers' AutoencoderTiny, TAESD's own files, a converted directory, or one of these
                on the hub, such as "madebyollin/taesd". None: that of the demo model.
            dtype: Of weights and computation. None: float32 on a CPU, bfloat16 on accelerators.
            mesh: The pipeline's. None: all local devices along "data".
            options: `variant`, `revision`, `subfolder`, `mirrors`, as for `unclip_jax.checkpoints.open_tiny_vae`.

        Raises:
            FileNotFoundError: There is nothing at the source.
            ValueError: A file or an argument is refused.
        """
        use_compilation_cache()
        with open_tiny_vae(source, **options) as checkpoint:
            return cls.from_checkpoint(checkpoint, dtype, mesh)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, dtype: DTypeLike | None = None, mesh: Mesh | None = None
    ) -> TinyVAE:
        """Fills the network of an open checkpoint, see `from_pretrained`. Raises ValueError."""
        config = tiny_vae_config(checkpoint)
        return cls(config, *fill_network(checkpoint, "vae", dtype, mesh), checkpoint.source)

    def decode_latents(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (B, h, w, 4), those of a UNet -> images (B, H, W, 3) float32 in 0..1."""
        silent = Progress("decoding", len(latents), unit="image", enabled=False)
        images = one_by_one(self.mesh, self._program, self.network.params, latents, silent)
        return np.asarray(images)


def _decode(structure: Any, params: Any, latents: jax.Array) -> jax.Array:
    model = Network(structure, params).merge()
    return jnp.clip(model.decode(latents / model.config.scaling_factor) / 2 + 0.5, 0.0, 1.0)


def previews(tiny: TinyVAE | None, config: CheckpointConfig) -> Callable[[np.ndarray], np.ndarray] | None:
    """What decodes the previews of a pipeline; None without a tiny autoencoder.

    Raises ValueError for latents with other channels.
    """
    if tiny is None:
        return None
    if tiny.config.latent_channels != config.vae.latent_channels:
        raise ValueError(
            f"tiny_vae has {tiny.config.latent_channels} latent channels; the pipeline's VAE has "
            f"{config.vae.latent_channels}"
        )
    return tiny.decode_latents
