"""Each network of v2-1-stable-unclip-h at its real size against recordings of the original PyTorch implementation.

    pytest -m heavy tests/test_golden_full_size.py

Weights are made tensor by tensor under the names of the published file, so nothing is downloaded and a network needs
little more memory than its own parameters: at most 5 GiB. The recordings: tests/golden/full_size.json.
Tolerances are relative to the size of the whole array; beside each is the error that was measured.
"""

import jax
import numpy as np
import pytest

from tests.golden_weights import GOLDEN, full_size_network
from unclip_jax.conditioning.clip_image import preprocess

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("fully_compiled")]

RECORDED = np.load(GOLDEN / "full_size.npz")
COMPONENTS = np.load(GOLDEN / "components.npz")


def run(network, function, *arguments):
    """`function` of the module and the arguments, compiled."""
    return jax.jit(lambda params, *args: function(network.merge(params), *args))(network.params, *arguments)


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def test_unet():
    inputs = (RECORDED[f"unet_{name}"] for name in ("x", "t", "context", "classes"))
    out = run(full_size_network("unet"), lambda unet, *arguments: unet(*arguments), *inputs)
    assert relative_error(out, RECORDED["unet_out"]) < 2e-5  # 3e-6


def test_text_encoder():
    states = run(full_size_network("text_encoder"), lambda encoder, tokens: encoder(tokens), COMPONENTS["tokens"])
    assert relative_error(states[..., ::16], RECORDED["text_context"]) < 2e-5  # 1e-6


def test_image_encoder():
    pixels = preprocess(np.load(GOLDEN / "trajectories.npz")["landscape"], "original")[None]
    embeds = run(full_size_network("image_encoder"), lambda encoder, pixels: encoder(pixels), pixels)
    assert relative_error(embeds, RECORDED["image_embeds"]) < 2e-5  # 1e-6


def test_vae():
    network = full_size_network("vae")
    picture = COMPONENTS["vae_picture"].astype(np.float32) / 127.5 - 1
    posterior = run(network, lambda vae, picture: vae.encode(picture), picture)
    mean, logvar = np.split(RECORDED["vae_moments"], 2, axis=-1)
    assert relative_error(posterior.mean, mean) < 2e-5  # 4e-6
    assert relative_error(posterior.logvar, np.clip(logvar, -30, 20)) < 2e-5  # 4e-6
    decoded = run(network, lambda vae, z: vae.decode(z), RECORDED["vae_z"])
    assert relative_error(decoded[:, ::4, ::4], RECORDED["vae_decoded"]) < 2e-5  # 5e-6
