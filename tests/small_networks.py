"""Networks of random weights on their own, for tests of networks."""

from typing import Any

import jax.numpy as jnp

from convert.random import random_parameter
from unclip_jax.checkpoints.networks import Network, abstract_network, fill


def random_network(cls: Any, config: Any, dtype: Any = jnp.float32) -> Network:
    """No bias is 0 and no scale 1, so that every edge shows. NumPy draws: the initialisers take seconds to compile."""
    network = abstract_network(cls, config, jnp.dtype(dtype))
    return fill(
        network,
        lambda name: random_parameter(name, network.params[name].shape, 0).read(),
        lambda name, array: jnp.asarray(array),
    )
