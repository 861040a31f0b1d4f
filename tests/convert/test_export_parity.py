"""Exported folders in diffusers' and transformers' own hands, and exported names against the classes that own them."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
)

from convert.__main__ import main
from convert.architecture.presets import PRESETS
from convert.engine import export_tensors
from convert.export.diffusers_configs import diffusers_configs
from convert.random import write_random_checkpoint
from convert.rules import diffusers
from tests.models import comparisons
from tests.pipelines import family
from tests.references import write_tokenizer
from unclip_jax import UnCLIPPipeline
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.checkpoints.source import open_checkpoint

pytestmark = pytest.mark.parity

CLASSES = {
    "unet": UNet2DConditionModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "image_encoder": lambda config: CLIPVisionModelWithProjection(CLIPVisionConfig(**config)),
    "depth_estimator": lambda config: DPTForDepthEstimation(DPTConfig(**config)),
    "image_normalizer": StableUnCLIPImageNormalizer.from_config,
}
PROMPTS = ["", "a photo of a cat", "Crème brûlée, 3 of 4!", "日本 🎉 emoji", "<|endoftext|> and !! <start_of_text>"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small original checkpoint converted to our directory, and that to a diffusers folder."""
    path = tmp_path_factory.mktemp("export")
    file, config = write_random_checkpoint(path / "tiny.safetensors")
    assert main([str(file), str(path / "ours"), "--config", str(config), "--preprocess", "diffusers"]) == 0
    assert main([str(path / "ours"), str(path / "diffusers"), "--to", "diffusers"]) == 0
    return path / "ours", path / "diffusers"


def test_diffusers_makes_the_same_image(folders, monkeypatch):
    ours, theirs = folders
    reference = DiffusionPipeline.from_pretrained(theirs)
    reference.set_progress_bar_config(disable=True)
    # transformers' torchvision path differs from its PIL path, which is ours, by a grey level.
    reference.feature_extractor = CLIPImageProcessorPil.from_pretrained(theirs / "feature_extractor")
    generator = np.random.default_rng(0)
    photo = Image.fromarray(generator.integers(0, 256, (80, 96, 3), np.uint8))
    image_noise = generator.standard_normal((1, 48), np.float32)
    latents = generator.standard_normal((1, 16, 24, 4), np.float32)
    given = {a.shape: torch.from_numpy(a.copy()) for a in (image_noise, np.moveaxis(latents, -1, 1))}
    monkeypatch.setattr(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img.randn_tensor",
        lambda shape, **options: given[tuple(shape)],
    )
    settings = {"num_inference_steps": 10, "noise_level": 300, "height": 128, "width": 192, "output_type": "np"}
    wanted = reference(photo, "two dogs and a cat", **settings).images
    pipe = UnCLIPPipeline.from_pretrained(ours, "float32")
    pipe.progress = False
    made = pipe(photo, "two dogs and a cat", scheduler="pndm", latents=latents, image_noise=image_noise, **settings)
    assert np.abs(made.images - wanted).max() < 1e-3  # 2e-5


def test_tokenizer(folders):
    _, folder = folders
    reference = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    wanted = reference(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    with open_checkpoint(folder) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tokenizer(PROMPTS), wanted)


@pytest.mark.parametrize("preset", PRESETS)
def test_exported_names_and_shapes_are_those_of_the_classes(preset):
    """At full size: the classes without memory, our tables without weights."""
    config = PRESETS[preset]
    params = {name: Parameter(spec.shape, np.dtype(spec.dtype), ()) for name, spec in abstract_params(config).items()}
    exported = {}
    for name, tensor in export_tensors(diffusers.table(config, params).rules, params).items():
        component, _, within = name.partition("/")
        exported.setdefault(component, {})[within] = tensor.shape
    files = diffusers_configs(config, "float32")
    for component, shapes in exported.items():
        settings = json.loads(json.dumps(files[f"{component}/config.json"]))
        with torch.device("meta"):
            model = CLASSES[component](settings)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if component == "text_encoder":  # transformers 5 writes no prefix; older releases, and we, do
            wanted = {f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in wanted.items()}
        assert shapes == wanted, component


def test_a_depth_folder_survives(tmp_path):
    """Saved by diffusers, converted to ours and back: equal tensor for tensor, and it opens."""
    small = {"block_out_channels": (32, 64), "layers_per_block": 1}
    theirs = StableDiffusionDepth2ImgPipeline(
        vae=AutoencoderKL(
            **small, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        ),
        tokenizer=CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer")),
        unet=UNet2DConditionModel(
            **small,
            in_channels=5,
            sample_size=64,
            attention_head_dim=(2, 4),
            cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            use_linear_projection=True,
        ),
        scheduler=PNDMScheduler(steps_offset=1, skip_prk_steps=True),
        depth_estimator=comparisons.depth_reference(),
        feature_extractor=DPTImageProcessor(size={"height": 64, "width": 64}),
    )
    theirs.save_pretrained(tmp_path / "theirs")
    assert main([str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "diffusers"]) == 0
    with open_checkpoint(tmp_path / "ours") as checkpoint:
        assert checkpoint.config.task == "depth-to-image"
        assert checkpoint.config.depth_estimator == comparisons.TINY_DEPTH
    again = StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "again")
    for name in ("unet", "vae", "text_encoder", "depth_estimator"):
        wanted, found = getattr(theirs, name).state_dict(), getattr(again, name).state_dict()
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


def test_an_instruct_folder_survives(tmp_path):
    """Likewise; what it is for is said by its class alone."""
    folder = family.build(family.KINDS["instruction"], tmp_path)
    assert main([str(folder), str(tmp_path / "ours")]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "diffusers"]) == 0
    with open_checkpoint(tmp_path / "ours") as checkpoint:
        assert checkpoint.config.task == "instruct"
    theirs, again = (
        StableDiffusionInstructPix2PixPipeline.from_pretrained(path) for path in (folder, tmp_path / "again")
    )
    for name in ("unet", "vae", "text_encoder"):
        wanted, found = getattr(theirs, name).state_dict(), getattr(again, name).state_dict()
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
