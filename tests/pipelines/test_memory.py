"""Options that need less memory make the same images, and the plan says what a run will need."""

import jax
import numpy as np
import pytest

from convert.export.lora import save_lora
from tests.pipelines.small_family import arguments, random_lora
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import check_mesh, local_mesh
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.plan import plan
from unclip_jax.pipelines.unclip import UnCLIPPipeline

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
        ({"convolution": "winograd", "shard_weights": True}, "'winograd', which needs memory, with shard_weights"),
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


@pytest.mark.e2e
def test_the_same_images_in_less_memory(opened, plain):
    want = plain(**CALL).images
    pipe = opened(memory=Memory("seamless", attention_chunk=16, free_networks=True))
    for _ in range(2):  # the networks come back for the second run
        np.testing.assert_allclose(pipe(**CALL).images, want, atol=2e-5)  # 2e-6
    assert list(pipe.residency.loaded) == ["vae"]
    assert all(isinstance(p, jax.ShapeDtypeStruct) for n in pipe.networks.values() for p in n.params.values())


def shards(pipe):
    """The share of its largest weight that a device holds, in each network."""
    largest = [max(network.params.values(), key=lambda weight: weight.nbytes) for network in pipe.networks.values()]
    return {weight.addressable_shards[0].data.nbytes / weight.nbytes for weight in largest}


@pytest.mark.e2e
def test_the_same_images_of_weights_over_all_devices(opened, plain):
    pipe = opened(4, memory=Memory(shard_weights=True))
    assert pipe.kernels is None
    assert shards(pipe) == {0.25}
    np.testing.assert_allclose(pipe(**CALL).images, plain(**CALL).images, atol=1e-5)


@pytest.mark.e2e
def test_sharded_weights_go_with_everything_else(opened, plain, family_folder, tmp_path):
    call = {**CALL, "num_images_per_prompt": 2}
    memory = Memory(shard_weights=True)
    mesh = check_mesh(jax.make_mesh((2, 2), ("data", "model")))
    over_both = UnCLIPPipeline.from_pretrained(family_folder("SMALL"), "float32", mesh, memory)
    over_both.progress = False
    assert shards(over_both) == {0.25}
    want = plain(**call).images
    np.testing.assert_allclose(over_both(**call).images, want, atol=1e-5)

    freed = opened(4, memory=Memory(free_networks=True, shard_weights=True))
    np.testing.assert_allclose(freed(**call).images, want, atol=1e-5)

    half = [opened(4, dtype="bfloat16", memory=memory)(**call).images for memory in (Memory(), memory)]
    np.testing.assert_allclose(*half, atol=1e-2)

    pipe = opened(4, memory=memory)
    *_, last = pipe.stream(**{name: value for name, value in call.items() if name != "output_type"})
    np.testing.assert_allclose(last.latents, plain(**{**call, "output_type": "latent"}).images, atol=1e-5)
    lora = save_lora(pipe.config, random_lora(pipe.config, 0), tmp_path / "lora.safetensors")
    try:
        for adapted in (pipe, plain):
            adapted.load_lora_weights(lora)
        assert shards(pipe) == {0.25}
        changed = plain(**call).images
        np.testing.assert_allclose(pipe(**call).images, changed, atol=1e-5)
        assert np.abs(changed - want).max() > 1e-3
    finally:
        plain.unload_lora_weights()


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


@pytest.mark.e2e
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


@pytest.mark.e2e
def test_the_plan_has_the_rows_of_the_task(family_folder, one_device):
    """Two of an image, and three where an instruction changes it."""
    two, three = 0, 0
    for model in ("TEXT_TO_IMAGE", "INSTRUCT"):
        with open_checkpoint(family_folder(model)) as checkpoint:
            stages = plan(checkpoint, 64, 64, 1, "float32", one_device)
        two, three = three, next(stage.activations for stage in stages if stage.name == "sampling")
    assert three > 1.1 * two  # 1.17


def test_the_plan_is_for_one_device_of_several(family_folder, small):
    """Four images on four devices: each holds what one image needs on one."""
    with open_checkpoint(family_folder("SMALL")) as checkpoint:
        split = plan(checkpoint, 64, 64, 4, "float32", local_mesh(jax.local_devices()[:4]))
    for one, many in zip(small, split, strict=True):
        assert many.weights == one.weights
        assert many.activations < 1.01 * one.activations


@pytest.mark.e2e
@pytest.mark.usefixtures("fully_compiled")
def test_the_plan_is_for_one_device_of_those_that_share_the_weights(family_folder, small):
    with open_checkpoint(family_folder("SMALL")) as checkpoint:
        sharded = plan(checkpoint, 64, 64, 4, "float32", local_mesh(), Memory(shard_weights=True))
    for one, many in zip(small, sharded, strict=True):
        assert 0.25 * one.weights < many.weights < 0.3 * one.weights  # biases and norms are whole
