"""The sum as AUTOMATIC1111's merger computes it, in torch on the files' own tensors; and what diffusers makes of it."""

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from PIL import Image
from safetensors.torch import load_file

from convert.__main__ import main as command
from convert.export.diffusers import save_diffusers
from convert.export.original import save_original
from tests.convert.merged_files import BASE, INPAINTING, UNCLIP, make

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),  # there too
]


def reference(a, b, c, multiplier):
    """Tensors by name -> theirs: the difference first, then its multiple, of the latents' channels alone."""
    merged = {}
    for name, tensor in a.items():
        if name not in b:
            merged[name] = tensor
            continue
        difference = multiplier * (b[name] - c[name])
        latents = tuple(slice(length) for length in difference.shape)  # all there is, but of an inpainting model
        merged[name] = tensor.clone()
        merged[name][latents] = (tensor[latents] + difference).to(tensor.dtype)
    return merged


def assert_same(made, wanted):
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), name


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("config", [UNCLIP, INPAINTING], ids=["unclip", "inpainting"])
def test_files_against_the_merger(config, dtype, tmp_path):
    files = [tmp_path / f"{letter}.safetensors" for letter in "abc"]
    for seed, (file, of) in enumerate(zip(files, (config, BASE, BASE), strict=True)):
        save_original(make(of, seed, dtype if seed == 0 else np.float32), file)
    options = [f"--config{which}={file}.yaml" for which, file in zip(("", "-b", "-c"), files, strict=True)]
    made = tmp_path / "made.safetensors"
    assert command(["add-difference", *map(str, files), str(made), "--to=original", "--scale=0.7", *options]) == 0
    assert_same(load_file(made), reference(*map(load_file, files), 0.7))


def test_an_unclip_of_a_fine_tune_in_diffusers(tmp_path):
    folders = [tmp_path / letter for letter in "abc"]
    for seed, (folder, config) in enumerate(zip(folders, (UNCLIP, BASE, BASE), strict=True)):
        save_diffusers(make(config, seed), folder)
    made = tmp_path / "made"
    assert command(["add-difference", *map(str, folders), str(made), "--to", "diffusers"]) == 0
    pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(made)
    pipe.set_progress_bar_config(disable=True)
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        wanted = reference(*(load_file(folder / part / f"{file}.safetensors") for folder in folders), 1.0)
        loaded = {name.removeprefix("text_model."): t for name, t in getattr(pipe, part).state_dict().items()}
        assert_same(loaded, {name.removeprefix("text_model."): t for name, t in wanted.items()})
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    (picture,) = pipe(photo, num_inference_steps=2, output_type="np").images
    assert np.isfinite(picture).all()
    assert picture.std() > 0.01
