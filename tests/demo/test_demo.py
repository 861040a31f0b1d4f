"""The demo model as it ships: small enough, noticed, and good for what it is for, on drawings it has not seen."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import unclip_jax
from unclip_jax import ControlNet, TinyVAE, cli
from unclip_jax.checkpoints import open_controlnet
from unclip_jax.conditioning import canny
from unclip_jax.demo import demo_controlnet, demo_model, demo_tiny_vae
from unclip_jax.evaluation.descriptors import color_and_shape
from unclip_jax.evaluation.similarity import cosines, retrieval
from unclip_jax.training.vae_losses import psnr

pytestmark = pytest.mark.usefixtures("fully_compiled")

IMAGES = sorted((demo_model().parent / "pictures").glob("*.png"))


@pytest.fixture(scope="module")
def pipe():
    made = unclip_jax.UnCLIPPipeline.from_pretrained()
    made.progress = False
    return made


@pytest.fixture(scope="module")
def sources():
    return [np.asarray(Image.open(path).convert("RGB")) for path in IMAGES]


@pytest.fixture(scope="module")
def by_level(pipe, sources):
    """Variations of every other image, at three noise levels."""
    options = {"guidance_scale": 3.0, "num_inference_steps": 20}
    made = {level: pipe(image=sources[::2], noise_level=level, **options).images for level in (0, 600, 1000)}
    return {level: [np.asarray(image) for image in images] for level, images in made.items()}


def test_the_demo_model_is_small_and_says_where_it_comes_from():
    assert sum(path.stat().st_size for path in demo_model().rglob("*.safetensors")) <= 13_000_000
    notices = (demo_model().parent / "NOTICES.md").read_text("utf-8")
    for owner in ("Google", "Twitter", "Microsoft", "Unicode", "Miles Johnson"):
        assert owner in notices
    assert sum(path.stat().st_size for path in demo_tiny_vae().iterdir()) <= 400_000
    assert sum(path.stat().st_size for path in demo_controlnet().iterdir()) <= 3_000_000
    assert "held out" in (demo_model().parent / "MODEL_CARD.md").read_text("utf-8")
    assert len(IMAGES) == 48


@pytest.mark.e2e
def test_the_tiny_autoencoder_is_near_the_full_one(pipe, sources):
    """On drawings that neither has seen: measured 28.8 dB from the full one's images, 27.5 dB from the drawings."""
    tiny, pixels = TinyVAE.from_pretrained(), np.float32(sources) / 127.5 - 1
    mean = np.split(pipe.vae_encode(pixels), 2, axis=-1)[0]
    latents = mean * pipe.config.vae.scaling_factor
    made, full = (2 * images - 1 for images in (tiny.decode_latents(latents), pipe.decode_latents(latents)))
    assert float(psnr(made, full).mean()) > 28
    assert float(psnr(made, pixels).mean()) > 26.5
    small = unclip_jax.UnCLIPPipeline.from_pretrained(vae=demo_tiny_vae())
    np.testing.assert_allclose(small.decode_latents(latents[:1]), tiny.decode_latents(latents[:1]), atol=1e-6)
    again = small.vae_encode(pixels)
    assert float(np.abs(again - latents).mean()) < 0.15


def test_the_controlnet_is_for_the_demo_model():
    with open_controlnet() as ours, unclip_jax.open_checkpoint() as demo:
        net, base = ours.config.controlnet, demo.config
    assert net.unet.block_out_channels == base.unet.block_out_channels
    assert net.factor == base.vae.factor
    assert net.unet.class_embedding is None


@pytest.mark.e2e
def test_the_controlnet_makes_drawings_follow_edges(pipe, sources):
    """The share of the edges that is found again, within a pixel, where another drawing is varied: 0.71, not 0.33."""
    net = ControlNet.from_pretrained(mesh=pipe.mesh, dtype=pipe.dtype)
    hints, near = [canny(source) for source in sources[::8]], np.ones((3, 3), bool)
    options = {"image": sources[1::8], "guidance_scale": 3.0, "num_inference_steps": 10}
    found = {}
    for scale in (0.0, 1.5):
        made = pipe(**options, controlnet=net, control_image=hints, controlnet_conditioning_scale=scale).images
        edges = [ndimage.binary_dilation(canny(image)[..., 0] > 0, near) for image in made]
        found[scale] = np.mean([seen[hint[..., 0] > 0].mean() for seen, hint in zip(edges, hints, strict=True)])
    assert found[0.0] < 0.45
    assert found[1.5] > 0.6


@pytest.mark.e2e
def test_variations_are_found_again(pipe, sources, by_level):
    """Among all 48, by the model's own embedding and by plain colour and shape; chance is one in 48."""
    embeds, described = pipe.encode_image_embeds(sources), color_and_shape(np.stack(sources))
    own = np.arange(0, len(sources), 2)
    by_clip = retrieval(pipe.encode_image_embeds(by_level[0]), embeds, own) == 0
    by_eye = retrieval(color_and_shape(np.stack(by_level[0])), described, own) == 0
    assert by_clip.mean() >= 0.8, by_clip.mean()
    assert by_eye.mean() >= 0.3, by_eye.mean()


@pytest.mark.e2e
def test_noise_takes_the_source_away(pipe, sources, by_level):
    embeds = pipe.encode_image_embeds(sources[::2])
    kept = [cosines(pipe.encode_image_embeds(by_level[level]), embeds).mean() for level in (0, 600, 1000)]
    assert kept[0] > kept[1] + 0.05 > kept[2] + 0.15
    last = retrieval(pipe.encode_image_embeds(by_level[1000]), embeds, np.arange(len(embeds))) == 0
    assert last.mean() <= 0.1


@pytest.mark.e2e
def test_prompts_steer_where_the_image_says_nothing(pipe, sources):
    colours = {"red": (214, 57, 57), "green": (92, 176, 92), "blue": (60, 110, 206), "black": (24, 24, 24)}
    prompts = [f"tomato, {name} background" for name in colours for _ in range(3)]
    made = pipe(image=[sources[0]] * len(prompts), prompt=prompts, noise_level=1000, guidance_scale=3.0).images
    corners = np.stack([np.asarray(image)[:4].reshape(-1, 3) for image in made])
    palette = np.array([*colours.values(), (255, 255, 255)])
    nearest = np.square(np.median(corners, axis=1)[:, None] - palette).sum(-1).argmin(1)
    assert (nearest == np.repeat(np.arange(4), 3)).mean() >= 0.75


@pytest.mark.e2e
def test_the_command_uses_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["variations", str(IMAGES[0]), "--steps", "4", "--out", str(tmp_path), "--devices", "1"]) == 0
    assert "0001-sheet.png" in capsys.readouterr().out
    with Image.open(tmp_path / "0001-000.png") as made:
        assert made.size == (64, 64)
