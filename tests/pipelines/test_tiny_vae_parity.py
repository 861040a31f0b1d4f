"""Calls with a tiny autoencoder as the VAE against diffusers: same weights and noise.

The largest difference of the final image, in 0..1, must be at most 1e-3; measured: 6.7e-5.
"""

import diffusers
import jax
import pytest
import torch
from diffusers import AutoencoderTiny

import unclip_jax
from tests.pipelines import family
from tests.pipelines.family import KINDS, compare
from tests.references import disturbed
from unclip_jax.distributed.mesh import local_mesh

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),  # there too
    pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning"),  # one image for all
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
]

TOLERANCE = 1e-3


def tiny():
    """diffusers' own, with two levels as the VAE that it replaces, and another scale of its latents than 1."""
    torch.manual_seed(3)
    widths = {"encoder_block_out_channels": (16,) * 2, "decoder_block_out_channels": (16,) * 2}
    model = AutoencoderTiny(**widths, num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1), scaling_factor=0.7)
    return disturbed(model, size=0.1)


@pytest.mark.parametrize(
    ("name", "saved_with"), [("text to image", False), ("image to image", True), ("inpainting", False)]
)
def test_every_way_to_begin(name, saved_with, tmp_path):
    """From noise; from an image's latents; with the latents of another image as further channels.

    saved_with: whether the folder of the pipeline has it, or it is given as `vae`.
    """
    kind = KINDS[name]
    folder = family.build(kind, tmp_path)
    theirs = getattr(diffusers, kind.theirs).from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    theirs.register_modules(vae=tiny())
    (theirs if saved_with else theirs.vae).save_pretrained(tmp_path / "tiny")
    source, options = (tmp_path / "tiny", {}) if saved_with else (folder, {"vae": tmp_path / "tiny"})
    mesh = local_mesh(jax.local_devices()[:1])
    ours = getattr(unclip_jax, kind.ours).from_pretrained(source, "float32", mesh, **options)
    ours.progress = False
    apart, wanted = compare(kind, theirs, ours, "ddim", 3)
    assert apart <= TOLERANCE
    assert wanted.std() > 0.02
