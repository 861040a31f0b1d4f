"""The blocks of docs/devices.md run as they stand, on four devices, and agree."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.convert.diffusers_folder import random_tensors, write_folder
from unclip_jax.distributed.mesh import parameter_sharding

pytestmark = pytest.mark.e2e

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    write_folder(folder, random_tensors())
    return folder


@pytest.fixture(scope="module")
def names(source):
    """What the blocks leave behind, run one after the other."""
    photo = str(PAGE.parent / "images" / "coffee.jpg")
    text = "\n".join(BLOCKS).replace("outputs/tiny", str(source)).replace("docs/images/coffee.jpg", photo)
    scope = {}
    exec(compile(text, str(PAGE), "exec"), scope)
    return scope


def assert_close(a, b, tolerance):
    a, b = np.asarray(a), np.asarray(b)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_three_ways_over_the_devices_agree(names):
    reference = jax.jit(names["latents"])(names["params"], 1, names["indices"], names["text"], names["labels"])
    assert len(names["first"].sharding.device_set) == jax.local_device_count() == 4
    for way in ("first", "second", "third"):
        assert names[way].shape == (4, 16, 16, 4)
        assert_close(names[way], reference, 1e-5)


COLLECTIVES = re.compile(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute")


def test_images_split_over_devices_need_no_communication(names):
    arguments = (names["params"], 1, names["indices"], names["text"], names["labels"])
    assert not COLLECTIVES.search(names["by_jit"].lower(*arguments).compile().as_text())
    # What the search would find: weights split over the devices do need it.
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = {
        name: jax.device_put(array, parameter_sharding(mesh, f"unet.{name}", array.shape))
        for name, array in names["params"].items()
    }
    split = jax.jit(names["latents"]).lower(placed, *arguments[1:]).compile().as_text()
    assert COLLECTIVES.search(split)


def test_a_mesh_with_a_model_axis_makes_the_same_images(names, source):
    from unclip_jax import UnCLIPPipeline
    from unclip_jax.distributed.mesh import local_mesh

    split = names["out"].latents
    pipe = UnCLIPPipeline.from_pretrained(source, "float32", local_mesh(jax.local_devices()[:1]))
    photo = PAGE.parent / "images" / "coffee.jpg"
    alone = pipe(image=photo, num_images_per_prompt=4, num_inference_steps=5, seed=1, output_type="latent")
    assert_close(split, alone.latents, 1e-5)


def test_gradients_through_the_loop_agree_with_finite_differences(names):
    """In a random direction, by central differences with a step chosen for float32."""
    brightness, noise = jax.jit(names["brightness"]), jax.random.normal(jax.random.key(0), (1, 16, 16, 4))
    direction = np.random.default_rng(0).standard_normal(noise.shape).astype(np.float32)
    step = 1e-2
    difference = (brightness(noise + step * direction) - brightness(noise - step * direction)) / (2 * step)
    assert_close(np.vdot(names["gradient"], direction), difference, 1e-2)  # 4e-4
