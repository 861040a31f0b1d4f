"""Executables of whole calls: nothing is compiled, and the images are the same."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import unclip_jax
from tests.pipelines import small_family
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.precompile import example_call, precompile

# XLA finds some functions no longer when it reads a program back that was compiled as other tests' are.
pytestmark = pytest.mark.usefixtures("fully_compiled")

RUN = """
import collections, json, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.update([event]))
import numpy as np
import unclip_jax
options = {} if sys.argv[2] == "beside" else {"executables": sys.argv[2]}
pipe = unclip_jax.from_pretrained(sys.argv[1], "float32", unclip_jax.local_mesh(jax.local_devices()[:2]), **options)
opened = dict(events)
image = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
call = {"prompt": "a cat", "num_images_per_prompt": 4, "num_inference_steps": 3, "height": 24, "width": 24}
made = pipe(image, **call, noise_level=100, seed=5)
np.savez(sys.argv[3], latents=made.latents, images=np.stack(made.images))
print(json.dumps([opened, events]))
"""


@pytest.fixture(autouse=True)
def user(monkeypatch, tmp_path):
    """A user without a secret and without programs."""
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path / "data" / name))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refusing(*arrays, **static):
    """In the place of a jitted function."""
    raise AssertionError("compiled")


@pytest.mark.e2e
def test_another_process_compiles_traces_and_lowers_nothing(tmp_path):
    """As the command line writes them, and bit for bit."""
    model = str(small_family.write("SMALL", tmp_path / "model"))
    size = ["--height", "24", "--width", "24", "--batch", "4", "--devices", "2", "--dtype", "float32"]
    command = [sys.executable, "-m", "unclip_jax.cli", "compile", model, *size, "--out", str(tmp_path / "a")]
    subprocess.run(command, check=True, capture_output=True)

    def run(folder, out):
        command = [sys.executable, "-c", RUN, model, str(folder), str(tmp_path / out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return *json.loads(done.stdout.splitlines()[-1]), np.load(tmp_path / out)

    _, compiled, want = run("beside", "jit.npz")
    opened, ahead, got = run(tmp_path / "a", "ahead.npz")
    for name in ("latents", "images"):
        np.testing.assert_array_equal(got[name], want[name])
    work = [f"/jax/core/compile/{step}_duration" for step in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")]
    assert [compiled[step] > opened.get(step, 0) for step in work] == [True] * 3
    assert [ahead.get(step, 0) - opened.get(step, 0) for step in work] == [0, 0, 0]
    assert ahead.get(work[2], 0) == 0


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("kind", "devices", "memory"), [("upscaling", 1, Memory()), ("upscaling", 2, Memory(shard_weights=True))]
)
def test_every_program_of_a_call_is_written(kind, devices, memory, tmp_path):
    """Those of an example call serve another call of the same size."""
    model = small_family.write(small_family.KINDS[kind].model, tmp_path / "model")
    mesh = local_mesh(jax.local_devices()[:devices])
    arguments = small_family.arguments(kind)
    with unclip_jax.open_checkpoint(model) as checkpoint:
        call = example_call(checkpoint, *size_of(checkpoint, arguments), 1)
        precompile(checkpoint, {**call, "scheduler": "ddim", "eta": 1.0}, dtype="float32", mesh=mesh, memory=memory)
    want = small_family.open_pipeline(model, small_family.KINDS[kind].pipeline, devices, memory=memory)
    programs = {field.name: getattr(want.programs, field.name) for field in dataclasses.fields(want.programs)}
    ahead = small_family.open_pipeline(model, small_family.KINDS[kind].pipeline, devices, memory=memory)
    ahead.programs = dataclasses.replace(
        ahead.programs, **{name: dataclasses.replace(program, jitted=refusing) for name, program in programs.items()}
    )
    want.programs = dataclasses.replace(want.programs, **{name: program.jitted for name, program in programs.items()})
    np.testing.assert_array_equal(ahead(**arguments).images, want(**arguments).images)


def size_of(checkpoint, arguments):
    scale = checkpoint.config.vae.factor if checkpoint.config.task == "upscale" else 1
    height, width, _ = np.shape(arguments["image"])
    return scale * height, scale * width


def test_a_checkpoint_of_one_file_needs_a_folder(original):
    file, yaml = original
    with (
        unclip_jax.open_checkpoint(file, config=yaml) as checkpoint,
        pytest.raises(ValueError, match="is no folder: name one"),
    ):
        precompile(checkpoint, {})


def test_a_bad_call_writes_nothing(small_model, tmp_path):
    with (
        unclip_jax.open_checkpoint(small_model) as checkpoint,
        pytest.raises(ValueError, match="height"),
    ):
        precompile(checkpoint, example_call(checkpoint, 23, 24, 1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
