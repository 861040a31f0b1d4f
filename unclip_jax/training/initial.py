"""The initial weights of a network that does not start from a checkpoint."""

import re
from typing import Any

import jax.numpy as jnp
from flax import nnx

from unclip_jax.checkpoints.networks import Network, abstract_network
from unclip_jax.models.unet import UNet

# The end of every residual branch of the UNet but the feed-forward's, and its last convolution: at first each block
# passes on what it gets.
_ZERO = re.compile(r"(?!.*\.ff\.)(.*\.)?(conv2|proj_out|conv_out)\.(kernel|bias)")


def initial_network(cls: Any, config: Any, seed: int, **options: Any) -> Network:
    """`cls(config)` with random float32 weights.

    A UNet's residual branches end in zeros, as the original's do.

    Args:
        cls: The network's class.
        config: Its configuration.
        seed: Determines the weights.
        **options: Other arguments of `cls`, such as `remat`.

    Returns:
        The network.
    """
    network = abstract_network(cls, config, **options)
    _, state = nnx.split(cls(config, rngs=nnx.Rngs(seed)))
    params = {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}
    if cls is UNet:
        params = {name: jnp.zeros_like(v) if _ZERO.fullmatch(name) else v for name, v in params.items()}
    return Network(network.graphdef, params)
