"""Adapters change nothing at first, what they are told to later, and go again exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.export.lora import lora_tensors
from tests import small_models
from unclip_jax.models.unet import UNet
from unclip_jax.training.initial import initial_network
from unclip_jax.training.lora import EVERYTHING, adapted, as_lora, initial_lora, merge_lora


@pytest.fixture(scope="module")
def network():
    return initial_network(UNet, small_models.SMALL.unet, 0)


@pytest.mark.parametrize("targets", [r".*to_[qv]\.kernel", EVERYTHING])
def test_nothing_changes_at_first(network, targets):
    adapter = initial_lora(network.params, 4, 0, targets)
    merged = merge_lora(network.params, adapter)
    assert merged.keys() == network.params.keys()
    for name, value in merged.items():
        np.testing.assert_array_equal(value, network.params[name])
    assert min(float(jnp.abs(adapter[f"{name}.down"]).max()) for name in adapted(adapter)) > 0


def test_the_change_is_the_product_at_its_scale(network):
    adapter = initial_lora(network.params, 2, 0, r"conv_in\.kernel|.*attn1\.to_q\.kernel")
    rng = np.random.default_rng(0)
    adapter = {name: jnp.asarray(rng.standard_normal(value.shape), jnp.float32) for name, value in adapter.items()}
    for scale in (1.0, -0.5):
        merged = merge_lora(network.params, adapter, scale)
        for name in adapted(adapter):
            want = np.tensordot(adapter[f"{name}.down"], adapter[f"{name}.up"], 1) * scale
            np.testing.assert_allclose(merged[name] - network.params[name], want, atol=1e-5)
    gone = merge_lora(network.params, adapter, 0.0)
    assert all((gone[name] == network.params[name]).all() for name in gone)


def test_alpha_is_in_the_numbers(network):
    plain, doubled = (initial_lora(network.params, 4, 0, alpha=alpha) for alpha in (None, 8.0))
    for name in plain:
        np.testing.assert_allclose(doubled[name], 2 * plain[name], rtol=1e-6)


@pytest.mark.e2e
def test_half_precision_stays_and_gradients_reach_the_adapter_alone(network):
    params = {name: value.astype(jnp.bfloat16) for name, value in network.params.items()}
    adapter = initial_lora(params, 2, 0, r".*attn2\.to_k\.kernel")
    assert {value.dtype for value in merge_lora(params, adapter).values()} == {jnp.dtype(jnp.bfloat16)}
    name = adapted(adapter)[0]
    gradient = jax.grad(lambda a: jnp.square(merge_lora(params, a)[name].astype(jnp.float32)).sum())(adapter)
    assert float(jnp.abs(gradient[f"{name}.up"]).max()) > 0
    assert float(jnp.abs(gradient[f"{name}.down"]).max()) == 0  # until `up` is not zero


def test_what_does_not_fit_is_refused_by_name(network):
    adapter = initial_lora(network.params, 2, 0, r"conv_in\.kernel")
    with pytest.raises(ValueError, match=r"adapter of other\.kernel.*no such parameter"):
        merge_lora(network.params, {key.replace("conv_in", "other"): value for key, value in adapter.items()})
    with pytest.raises(ValueError, match="this network has shape"):
        merge_lora(network.params, {**adapter, "conv_in.kernel.up": jnp.zeros((2, 7))})
    with pytest.raises(ValueError, match=r"conv_in\.kernel\.up is missing"):
        merge_lora(network.params, {"conv_in.kernel.down": adapter["conv_in.kernel.down"]})
    with pytest.raises(ValueError, match="rank is 0"):
        initial_lora(network.params, 0, 0)


def test_an_export_has_pefts_names_and_shapes(network):
    adapter = initial_lora(network.params, 3, 0, EVERYTHING)
    tensors, metadata = lora_tensors(small_models.SMALL, as_lora(adapter, "unet"))
    assert len(tensors) == len(adapter)
    assert not metadata  # the scale is 1
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert tensors[f"{module}.lora_A.weight"].shape == (3, 32)
    assert tensors[f"{module}.lora_B.weight"].shape == (32, 3)
    conv = "unet.down_blocks.0.resnets.0.conv1"
    assert tensors[f"{conv}.lora_A.weight"].shape == (3, 32, 3, 3)
    assert tensors[f"{conv}.lora_B.weight"].shape == (32, 3, 1, 1)
