"""Float32 is float32 on devices whose own choice is TF32 or bfloat16: told by the programs that they would be given."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests import small_models, small_prior
from unclip_jax.checkpoints.networks import abstract_networks
from unclip_jax.models.attention import attend
from unclip_jax.models.inception import Inception
from unclip_jax.training.contrastive import contrastive_loss, decorrelation_loss

UNCLIP, DEPTH, PRIOR = small_models.SMALL, small_models.DEPTH, small_prior.CONFIG


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


NETWORKS = {
    "unet": (UNCLIP, "unet", "__call__", [array(1, 8, 8, 4), array(1), array(1, 77, 32), array(1, 32)]),
    "vae encoder": (UNCLIP, "vae", "moments", [array(1, 16, 16, 3)]),
    "vae decoder": (UNCLIP, "vae", "decode", [array(1, 8, 8, 4)]),
    "image encoder": (UNCLIP, "image_encoder", "__call__", [array(1, 32, 32, 3)]),
    "text encoder": (UNCLIP, "text_encoder", "__call__", [array(1, 16, dtype=jnp.int32)]),
    "depth estimator": (DEPTH, "depth_estimator", "__call__", [array(1, 64, 64, 3)]),
    "prior": (
        PRIOR,
        "prior",
        "__call__",
        [array(1, 64), array(1), array(1, 77, 64), array(1, 64), array(1, 77, dtype=bool)],
    ),
}


def products(function, *arrays, platform="tpu"):
    """The precisions of the products in a function's program for a platform: "" where JAX chooses."""
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)\b", line)]
    assert lines
    return {" ".join(sorted(set(re.findall(r"\b(?:HIGHEST|HIGH|DEFAULT)\b", line)))) for line in lines}


def called(name, dtype):
    """A network's function of its parameters and inputs, and these."""
    config, part, method, arrays = NETWORKS[name]
    network = abstract_networks(config, dtype)[part]
    return lambda params, *a: getattr(network.merge(params), method)(*a), network.params, *arrays


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_exact(name, platform):
    assert products(*called(name, jnp.float32), platform=platform) == {"HIGHEST"}


def test_gradients_are_exact():
    function, *arrays = called("unet", jnp.float32)
    assert products(jax.grad(lambda *a: function(*a).sum()), *arrays) == {"HIGHEST"}


def test_attention_in_blocks_is_exact():
    q = array(1, 1024, 2, 64)
    assert products(lambda q: attend(q, q, q, chunk=512), q) == {"HIGHEST"}


def test_the_network_of_the_metrics_is_exact():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0))))
    images = array(1, 64, 64, 3, dtype=jnp.uint8)
    assert products(lambda state, x: nnx.merge(graphdef, state)(x), state, images) == {"HIGHEST"}


def test_losses_of_embeddings_are_exact():
    rows = array(4, 8, dtype=jnp.bfloat16)
    assert products(lambda a, b: contrastive_loss(a, b, jnp.float32(1)), rows, rows) == {"HIGHEST"}
    assert products(decorrelation_loss, rows) == {"HIGHEST"}


def test_half_precision_is_left_to_jax():
    assert products(*called("unet", jnp.bfloat16)) <= {"", "DEFAULT"}


def test_the_choice_of_the_user_is_kept():
    with jax.default_matmul_precision("tensorfloat32"):
        assert products(*called("unet", jnp.float32), platform="cuda") == {"HIGH"}
