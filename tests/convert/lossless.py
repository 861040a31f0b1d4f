"""Architectures of every kind, and their tensors through a table of rules and back."""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from convert import engine
from convert.architecture.presets import PRESETS
from convert.random import TINY
from convert.readers import TensorInfo
from unclip_jax.models.configs import UNetConfig, VAEConfig

UPSCALER_UNET = UNetConfig(
    in_channels=7,
    block_out_channels=(64, 128, 128, 256),
    attention_levels=(False, True, True, True),
    num_heads=(8, 8, 8, 8),
    cross_attention_dim=64,
    only_cross_attention=(True, True, True, False),
    class_embedding="table",
    class_embedding_size=1000,
)


TEXT_TO_IMAGE = dataclasses.replace(
    TINY,
    unet=dataclasses.replace(TINY.unet, class_embedding=None, class_embedding_size=None),
    image_encoder=None,
    image_noising=None,
)


ARCHITECTURES = {
    **PRESETS,
    "tiny": TINY,
    "text-to-image": TEXT_TO_IMAGE,
    "inpainting": dataclasses.replace(TEXT_TO_IMAGE, unet=dataclasses.replace(TEXT_TO_IMAGE.unet, in_channels=9)),
    "upscaler": dataclasses.replace(
        TEXT_TO_IMAGE, unet=UPSCALER_UNET, vae=VAEConfig(block_out_channels=(32, 64, 128), scaling_factor=0.08333)
    ),
}


@st.composite
def unets(draw):
    """UNets of every kind, small."""
    levels = draw(st.integers(1, 3))

    def per_level(values):
        return tuple(draw(st.lists(values, min_size=levels, max_size=levels)))

    embedding = draw(st.sampled_from([None, "projection", "table"]))
    return UNetConfig(
        in_channels=draw(st.integers(1, 9)),
        out_channels=draw(st.integers(1, 8)),
        block_out_channels=tuple(8 * c for c in per_level(st.integers(1, 3))),
        layers_per_block=draw(st.integers(1, 2)),
        attention_levels=per_level(st.booleans()),
        num_heads=per_level(st.sampled_from([1, 2, 4])),
        cross_attention_dim=TINY.text_encoder.width,
        only_cross_attention=per_level(st.booleans()),
        class_embedding=embedding,
        class_embedding_size=draw(st.integers(1, 9)) if embedding else None,
        norm_groups=4,
    )


def foreign_arrays(rules, params, dtype=np.float32):
    """Random tensors as a file in the foreign layout would hold them."""
    generator = np.random.default_rng(0)
    shapes = {rule.foreign: engine.foreign_shape(rule, params) for rule in rules}
    return {name: generator.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def assert_lossless(rules, params, arrays):
    """Importing the tensors and exporting what came out gives the very same bits."""
    tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    assert engine.check(rules, params, tensors, []).complete
    imported = engine.import_params(rules, params, tensors, arrays.__getitem__)
    ours = {name: parameter.read() for name, parameter in imported.items()}
    for name, spec in params.items():
        assert ours[name].shape == spec.shape
        assert ours[name].dtype == imported[name].dtype
    exported = engine.export_tensors(rules, imported)
    assert exported.keys() == arrays.keys()
    for name, tensor in exported.items():
        assert (tensor.shape, tensor.dtype) == (arrays[name].shape, arrays[name].dtype)
        np.testing.assert_array_equal(tensor.read(), arrays[name], strict=True)
