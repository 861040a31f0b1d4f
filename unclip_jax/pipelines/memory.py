"""What a pipeline does to need less memory."""

import dataclasses
from typing import Any, Literal, get_args

import jax

Decoding = Literal["whole", "seamless", "tiled"]
Convolution = Literal["winograd", "direct"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a pipeline does to need less memory. The defaults save nothing: every saving costs time.

    Images are always decoded one per device at a time.

    Args:
        decoding: "whole"; "seamless", the same images up to rounding with about half of the memory; or "tiled",
            diffusers' rule, with the memory of one tile, and images that depend a little on the tiles.
        tile: of "tiled", pixels along a side. None: the size that the checkpoint was trained at, as in diffusers.
        attention_chunk: queries that attention takes at a time in the UNet and the VAE. None: left to the platform.
        convolution: "winograd": on CPUs in float32, wide 3x3 convolutions of the UNet and the VAE by kernels that
            were transformed once, in about half of the time; they are held beside the weights (UNet and VAE of Stable
            Diffusion 2: 4.0 and 1.2 GiB more). "direct": by the weights themselves. None: "winograd" where it is
            possible and that much memory, and 2 GiB more, is free when the pipeline is opened; not over several hosts.
        free_networks: whether each network is read from the checkpoint when its stage begins, and freed after it.
        shard_weights: whether every weight is split over all devices of the mesh, instead of being whole on each (or
            on each of "data"). A layer gathers its own while it runs.

    Raises:
        ValueError: for other values.
    """

    decoding: Decoding = "whole"
    tile: int | None = None
    attention_chunk: int | None = None
    free_networks: bool = False
    convolution: Convolution | None = None
    shard_weights: bool = False

    def __post_init__(self) -> None:
        if self.decoding not in get_args(Decoding):
            raise ValueError(f"decoding is {self.decoding!r}; accepted: {', '.join(map(repr, get_args(Decoding)))}")
        if self.convolution is not None and self.convolution not in get_args(Convolution):
            raise ValueError(f"convolution is {self.convolution!r}; accepted: 'winograd', 'direct' or None")
        for name in ("free_networks", "shard_weights"):
            if self.convolution == "winograd" and getattr(self, name):
                raise ValueError(f"convolution is 'winograd', which needs memory, with {name}, which saves it")
        if self.tile is not None and self.decoding != "tiled":
            raise ValueError(f"tile is {self.tile}, but decoding is {self.decoding!r}; want 'tiled'")
        for name in ("tile", "attention_chunk"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} is {value!r}; want a positive integer")

    def check_tile(self, factor: int, sample_size: int) -> int:
        """Pixels along a tile's side. factor: the VAE's; sample_size: pixels that the checkpoint was trained at.

        Raises ValueError for tiles whose quarter is not a number of latent cells.
        """
        tile = sample_size if self.tile is None else self.tile
        if self.decoding == "tiled" and tile % (4 * factor):
            raise ValueError(f"tile is {tile}; want a multiple of {4 * factor} pixels")
        return tile

    def decode(self, vae: Any, z: jax.Array, tile: int) -> jax.Array:
        """`vae.decode(z)` in the way chosen. tile: in pixels, see `check_tile`."""
        from unclip_jax.models.tiling import decode_seamless, decode_tiled  # with Flax: only where this is traced

        if self.decoding == "seamless":
            return decode_seamless(vae, z)
        if self.decoding == "tiled":
            return decode_tiled(vae, z, tile // vae.config.factor)
        return vae.decode(z)
