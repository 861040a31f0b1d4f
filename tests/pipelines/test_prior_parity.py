"""The prior live against diffusers and transformers: same weights, prompts and noise.

Errors: relative (L2) of what the network gives, the largest of the final embeddings, which are of size 1 to 11.
"""

import types

import jax
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer, StableUnCLIPPipeline, UnCLIPScheduler
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from convert.engine import export_tensors
from convert.export.diffusers import save_diffusers
from convert.export.tokenizer import tokenizer_files
from convert.rules import prior as rules
from convert.rules.diffusers import canonical
from tests import small_prior
from tests.convert.published_prior import PUBLISHED
from tests.references import disturbed
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.conditioning.tokenizer import Tokenizer, openai_tokenizer_json
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.pipelines.prior import TextToEmbeddingPrior

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),  # there too
]

PROMPTS = ["a red fox!", "two dogs, and a naïve café  №5"]
KARLO = {"prediction_type": "sample", "clip_sample_range": 5.0}
DDPM = {**KARLO, "beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_small_log"}


@torch.no_grad()
def write_reference(folder):
    """The four parts as diffusers and transformers save them, with random weights."""
    torch.manual_seed(0)
    prior = PriorTransformer(num_attention_heads=4, attention_head_dim=12, num_layers=3, embedding_dim=32)
    prior.clip_std += 1
    disturbed(prior, size=0.1).save_pretrained(folder / "prior")
    tower = CLIPTextConfig(
        hidden_size=32,
        projection_dim=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=49408,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    text = disturbed(CLIPTextModelWithProjection(tower))
    text.save_pretrained(folder / "prior_text_encoder")
    for name, content in tokenizer_files(Tokenizer.from_json(openai_tokenizer_json(), "open_clip")).items():
        (folder / "prior_tokenizer").mkdir(exist_ok=True)
        (folder / "prior_tokenizer" / name).write_text(content, "utf-8")
    UnCLIPScheduler(**KARLO).save_pretrained(folder / "prior_scheduler")
    return folder


def load(folder):
    """diffusers' pipeline as far as its prior goes."""
    pipe = types.SimpleNamespace(
        prior=PriorTransformer.from_pretrained(folder / "prior"),
        prior_text_encoder=CLIPTextModelWithProjection.from_pretrained(folder / "prior_text_encoder"),
        prior_tokenizer=CLIPTokenizer.from_pretrained(folder / "prior_tokenizer"),
    )
    pipe.encode = types.MethodType(StableUnCLIPPipeline._encode_prior_prompt, pipe)
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write_reference(tmp_path_factory.mktemp("prior"))


def ours(folder):
    pipe = TextToEmbeddingPrior.from_pretrained(folder, "float32", local_mesh(jax.devices()[:1]))
    pipe.progress = False
    return pipe


@torch.no_grad()
def reference_run(pipe, scheduler, steps, scale, start, noise, monkeypatch):
    """StableUnCLIPPipeline's steps 3 to 7; with UnCLIPScheduler UnCLIPPipeline's, which tells it the next timestep."""
    guided = scale > 1
    embeds, states, mask = pipe.encode(PROMPTS, "cpu", 1, guided)
    scheduler.set_timesteps(steps)
    x, timesteps = torch.from_numpy(start), scheduler.timesteps
    for i, t in enumerate(timesteps):
        out = pipe.prior(
            torch.cat([x] * 2) if guided else x,
            timestep=t,
            proj_embedding=embeds,
            encoder_hidden_states=states,
            attention_mask=mask,
        ).predicted_image_embedding
        if guided:
            unconditional, conditional = out.chunk(2)
            out = unconditional + scale * (conditional - unconditional)
        module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
        monkeypatch.setattr(module, "randn_tensor", lambda *a, i=i, **o: torch.from_numpy(noise[i]))
        after = {}
        if isinstance(scheduler, UnCLIPScheduler):
            after = {"prev_timestep": timesteps[i + 1] if i + 1 < steps else None}
        x = scheduler.step(out, timestep=t, sample=x, **after).prev_sample
    return pipe.prior.post_process_latents(x).numpy()


@torch.no_grad()
def test_network_and_text(saved):
    """Measured: 4e-7 (states, embeddings), 6e-7 (network)."""
    pipe, mine = load(saved), ours(saved)
    embeds, states, mask = pipe.encode(PROMPTS, "cpu", 1, True)
    features = mine.encode_prompts(["", "", *PROMPTS])
    np.testing.assert_array_equal(features.mask, mask)
    for got, want in ((features.states, states), (features.embeds, embeds)):
        assert np.linalg.norm(got - want.numpy()) < 1e-5 * np.linalg.norm(want)
    x, t = np.random.default_rng(0).standard_normal((4, 32), np.float32), np.array([999, 0, 500, 42])
    out = pipe.prior(torch.from_numpy(x), torch.from_numpy(t), embeds, states, mask).predicted_image_embedding
    got = mine.networks["prior"].merge()(x, t.astype(np.float32), states.numpy(), embeds.numpy(), mask.numpy())
    assert np.linalg.norm(got - out.numpy()) < 1e-5 * np.linalg.norm(out)


@pytest.mark.parametrize(
    ("scheduler", "steps", "scale"),
    [
        (UnCLIPScheduler(**KARLO), 25, 4.0),
        (UnCLIPScheduler(**KARLO), 7, 1.0),
        (UnCLIPScheduler(**{**KARLO, "clip_sample_range": 0.4}), 10, 8.0),
        (DDPMScheduler(**DDPM), 25, 4.0),
        (DDPMScheduler(**DDPM, timestep_spacing="linspace"), 6, 2.0),
    ],
)
def test_whole_runs(saved, scheduler, steps, scale, monkeypatch):
    """Measured: 9e-6."""
    scheduler.save_pretrained(saved / "prior_scheduler")
    rng = np.random.default_rng(steps)
    start, noise = rng.standard_normal((2, 32), np.float32), rng.standard_normal((steps, 2, 32), np.float32)
    want = reference_run(load(saved), scheduler, steps, scale, start, noise, monkeypatch)
    got = ours(saved)(
        PROMPTS,
        prior_num_inference_steps=steps,
        prior_guidance_scale=scale,
        prior_latents=start,
        prior_step_noise=noise,
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)


def test_an_export_of_karlos_runs_in_diffusers(tmp_path, monkeypatch):
    """Karlo's own checkpoint, exported with the scheduler that StableUnCLIPPipeline can run. Measured: 1.1e-5."""
    with small_prior.checkpoint() as checkpoint:
        save_diffusers(checkpoint, tmp_path / "prior")
        mine = TextToEmbeddingPrior.from_checkpoint(checkpoint, "float32", local_mesh(jax.devices()[:1]))
    mine.progress = False
    rng = np.random.default_rng(0)
    start, noise = rng.standard_normal((2, 64), np.float32), rng.standard_normal((25, 2, 64), np.float32)
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "prior" / "prior_scheduler")
    want = reference_run(load(tmp_path / "prior"), scheduler, 25, 4.0, start, noise, monkeypatch)
    got = mine(PROMPTS, prior_latents=start, prior_step_noise=noise)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_every_tensor_of_the_published_classes():
    """At full size: the names and shapes that diffusers and transformers have."""
    with torch.device("meta"):
        prior = PriorTransformer()
        text = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
        )
    theirs = {f"prior/{name}": tuple(t.shape) for name, t in prior.state_dict().items()}
    theirs |= {
        canonical(f"text_encoder/{name}"): tuple(t.shape)
        for name, t in text.state_dict().items()
        if not name.endswith("position_ids")
    }
    params = abstract_params(PUBLISHED)
    standins = {name: Parameter(spec.shape, np.dtype(np.float32), ()) for name, spec in params.items()}
    table = rules.diffusers(PUBLISHED, params, "text_encoder").rules
    assert {name: tensor.shape for name, tensor in export_tensors(table, standins).items()} == theirs
