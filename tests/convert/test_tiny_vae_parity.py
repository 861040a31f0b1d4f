"""Tiny autoencoders of diffusers opened here, and ours opened by diffusers, with the same outputs."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from convert.export.diffusers import save_diffusers
from tests.convert.tiny_vae_files import SMALL, checkpoint
from tests.golden_weights import GOLDEN, inventory
from tests.references import disturbed
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import abstract_networks
from unclip_jax.checkpoints.source import open_tiny_vae
from unclip_jax.distributed.mesh import local_mesh

pytestmark = pytest.mark.parity

# Of another shape than TAESD; and as it is, but narrow.
KINDS = {
    "other": {
        "encoder_block_out_channels": (8,) * 3,
        "decoder_block_out_channels": (24,) * 3,
        "num_encoder_blocks": (0, 2, 1),
        "num_decoder_blocks": (1, 0, 2),
        "latent_channels": 5,
    },
    "taesd": {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4},
}
TOLERANCE = 1e-5  # of the largest number


def last(tensor):
    return tensor.movedim(1, -1).numpy()


def first(array):
    return torch.from_numpy(array).movedim(-1, 1)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_latents_and_images(name, tmp_path):
    torch.manual_seed(0)
    reference = disturbed(AutoencoderTiny(**KINDS[name]))
    path = tmp_path / "folder"
    reference.save_pretrained(path)
    if name == "taesd":  # under its own names, too, as `torch.save` leaves them
        path = tmp_path / "taesd"
        path.mkdir()
        for half, before in (("encoder", 0), ("decoder", 1)):
            tensors = getattr(reference, half).layers.state_dict()
            shifted = {f"{int(n.split('.')[0]) + before}.{n.partition('.')[2]}": t for n, t in tensors.items()}
            torch.save(shifted, path / f"taesd_{half}.pth")
    with open_tiny_vae(path) as opened:
        network = load_networks(opened, abstract_networks(opened.config), local_mesh())["vae"].merge()
    rng, factor = np.random.default_rng(1), network.config.factor
    images = rng.uniform(-1, 1, (2, 4 * factor, 6 * factor, 3)).astype(np.float32)
    # Beyond the limit of what the decoder lets through.
    latents = 3 * rng.standard_normal((2, 4, 6, network.config.latent_channels), np.float32)
    with torch.no_grad():
        pairs = [
            (network.encode(jnp.asarray(images)), last(reference.encode(first(images)).latents)),
            (network.decode(jnp.asarray(latents)), last(reference.decode(first(latents)).sample)),
        ]
    for got, want in pairs:
        assert want.std() > 0.01
        # Measured: at most 6.3e-7.
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


def test_diffusers_opens_the_folder(tmp_path):
    written = checkpoint(SMALL)
    save_diffusers(written, tmp_path / "folder")
    AutoencoderTiny.from_pretrained(tmp_path / "folder").save_pretrained(tmp_path / "again")
    with open_tiny_vae(tmp_path / "again") as back:
        assert back.config == written.config
        for name, parameter in written.params.items():
            np.testing.assert_array_equal(back.params[name].read(), parameter.read(), strict=True)


def test_the_inventory_is_diffusers_own():
    tensors = inventory(GOLDEN / "inventory" / "taesd.tsv.gz")
    with torch.device("meta"):
        model = AutoencoderTiny()
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: info.shape for name, info in tensors.items()
    }
