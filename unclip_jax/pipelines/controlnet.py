"""ControlNets in a call: opened beside a checkpoint, and given to the calls of its pipelines with their hints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from unclip_jax.checkpoints.checkpoint import Checkpoint, controlnet_config
from unclip_jax.checkpoints.networks import Network
from unclip_jax.checkpoints.source import open_controlnet
from unclip_jax.compilation import use_compilation_cache
from unclip_jax.models.configs import ControlNetConfig
from unclip_jax.pipelines.opening import fill_network


class ControlNet:
    """A ControlNet on its devices, for the argument `controlnet` of a call. Open it with `from_pretrained`.

    Args:
        config: Its architecture.
        network: Its network, with parameters.
        mesh: The devices.
        dtype: Of weights and computation.
        source: Where it came from, for messages and the description of a bulk job.
    """

    def __init__(self, config: ControlNetConfig, network: Network, mesh: Mesh, dtype: Any, source: str):
        self.config, self.network, self.mesh, self.dtype, self.source = config, network, mesh, dtype, source

    @property
    def name(self) -> str:
        """What it is called in recipes: the name of its file, folder or repository."""
        return Path(self.source).name

    def __repr__(self) -> str:
        return f"ControlNet({self.name!r}, {jnp.dtype(self.dtype).name})"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        **options: Any,
    ) -> ControlNet:
        """Opens a ControlNet and puts it on the devices.

        Args:
            source: A diffusers folder, an original file (`control_model.*`), a converted directory, or one of these on
                the hub. None: that of the demo model.
            dtype: As for the pipeline that it is given to. None: float32 on a CPU, bfloat16 on accelerators.
            mesh: The pipeline's. None: all local devices along "data".
            options: `config`, `variant`, `revision`, `subfolder`, `mirrors`, as for
                `unclip_jax.checkpoints.open_controlnet`.

        Raises:
            FileNotFoundError: There is nothing at the source.
            ValueError: A file or an argument is refused.
        """
        use_compilation_cache()
        with open_controlnet(source, **options) as checkpoint:
            return cls.from_checkpoint(checkpoint, dtype, mesh)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, dtype: DTypeLike | None = None, mesh: Mesh | None = None
    ) -> ControlNet:
        """Fills the network of an open checkpoint, see `from_pretrained`. Raises ValueError."""
        config = controlnet_config(checkpoint)
        return cls(config, *fill_network(checkpoint, "controlnet", dtype, mesh), checkpoint.source)
