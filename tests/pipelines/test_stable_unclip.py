"""Prompts through a prior to an unCLIP checkpoint: sources, widths, and what is refused before the prior runs."""

import json
import shutil

import jax
import numpy as np
import pytest

import unclip_jax
from convert.__main__ import main as convert
from convert.export.diffusers import save_diffusers
from tests import small_models, small_prior
from tests.pipelines import small_family
from tests.pipelines.small_family import SIZE, Compilations
from unclip_jax.checkpoints import directory
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import local_mesh

WIDTH = small_prior.CONFIG.prior.embedding_dim
UNCLIP = small_family.without_encoder(WIDTH)
SETTINGS = {**SIZE, "num_inference_steps": 2, "output_type": "latent", "eta": 1.0}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Converted directories of the checkpoint and of the prior, and a diffusers folder of both."""
    folder = tmp_path_factory.mktemp("stable")
    small_models.write(UNCLIP, folder / "unclip")
    with small_prior.checkpoint() as checkpoint:
        directory.save(checkpoint, folder / "prior")
    with open_checkpoint(folder / "unclip") as checkpoint:
        save_diffusers(checkpoint, folder / "both")
    with small_prior.checkpoint() as checkpoint:
        save_diffusers(checkpoint, folder / "parts")
    for part in (folder / "parts").iterdir():
        if part.is_dir():
            shutil.copytree(part, folder / "both" / part.name)
    index = json.loads((folder / "both" / "model_index.json").read_text())
    assert index["_class_name"] == "StableUnCLIPPipeline"
    index |= {"prior": ["diffusers", "PriorTransformer"], "prior_scheduler": ["diffusers", "DDPMScheduler"]}
    index |= {"prior_text_encoder": ["transformers", "CLIPTextModelWithProjection"]}
    (folder / "both" / "model_index.json").write_text(json.dumps(index))
    return folder


def quiet(pipe):
    pipe.prior.progress = False  # and the other one makes a step a program, which its stream makes as well
    return pipe


@pytest.fixture(scope="module")
def pipe(sources):
    mesh = local_mesh(jax.local_devices()[:1])
    return quiet(
        unclip_jax.StableUnCLIPPipeline.from_pretrained(sources / "unclip", "float32", mesh, prior=sources / "prior")
    )


def test_images_of_prompts(pipe):
    """Each of its own embedding, alone or beside others; and a stream is the same run."""
    prompts = ["a red fox", "two dogs"]
    made = pipe(prompts, num_images_per_prompt=2, batch_size=1, **SETTINGS)
    assert made.image_embeds.shape == (4, WIDTH)
    embeds = pipe.prior(prompts, 2, batch_size=1)
    np.testing.assert_allclose(made.image_embeds, embeds, rtol=0, atol=1e-5)
    one = pipe("a red fox", **SETTINGS)
    np.testing.assert_allclose(one.latents, made.latents[:1], rtol=0, atol=1e-4)
    assert np.abs(np.diff(made.latents, axis=0)).reshape(3, -1).max(axis=1).min() > 1e-2
    settings = {k: v for k, v in SETTINGS.items() if k != "output_type"}
    states = list(pipe.stream(prompt="a red fox", **settings))
    assert [state.step for state in states] == [1, 2]
    np.testing.assert_allclose(states[-1].latents, one.latents, rtol=0, atol=1e-5)
    with Compilations() as compiled:
        pipe("other", seed=3, noise_level=500, prior_guidance_scale=2.5, guidance_scale=3.0, **SETTINGS)
    assert compiled.count == 0


def test_one_folder_of_both(sources, pipe):
    """As diffusers' StableUnCLIPPipeline saves one; its prior has Karlo's scheduler by another name."""
    both = quiet(unclip_jax.from_pretrained(sources / "both", "float32", pipe.mesh))
    assert isinstance(both, unclip_jax.StableUnCLIPPipeline)
    noise = {
        "prior_latents": np.random.default_rng(0).standard_normal((1, WIDTH), np.float32),
        "prior_step_noise": np.random.default_rng(1).standard_normal((25, 1, WIDTH), np.float32),
    }
    want, got = (p("a red fox", **noise, **SETTINGS) for p in (pipe, both))
    np.testing.assert_allclose(got.image_embeds, want.image_embeds, rtol=0, atol=1e-2)


def test_a_checkpoint_without_an_image_encoder_round_trips(sources, tmp_path, capsys):
    assert convert([str(sources / "both"), str(tmp_path / "ours")]) == 0
    assert convert([str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "diffusers"]) == 0
    files = sorted(path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*.safetensors"))
    assert {path.parts[0] for path in files} == {"unet", "vae", "text_encoder", "image_normalizer"}
    for path in files:
        assert (tmp_path / "back" / path).read_bytes() == (sources / "both" / path).read_bytes()
    assert convert([str(tmp_path / "ours"), "--check"]) == 0
    capsys.readouterr()
    assert convert([str(tmp_path / "ours"), str(tmp_path / "x.safetensors"), "--to", "original"]) == 2
    error = capsys.readouterr().err.strip()
    assert "image encoder" in error
    assert error.count("\n") == 0
    assert not (tmp_path / "x.safetensors").exists()


BAD = [
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": 3}, "prompt is 3"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 strings"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"noise_level": 1001}, "noise_level is 1001"),
    ({"height": 7}, "height is 7"),
    ({"scheduler": "dimm"}, "did you mean 'ddim'"),
    ({"latents": np.zeros((2, 10, 12, 4))}, r"latents has shape \(2, 10, 12, 4\)"),
    ({"image_noise": np.zeros((1, 3))}, r"image_noise has shape \(1, 3\)"),
    ({"prompt_embeds": 3.0}, r"prompt_embeds has shape \(\)"),
    ({"prior_num_inference_steps": 0}, "prior_num_inference_steps is 0"),
    ({"prior_guidance_scale": "4"}, "prior_guidance_scale is '4'"),
    ({"prior_latents": np.zeros((2, WIDTH))}, r"prior_latents has shape"),
    ({"prior_step_noise": np.zeros((1, 1, WIDTH))}, r"prior_step_noise has shape"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_what_is_refused_is_refused_before_the_prior_runs(pipe, change, words, monkeypatch):
    monkeypatch.setattr(pipe.prior, "encode_prompts", None)  # with which it begins
    for call in (pipe, pipe.stream):
        with Compilations() as compiled, pytest.raises(ValueError, match=words) as caught:
            call(**{"prompt": "a fox", **SETTINGS, **change})
        assert "\n" not in str(caught.value)
        assert compiled.count == 0


def test_streams_and_marks_are_refused_before_the_prior_runs(pipe, monkeypatch):
    monkeypatch.setattr(pipe.prior, "encode_prompts", None)
    with pytest.raises(ValueError, match="batch_size has no meaning for stream"):
        pipe.stream(prompt="a fox", batch_size=1)
    with pytest.raises(TypeError, match="image_weights"):
        pipe(prompt="a fox", image_weights=[1])
    monkeypatch.setattr(pipe, "watermark", b"SDV2")
    with pytest.raises(ValueError, match="output_type is 'latent'"):
        pipe("a fox", **SETTINGS)


def test_embeddings_of_another_width(sources, small_model):
    open_both = unclip_jax.StableUnCLIPPipeline.from_pretrained
    with pytest.raises(ValueError, match=f"embeddings of width {WIDTH}, the unCLIP checkpoint takes 16"):
        open_both(small_model, prior=sources / "prior")
    with pytest.raises(ValueError, match="not a text-to-image prior"):
        open_both(small_model)
    with pytest.raises(ValueError, match="is a prior on its own"):
        open_both(sources / "prior")
    with pytest.raises(FileNotFoundError, match="no/such"):
        open_both(sources / "unclip", prior="no/such/prior")


def test_the_demo_model_needs_a_prior():
    with pytest.raises(ValueError, match="prior is required: the demo model does not include one"):
        unclip_jax.StableUnCLIPPipeline.from_pretrained()
