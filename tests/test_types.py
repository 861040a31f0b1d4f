"""What type checkers see of a call."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e

GOOD = """
import unclip_jax

pipe = unclip_jax.from_pretrained()
images = pipe(prompt="a cat", num_inference_steps=3).images
for state in pipe.stream(prompt="a cat"):
    state.preview()
variations = unclip_jax.UnCLIPPipeline.from_pretrained()
variations("cat.png", "a cat", noise_level=3, guidance_scale=[1.0, 2.0])
variations.stream(image="cat.png", seed=1)
"""
BAD = """
import unclip_jax

variations = unclip_jax.UnCLIPPipeline.from_pretrained()
variations("cat.png", noise_levels=3)
variations.stream("cat.png", seed="x")
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("types")
    for name, text in (("good", GOOD), ("bad", BAD)):
        (folder / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_calls_of_any_pipeline_are_typed(errors):
    assert "good.py" not in errors, errors


def test_arguments_of_a_pipeline_are_checked_by_name_and_type(errors):
    assert 'bad.py:5: error: Unexpected keyword argument "noise_levels"' in errors, errors
    assert 'bad.py:6: error: Argument "seed"' in errors, errors
