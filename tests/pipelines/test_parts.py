"""Inputs through the networks: one on each device at a time, and the next ones while results are fetched."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.pipelines.small_family import KINDS, Compilations, arguments, open_pipeline, photo
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.pipelines.depth_to_image import depth_channel
from unclip_jax.pipelines.finish import Marks, finish_images, to_pil
from unclip_jax.pipelines.parts import one_by_one
from unclip_jax.progress import Progress
from unclip_jax.reference import Reference


class Output:
    """An array on a device that notes when it is fetched."""

    def __init__(self, events, name, rows):
        self.events, self.name, self.rows = events, name, rows

    def __array__(self, dtype=None, copy=None):
        self.events.append(f"fetch {self.name}")
        return np.asarray(self.rows)


def on(devices):
    return local_mesh(jax.local_devices()[:devices])


def silent(count):
    return Progress("", count, unit="input", enabled=False)


def test_the_next_inputs_are_sent_before_results_are_fetched():
    events, bar = [], silent(3)

    def program(params, rows):
        events.append(f"run {len(events)}")
        return Output(events, len(events) - 1, rows)

    made = one_by_one(on(1), program, {}, np.arange(3), bar)
    assert events == ["run 0", "run 1", "fetch 0", "run 3", "fetch 1", "fetch 3"]
    assert made.tolist() == [0, 1, 2]
    assert bar.done == 3


@pytest.mark.parametrize("count", [1, 4, 5])
def test_each_device_has_one_input_at_a_time(count):
    """Of any number; and a program may make several arrays."""
    given = []

    def program(params, rows):
        given.append(rows)
        return rows + params["one"], rows.sum(axis=1)

    inputs = np.arange(2 * count).reshape(count, 2)
    more, sums = one_by_one(on(4), program, {"one": 1}, inputs, silent(count))
    np.testing.assert_array_equal(more, inputs + 1)
    np.testing.assert_array_equal(sums, inputs.sum(axis=1))
    assert {(rows.shape, rows.sharding.shard_shape(rows.shape)) for rows in given} == {((4, 2), (1, 2))}


@pytest.fixture(scope="module")
def spread(family_folder):
    """Name of a kind -> its pipeline on four devices."""

    def pipeline(name):
        return open_pipeline(family_folder(KINDS[name].model), KINDS[name].pipeline, devices=4, progress=False)

    return pipeline


def encoders(pipe):
    """What encodes n inputs, by name."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (5, 20, 24, 3)).astype(np.float32)
    return {
        "prompts": lambda n: pipe.encode_prompts(["a cat", "two dogs", "a house", "the sea", ""][:n]),
        "images": lambda n: pipe.encode_image_embeds([photo(i) for i in range(n)]),
        "the VAE": lambda n: pipe.vae_encode(pixels[:n]),
        "latents": lambda n: pipe.decode_latents(pipe.vae_encode(pixels[:n])[..., :4]),
    }


def test_what_is_encoded_and_decoded_does_not_depend_on_the_devices(family, spread):
    """One program on one device and one on four serve any number of inputs."""
    alone, together = encoders(family("variations")), encoders(spread("variations"))
    for name, encode in together.items():
        want = alone[name](5)
        np.testing.assert_allclose(encode(5), want, atol=2e-5 * np.abs(want).max(), err_msg=name)
        with Compilations() as compiled:
            np.testing.assert_allclose(encode(2), want[:2], atol=2e-5 * np.abs(want).max(), err_msg=name)
        assert compiled.count == 0


def test_depth_maps_of_images_are_made_together(family):
    """Where they have one size, and one by one where they have not. The estimator is a stand-in."""
    pipe, seen = family("depth"), []

    def estimate(params, rows):
        seen.append(rows.shape[:2])
        return rows.mean(axis=-1)

    programs = dataclasses.replace(pipe.programs, estimate_depth=estimate)
    parts = dataclasses.replace(pipe.parts, programs=programs, mesh=on(4))
    request = pipe.check(**arguments("depth", image=[photo(), photo(1)]))
    together = depth_channel(parts, request)
    views = request.inputs.views
    side = views[0].shape[1]
    larger = dataclasses.replace(request.inputs, views=[views[0], np.pad(views[1], [(0, 0), (0, 32), (0, 0), (0, 0)])])
    apart = depth_channel(parts, dataclasses.replace(request, inputs=larger))
    assert seen == [(4, side), (4, side), (4, side + 32)]
    np.testing.assert_array_equal(apart[0], together[0])


@pytest.mark.parametrize("reference", Reference)
def test_pictures_are_the_decoded_floats_in_8_bits(family, reference):
    pipe = family("variations")
    parts = dataclasses.replace(pipe.parts, config=dataclasses.replace(pipe.config, reference=reference))
    request = pipe.check(**arguments("variations", output_type="pil"))
    latents = np.random.default_rng(0).standard_normal((3, *request.latent_shape), np.float32)
    images, _ = finish_images(parts, Marks(), request, latents)
    want = to_pil(reference, pipe.decode_latents(latents))
    np.testing.assert_array_equal(np.stack(images), np.stack(want))
    latents[1] = np.nan
    with pytest.raises(FloatingPointError, match="images have NaN pixels"):
        finish_images(parts, Marks(), request, latents)
