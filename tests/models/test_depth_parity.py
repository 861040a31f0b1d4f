"""The depth estimator's backbone live against timm's `vit_base_r50_s16_384`, by the names of the original's files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from flax import nnx

from convert import engine
from convert.rules import depth
from tests.models.comparisons import channels_first, normal, relative_error
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.networks import NETWORKS, abstract_network, fill
from unclip_jax.models.clip import run_layers
from unclip_jax.models.configs import DepthConfig

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("fully_compiled")]

# The whole ResNet, a narrow transformer.
CONFIG = DepthConfig(image_size=64, width=32, layers=3, heads=4, mlp_width=128, taps=(1, 2), fusion_width=16)


@torch.no_grad()
def test_backbone():
    side = CONFIG.image_size
    network = abstract_network(NETWORKS["depth_estimator"], CONFIG)
    rng = np.random.default_rng(0)

    def weight(name):
        """Scales near 1 and the rest small, so that every constant of a norm is felt."""
        shape = network.params[name].shape
        noise = rng.standard_normal(shape, np.float32)
        return 1 + 0.1 * noise if name.endswith("scale") else 0.05 * noise

    arrays = {name: weight(name) for name in network.params}
    ours = fill(network, arrays.__getitem__, lambda _, array: jax.device_put(array)).merge()

    table = engine.Table({f"depth_estimator.{name}": spec for name, spec in network.params.items()})
    depth.midas(table, "depth_model.model.", CONFIG)
    params = {f"depth_estimator.{name}": Parameter.of(array) for name, array in arrays.items()}
    prefix = "depth_model.model.pretrained.model."
    exported = engine.export_tensors(table.rules, params)
    state = {
        name.removeprefix(prefix): torch.from_numpy(np.ascontiguousarray(parameter.read()))
        for name, parameter in exported.items()
        if name.startswith(prefix)
    }
    reference = timm.create_model(
        "vit_base_r50_s16_384", img_size=side, embed_dim=32, depth=3, num_heads=4, num_classes=0
    ).eval()
    reference.load_state_dict(state, strict=True)

    seen = []
    stages, blocks = reference.patch_embed.backbone.stages, reference.blocks
    for module in (stages[0], stages[1], blocks[1], blocks[2]):
        module.register_forward_hook(lambda _, inputs, out: seen.append(out.numpy()))
    pixels = normal(2, side, side, 3)
    reference.forward_features(channels_first(pixels))

    x = nnx.max_pool(nnx.relu(ours.stem(jnp.asarray(pixels))), (3, 3), strides=(2, 2), padding="SAME")
    maps = []
    for stage in ours.stages:
        x = stage(x)
        maps.append(np.moveaxis(np.asarray(x), -1, 1))
    tokens = ours.patch_projection(x).reshape(2, -1, CONFIG.width)
    start = jnp.broadcast_to(ours.class_token[...], (2, 1, CONFIG.width))
    x = jnp.concatenate([start, tokens], axis=1) + ours._positions(side // 16, side // 16)
    early = run_layers(ours.layers, x, None, stop=2)
    late = run_layers(ours.layers, early, None, start=2)
    # Measured: 1.5e-6, 5e-6, 3.2e-5, 3.2e-5. Rounding: timm in float32 is as far from timm in float64.
    for got, want, tolerance in zip((*maps[:2], early, late), seen, (5e-6, 2e-5, 1e-4, 1e-4), strict=True):
        assert relative_error(got, want) < tolerance
