"""Options that need less memory make the same images, and the plan says what a run will need."""

import jax
import numpy as np
import pytest

from tests.pipelines.small_family import arguments
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.plan import plan

CALL = arguments("variations", output_type="np")


@pytest.fixture(scope="module")
def one_device():
    return local_mesh(jax.local_devices()[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoding": "half"}, "decoding is 'half'; accepted: 'whole', 'seamless', 'tiled'"),
        ({"tile": 64}, "tile is 64, but decoding is 'whole'"),
        ({"decoding": "tiled", "tile": 0}, "tile is 0; want a positive integer"),
        ({"attention_chunk": -1}, "attention_chunk is -1"),
        ({"attention_chunk": 1.5}, "attention_chunk is 1.5"),
        ({"attention_chunk": True}, "attention_chunk is True"),
        ({"convolution": "fast"}, "convolution is 'fast'; accepted: 'winograd', 'direct' or None"),
        ({"convolution": "winograd", "free_networks": True}, "'winograd', which needs memory, with free_networks"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Memory(**options)


@pytest.fixture(scope="module")
def plain(family):
    return family("variations")


def test_a_tile_has_to_fit_the_vae(opened):
    with pytest.raises(ValueError, match="tile is 10; want a multiple of 8 pixels"):
        opened(memory=Memory("tiled", 10))


def test_the_same_images_in_less_memory(opened, plain):
    want = plain(**CALL).images
    pipe = opened(memory=Memory("seamless", attention_chunk=16, free_networks=True))
    for _ in range(2):  # the networks come back for the second run
        np.testing.assert_allclose(pipe(**CALL).images, want, atol=2e-5)  # 2e-6
    assert list(pipe.residency.loaded) == ["vae"]
    assert all(isinstance(p, jax.ShapeDtypeStruct) for n in pipe.networks.values() for p in n.params.values())


def test_tiles_change_an_image_a_little(opened, plain):
    want = plain(**CALL).images
    made = opened(memory=Memory("tiled", 8))(**CALL).images
    assert made.shape == want.shape
    assert 1e-5 < np.abs(made - want).mean() < 0.2


@pytest.fixture(scope="module")
def small(family_folder, one_device):
    """The plan for one image of 64x64 pixels on one device."""
    with open_checkpoint(family_folder("SMALL")) as checkpoint:
        return plan(checkpoint, 64, 64, 1, "float32", one_device)


def test_the_plan_holds_all_weights_or_those_of_its_stage(family_folder, one_device, small):
    with open_checkpoint(family_folder("SMALL")) as checkpoint:
        large = plan(checkpoint, 128, 64, 4, "float32", one_device)
        freed = plan(checkpoint, 64, 64, 1, "float32", one_device, Memory(free_networks=True))
        parts = checkpoint.describe()["parts"]
        with pytest.raises(ValueError, match="height is 51"):
            plan(checkpoint, 51, None, 1, "float32", one_device)
        with pytest.raises(ValueError, match="batch is 0"):
            plan(checkpoint, None, None, 0, "float32", one_device)
    runs = ["encoding images", "encoding prompts", "sampling", "decoding"]
    assert [s.name for s in small] == ["loading weights", *runs]  # on a CPU
    assert [s.name for s in freed] == runs
    names = ("image_encoder", "text_encoder", "unet", "vae")
    weights = {name: 4 * parts[name]["parameters"] for name in names}
    assert {s.weights for s in small} == {sum(weights.values())}
    assert [s.weights for s in freed] == list(weights.values())
    assert all(f.activations >= s.activations for f, s in zip(freed, small[1:], strict=True))  # and the reading
    assert large[3].activations > 3 * small[3].activations  # eight times the latent cells
    assert large[4].activations > 1.5 * small[4].activations  # images are decoded one at a time
    assert large[:3] == small[:3]


def test_the_plan_is_for_one_device_of_several(family_folder, small):
    """Four images on four devices: each holds what one image needs on one."""
    with open_checkpoint(family_folder("SMALL")) as checkpoint:
        split = plan(checkpoint, 64, 64, 4, "float32", local_mesh(jax.local_devices()[:4]))
    for one, many in zip(small, split, strict=True):
        assert many.weights == one.weights
        assert many.activations < 1.01 * one.activations
