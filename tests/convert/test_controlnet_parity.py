"""ControlNets of diffusers opened here, and ours opened by diffusers, with random weights and the same outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel

from convert.export.controlnet import controlnet_json
from convert.export.diffusers import save_diffusers
from convert.export.original import save_original
from tests.convert.controlnet_files import DESCRIBED, SHOWN, checkpoint
from tests.golden_weights import GOLDEN, inventory
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import abstract_networks
from unclip_jax.checkpoints.source import open_controlnet
from unclip_jax.distributed.mesh import local_mesh

pytestmark = pytest.mark.parity

CONFIGS = {"shown": SHOWN, "described": DESCRIBED}
# As diffusers' own defaults write them: a number of heads for all levels, projections that are convolutions.
TERSE = {"attention_head_dim": 2, "only_cross_attention": False, "use_linear_projection": False, "num_class_embeds": 5}


def random_controlnet(settings):
    """diffusers' own, with every parameter drawn, so that no zero convolution hides a difference."""
    torch.manual_seed(0)
    model = ControlNetModel.from_config(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(spread * torch.randn(parameter.shape) + name.endswith(("norm1.weight", "norm2.weight")))
    return model


def settings_of(name):
    return controlnet_json(SHOWN) | TERSE if name == "terse" else controlnet_json(CONFIGS[name])


def inputs(config):
    generator = np.random.default_rng(1)
    unet, side = config.unet, 8 * config.factor
    given = {
        "x": generator.standard_normal((2, 8, 8, unet.in_channels), np.float32),
        "timesteps": np.array([3.0, 961.0], np.float32),
        "context": generator.standard_normal((2, 5, unet.cross_attention_dim), np.float32),
        "hint": generator.random((2, side, side, config.conditioning_channels), np.float32),
    }
    if unet.class_embedding == "projection":
        given["class_labels"] = generator.standard_normal((2, unet.class_embedding_size), np.float32)
    elif unet.class_embedding == "table":
        given["class_labels"] = np.array([1, 4])
    return given


@pytest.mark.parametrize("kind", ["folder", "torch file"])
@pytest.mark.parametrize("name", [*CONFIGS, "terse"])
def test_the_same_residuals(name, kind, tmp_path):
    reference = random_controlnet(settings_of(name))
    reference.save_pretrained(tmp_path / "folder")
    path, options = tmp_path / "folder", {}
    if kind == "torch file":
        torch.save({"state_dict": reference.state_dict()}, tmp_path / "x.pth")
        path, options = tmp_path / "x.pth", {"config": tmp_path / "folder" / "config.json"}
    with open_controlnet(path, **options) as opened:
        config = opened.config.controlnet
        mesh = local_mesh(jax.local_devices()[:1])
        network = load_networks(opened, abstract_networks(opened.config), mesh)["controlnet"]
    given = inputs(config)
    got = network.merge()(**{name: jnp.asarray(value) for name, value in given.items()})
    there = {name: torch.from_numpy(value) for name, value in given.items()}
    with torch.no_grad():
        down, middle = reference(
            there["x"].movedim(-1, 1),
            there["timesteps"],
            there["context"],
            there["hint"].movedim(-1, 1),
            class_labels=there.get("class_labels"),
            return_dict=False,
        )
    assert len(got) == len(down) + 1
    for ours, theirs in zip(got, (*down, middle), strict=True):
        want = theirs.movedim(1, -1).numpy()
        assert np.abs(want).max() > 0.01
        # Measured: at most 8.3e-7 of the largest number.
        np.testing.assert_allclose(ours, want, rtol=0, atol=5e-6 * np.abs(want).max())


def assert_bit_equal(model, written, folder):
    model.save_pretrained(folder)
    with open_controlnet(folder) as back:
        assert back.config == written.config
        for key, parameter in written.params.items():
            np.testing.assert_array_equal(back.params[key].read(), parameter.read(), strict=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_opens_the_folder(name, tmp_path):
    written = checkpoint(CONFIGS[name])
    save_diffusers(written, tmp_path / "folder")
    assert_bit_equal(ControlNetModel.from_pretrained(tmp_path / "folder"), written, tmp_path / "again")


def test_diffusers_opens_the_originals_file(tmp_path):
    """By its own table of names, which knows eight convolutions of the hint and no class embedding."""
    written = checkpoint(dataclasses.replace(SHOWN, conditioning_embedding_out_channels=(4, 8, 12, 16)))
    save_diffusers(written, tmp_path / "folder")
    save_original(written, tmp_path / "x.safetensors")
    model = ControlNetModel.from_single_file(tmp_path / "x.safetensors", config=str(tmp_path / "folder"))
    assert_bit_equal(model, written, tmp_path / "again")


def test_the_inventory_is_diffusers_own():
    tensors = inventory(GOLDEN / "inventory" / "controlnet-sd21.tsv.gz")
    with torch.device("meta"):
        model = ControlNetModel(
            cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
        )
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: info.shape for name, info in tensors.items()
    }
