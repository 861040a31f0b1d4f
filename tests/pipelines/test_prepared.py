"""Kernels in Winograd's domain: which there are, that images stay the same, and that adapters reach them."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from tests import small_models
from tests.pipelines.small_family import arguments, one_level, open_pipeline
from unclip_jax import Memory, cli
from unclip_jax.adapters.changes import LowRank
from unclip_jax.checkpoints.networks import abstract_network
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.models.configs import UNetConfig, VAEConfig
from unclip_jax.models.layers import Conv
from unclip_jax.models.unet import UNet
from unclip_jax.models.vae import VAE
from unclip_jax.pipelines import prepared
from unclip_jax.pipelines.plan import plan
from unclip_jax.pipelines.prepared import kernel_tiles, make_kernels, transformed_specs

CALL = arguments("variations", output_type="np")
KERNEL = "mid_block.resnets.0.conv1.kernel"


@pytest.mark.parametrize(("cls", "config", "count"), [(UNet, UNetConfig(), 47), (VAE, VAEConfig(), 51)])
def test_all_wide_convolutions_of_stride_1_are_transformed(cls, config, count):
    """By the networks themselves: a name that the strided ones do not share would be found here."""
    network = abstract_network(cls, config)
    want = {
        ".".join(map(str, path)) + ".kernel"
        for path, module in nnx.iter_modules(network.merge())
        if isinstance(module, Conv) and module.stride == 1
        if module.kernel.shape[:2] == (3, 3) and min(module.kernel.shape[2:]) >= 128
    }
    assert set(kernel_tiles(network.params)) == want
    assert len(want) == count


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A model with convolutions that are wide enough."""
    config = one_level(small_models.SMALL)
    config = dataclasses.replace(
        config,
        unet=dataclasses.replace(config.unet, block_out_channels=(128,)),
        vae=dataclasses.replace(config.vae, block_out_channels=(64, 128)),
    )
    return small_models.write(config, tmp_path_factory.mktemp("wide") / "model")


def opened(folder, convolution, devices=1):
    memory = Memory(convolution=convolution)
    return open_pipeline(folder, "UnCLIPPipeline", devices, progress=False, memory=memory)


@pytest.fixture(scope="module")
def direct(wide_folder):
    return opened(wide_folder, "direct")


@pytest.fixture(scope="module")
def winograd(wide_folder):
    return opened(wide_folder, "winograd")


def difference(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_images_stay_the_same(direct, winograd):
    own = winograd.networks["unet"].params[KERNEL]
    want = direct(**CALL)
    assert direct.kernels is None
    got = winograd(**CALL)
    assert difference(got.latents, want.latents) < 1e-5  # 1.5e-6
    assert difference(got.images, want.images) < 1e-5  # 1e-6
    # The network's own stay where they were.
    assert winograd.networks["unet"].params[KERNEL] is own
    assert {name.split(".")[0] for name in winograd.kernels.made} == {"unet", "vae"}
    assert len(winograd.parts.weights("unet")[KERNEL].shape) == 3


@pytest.mark.e2e
def test_images_are_the_same_over_devices(wide_folder, direct):
    got = opened(wide_folder, "winograd", devices=2)(**CALL, num_images_per_prompt=2)
    want = direct(**CALL, num_images_per_prompt=2)
    assert difference(got.latents, want.latents) < 1e-5  # 1.5e-6


def test_adapters_reach_the_kernels(direct, winograd, tmp_path):
    from convert.export.lora import save_lora

    rng = np.random.default_rng(0)
    change = LowRank(
        rng.standard_normal((3, 3, 128, 2), np.float32), rng.standard_normal((2, 128), np.float32), np.float32(0.1)
    )
    file = save_lora(direct.config, {f"unet.{KERNEL}": change}, tmp_path / "lora.safetensors")
    plain = winograd(**CALL).latents
    before = dict(winograd.kernels.made)
    for pipe in (direct, winograd):
        pipe.load_lora_weights(file)
    changed = winograd(**CALL).latents
    assert difference(changed, plain) > 1e-3
    assert difference(changed, direct(**CALL).latents) < 1e-5
    made = winograd.kernels.made
    assert {name for name, kernels in made.items() if kernels is not before[name]} == {f"unet.{KERNEL}"}
    for pipe in (direct, winograd):
        pipe.unload_lora_weights()
    np.testing.assert_array_equal(winograd(**CALL).latents, plain)


def test_they_are_made_where_they_serve(winograd, monkeypatch):
    networks, mesh = winograd.networks, winograd.mesh
    assert make_kernels(networks, mesh, "float32", Memory()) is not None
    assert make_kernels(networks, mesh, "float32", Memory(convolution="direct")) is None
    assert make_kernels(networks, mesh, "float32", Memory(free_networks=True)) is None
    assert make_kernels(networks, mesh, "bfloat16", Memory()) is None
    split = Mesh(np.asarray(jax.local_devices()[:2]), ("model",))
    assert make_kernels(networks, split, "float32", Memory()) is None
    for place, dtype in ((mesh, "float16"), (split, "float32")):
        with pytest.raises(ValueError, match='convolution is "winograd"; that needs float32 on CPUs'):
            make_kernels(networks, place, dtype, Memory(convolution="winograd"))
    more = sum(4 * spec.size for specs in transformed_specs(networks).values() for spec in specs.values())
    monkeypatch.setattr(prepared, "available_memory", lambda: 2**31 + more - 1)
    assert make_kernels(networks, mesh, "float32", Memory()) is None
    assert make_kernels(networks, mesh, "float32", Memory(convolution="winograd")) is not None
    monkeypatch.setattr(prepared, "available_memory", lambda: 2**31 + more)
    assert make_kernels(networks, mesh, "float32", Memory()) is not None


@pytest.mark.e2e
def test_the_plan_counts_them(wide_folder):
    mesh = local_mesh(jax.local_devices()[:1])
    with open_checkpoint(wide_folder) as checkpoint:
        lean = plan(checkpoint, 32, 32, 1, "float32", mesh, Memory(convolution="direct"))
        fast = plan(checkpoint, 32, 32, 1, "float32", mesh)
        half = plan(checkpoint, 32, 32, 1, "bfloat16", mesh)
        networks = {"unet": abstract_network(UNet, checkpoint.config.unet)}
        networks["vae"] = abstract_network(VAE, checkpoint.config.vae)
    sizes = {part: sum(4 * spec.size for spec in specs.values()) for part, specs in transformed_specs(networks).items()}
    more = {f.name: f.weights - s.weights for f, s in zip(fast, lean, strict=True)}
    assert more["loading weights"] == more["encoding prompts"] == 0
    assert more["sampling"] == sizes["unet"] > 0
    assert more["decoding"] == sizes["unet"] + sizes["vae"] > sizes["unet"]
    assert half[0].weights == lean[0].weights / 2
    assert len({stage.weights for stage in half}) == 1


def test_info_tells_both_peaks(wide_folder, capsys):
    plan_of = ["info", str(wide_folder), "--plan", "--height", "32", "--width", "32", "--devices", "1"]
    assert cli.main(plan_of) == 0
    fast = capsys.readouterr().out
    assert cli.main([*plan_of, "--lean"]) == 0
    lean = capsys.readouterr().out
    assert "with --lean" not in lean
    peaks = {line.split(":")[0].strip(): line.split(":")[1] for line in (fast + lean).splitlines() if "MiB, " in line}
    assert peaks["with --lean"] == peaks["peak"]  # the second plan's
