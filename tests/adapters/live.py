"""What adapters beside diffusers' are compared by."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tests import small_models

TOLERANCE = 1e-5  # measured: 1.3e-6 of the UNet, 6e-7 of the text encoder


CONFIG = dataclasses.replace(
    small_models.TEXT_TO_IMAGE,
    unet=dataclasses.replace(
        small_models.TEXT_TO_IMAGE.unet,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        attention_levels=(True, True, False),
        num_heads=(2, 4, 4),
        only_cross_attention=(False,) * 3,
    ),
    text_encoder=dataclasses.replace(small_models.TEXT, context_length=24, layers=3, projection_dim=None),
)


X = np.random.default_rng(0).standard_normal((2, 16, 24, 4), np.float32)


TOKENS = np.random.default_rng(1).integers(0, 512, (2, 16))


TIMES = np.array([5, 700])


def predicted(networks, freeu=None):
    """The text encoder's states, and what the UNet makes of them."""
    context = networks["text_encoder"].merge()(jnp.asarray(TOKENS))
    unet = networks["unet"].merge()
    out = unet.denoise(X, unet.embed_time(jnp.asarray(TIMES)), unet.encode_context(context), freeu=freeu)
    return np.asarray(context), np.asarray(out)


def wanted(pipe):
    import torch

    with torch.no_grad():
        context = pipe.text_encoder(torch.tensor(TOKENS))[0]
        x = torch.tensor(np.ascontiguousarray(np.moveaxis(X, -1, 1)))
        out = pipe.unet(x, torch.tensor(TIMES), context).sample
    return context.numpy(), np.moveaxis(out.numpy(), 1, -1)


def check(made, want, base):
    for ours, theirs, before in zip(made, want, base, strict=True):
        assert np.linalg.norm(theirs - before) > 0.02 * np.linalg.norm(before)
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < TOLERANCE, error
