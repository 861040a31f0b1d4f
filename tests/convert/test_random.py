"""Random checkpoints of every kind: complete, open by themselves, and the same again from the same seed."""

import numpy as np
import pytest
from PIL import Image

import unclip_jax
from convert.random import SMALL, write_random_checkpoint
from convert.source import check_source
from unclip_jax.checkpoints.source import open_checkpoint, open_prior
from unclip_jax.demo import demo_images

TASKS = {
    "tiny": "variations",
    "tiny-text-to-image": "text-to-image",
    "tiny-depth": "depth-to-image",
    "tiny-inpainting": "inpaint",
    "tiny-upscaler": "upscale",
}


@pytest.mark.parametrize("preset", SMALL)
def test_a_random_checkpoint_is_whole_and_opens_as_what_it_is_of(preset, tmp_path):
    file, settings = write_random_checkpoint(tmp_path / "x.safetensors", preset)
    assert check_source(file, config=settings).complete
    with open_checkpoint(file, config=settings) as checkpoint:
        assert checkpoint.config == SMALL[preset]
        assert preset not in TASKS or checkpoint.config.task == TASKS[preset]
        assert all(np.isfinite(parameter.read()).all() for parameter in checkpoint.params.values())


def test_the_prior_goes_with_the_demo_model(tmp_path):
    file, _ = write_random_checkpoint(tmp_path / "prior.safetensors", "tiny-prior")
    with open_prior(file) as prior, open_checkpoint() as demo:
        assert prior.config.prior.embedding_dim == demo.config.image_embedding_dim


def test_seeds_draw_other_weights(tmp_path):
    first, second, other = (
        write_random_checkpoint(tmp_path / f"{number}.safetensors", "tiny-upscaler", seed)[0].read_bytes()
        for number, seed in enumerate((1, 1, 2))
    )
    assert first == second != other


def test_a_small_model_makes_an_image_that_is_not_blank(tmp_path):
    file, settings = write_random_checkpoint(tmp_path / "x.safetensors", "tiny-upscaler")
    pipe = unclip_jax.UpscalePipeline.from_pretrained(file, config=settings)
    small = np.asarray(Image.open(demo_images() / "giraffe.png").convert("RGB"))[::4, ::4]
    made = pipe(image=small, num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 64, 64, 3)
    assert made.std() > 0.05


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^preset is 'huge'; accepted: tiny, .*, 512-base"):
        write_random_checkpoint(tmp_path / "x.safetensors", "huge")
