"""The prior's pipeline: against the original's recording, its properties, and what it refuses."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import small_prior
from tests.golden_weights import GOLDEN, write_model
from unclip_jax.conditioning.tokenizer import Tokenizer, openai_tokenizer_json
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.pipelines.prior import TextFeatures, TextToEmbeddingPrior
from unclip_jax.sampling.solvers.unclip_scheduler import prior_solver, unclip_scheduler

RECORDED = np.load(GOLDEN / "prior.npz")
RECORDED_TEXT = TextFeatures(RECORDED["states"], RECORDED["embeds"], RECORDED["mask"])


@pytest.fixture(scope="module")
def pipe():
    with small_prior.checkpoint() as checkpoint:
        return quiet(TextToEmbeddingPrior.from_checkpoint(checkpoint, "float32", local_mesh(jax.devices()[:1])))


def quiet(pipe):
    pipe.progress = False
    return pipe


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The prior of the recording, from Karlo's files. Its text tower was not recorded: any will do."""
    folder = tmp_path_factory.mktemp("recorded")
    file = write_model("karlo_prior", folder / "karlo.safetensors")
    width = {"token_embedding.weight": (49408, 40), "positional_embedding": (77, 40), "text_projection": (40, 40)}
    block = "transformer.resblocks.0"
    matrices = {"attn.in_proj_weight": (120, 40), "attn.out_proj.weight": (40, 40)}
    matrices |= {"mlp.c_fc.weight": (80, 40), "mlp.c_proj.weight": (40, 80)}
    vectors = {"attn.in_proj_bias": 120, "attn.out_proj.bias": 40, "mlp.c_fc.bias": 80, "mlp.c_proj.bias": 40}
    vectors |= {f"ln_{i}.{leaf}": 40 for i in (1, 2) for leaf in ("weight", "bias")}
    shapes = width | {f"{block}.{name}": shape for name, shape in matrices.items()}
    shapes |= {f"{block}.{name}": (size,) for name, size in vectors.items()}
    shapes |= {f"ln_final.{leaf}": (40,) for leaf in ("weight", "bias")}
    np.savez(folder / "karlo.safetensors.stats.npz", mean=RECORDED["mean"], std=RECORDED["std"])
    save_file({k: np.zeros(s, np.float32) for k, s in shapes.items()}, f"{file}.text_encoder.safetensors")
    config = GOLDEN / "models" / "karlo_prior" / "config.yaml"
    mesh = local_mesh(jax.devices()[:1])
    return quiet(TextToEmbeddingPrior.from_pretrained(file, "float32", mesh, config=config))


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def test_one_call_of_the_network(recorded):
    network = recorded.networks["prior"].merge()
    out = network(RECORDED["call_x"], RECORDED["call_t"], *RECORDED_TEXT)
    assert relative_error(out, RECORDED["call_out"]) < 1e-5  # 2e-6


def test_a_whole_run_is_the_recording(recorded):
    conditional, unconditional = (TextFeatures(*(a[rows] for a in RECORDED_TEXT)) for rows in ([0, 1], [2, 3]))
    got = recorded(
        text_features=conditional,
        negative_text_features=unconditional,
        prior_latents=RECORDED["start"],
        prior_step_noise=RECORDED["step_noise"],
    )
    assert relative_error(got, RECORDED["image_embeds"]) < 1e-5  # 1.4e-6


def test_timesteps_and_limits_of_the_original():
    solver = unclip_scheduler(small_prior.SCHEDULER, 25, "original")
    assert solver.grid["timestep"].tolist() == [round(41.625 * i) for i in range(24, -1, -1)]
    assert solver.grid["clip"].tolist() == [10] * 25
    for steps in (2, 3, 21, 25, 31, 500, 777, 1000):
        timesteps = unclip_scheduler(small_prior.SCHEDULER, steps, "diffusers").grid["timestep"]
        assert (np.diff(timesteps) < 0).all()
        assert (timesteps[0], timesteps[-1]) == (999, 0)
    # What a DDPMScheduler does with the same timesteps is the same, but for the last step's rounding.
    other = {**small_prior.SCHEDULER, "_class_name": "DDPMScheduler", "timestep_spacing": "linspace"}
    want = unclip_scheduler(small_prior.SCHEDULER, 25).grid
    for name, column in prior_solver(other, 25).grid.items():
        np.testing.assert_allclose(column, want[name], rtol=1e-6 if name != "x0" else 1e-3)


def test_an_embedding_depends_on_its_seed_and_index_alone(pipe):
    prompts = ["a red circle", "a blue square!"]
    whole = pipe(prompts, num_images_per_prompt=2, prior_num_inference_steps=3, seed=7)
    assert whole.shape == (4, 64)
    chunked = pipe(prompts, num_images_per_prompt=2, prior_num_inference_steps=3, seed=7, batch_size=2)
    np.testing.assert_allclose(chunked, whole, rtol=0, atol=2e-5)
    several = TextToEmbeddingPrior(
        pipe.config,
        pipe.tokenizer,
        {
            name: type(net)(net.graphdef, {k: np.asarray(v) for k, v in net.params.items()})
            for name, net in pipe.networks.items()
        },
        tuple(np.asarray(a) for a in pipe.statistics),
        local_mesh(),
        pipe.dtype,
    )
    spread = quiet(several)(prompts, num_images_per_prompt=2, prior_num_inference_steps=3, seed=7)
    np.testing.assert_allclose(spread, whole, rtol=0, atol=2e-5)
    assert len({tuple(row) for row in whole.round(2).tolist()}) == 4
    assert np.abs(pipe(prompts, 2, 3, seed=8) - whole).max() > 0.1


def test_given_noise_is_what_is_used(pipe):
    rng = np.random.default_rng(0)
    start, noise = rng.standard_normal((2, 64), np.float32), rng.standard_normal((3, 2, 64), np.float32)
    arguments = {"num_images_per_prompt": 2, "prior_num_inference_steps": 3, "prior_latents": start}
    one = pipe("a dog", **arguments, prior_step_noise=noise)
    np.testing.assert_array_equal(pipe("a dog", **arguments, prior_step_noise=noise, seed=5), one)
    noise[-1] += 1  # the last step takes none
    np.testing.assert_array_equal(pipe("a dog", **arguments, prior_step_noise=noise), one)
    noise[0] += 1
    assert np.abs(pipe("a dog", **arguments, prior_step_noise=noise) - one).max() > 0.01


def test_padding_never_matters(pipe):
    """Karlo pads with 0 and transformers with the end token: masked, and behind a causal mask, they are one."""
    text = pipe.encode_prompts(["a cat"])
    garbled = text._replace(states=np.where(text.mask[..., None], text.states, 7).astype(np.float32))
    arguments = {"num_images_per_prompt": 2, "prior_num_inference_steps": 3}
    np.testing.assert_array_equal(pipe(text_features=garbled, **arguments), pipe("a cat", **arguments))


def test_guidance_of_one_is_off_and_scales_compile_nothing(pipe):
    """Off at 1, where it would be the conditional prediction; and no compilation when it changes."""
    plain = pipe("a dog", 2, 3, prior_guidance_scale=1)
    near = pipe("a dog", 2, 3, prior_guidance_scale=1 + 1e-6)
    np.testing.assert_allclose(near, plain, rtol=0, atol=1e-4)
    compiled = pipe.run._cache_size()
    far = pipe("two dogs", 2, 3, prior_guidance_scale=8.0, seed=3)
    assert pipe.run._cache_size() == compiled
    assert np.isfinite(far).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": None}, "give one of prompt and text_features, got neither"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": ["a", 3]}, "prompt is"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prior_num_inference_steps": 1}, "prior_num_inference_steps is 1; want 2 to 1000"),
        ({"prior_num_inference_steps": 2.0}, r"prior_num_inference_steps is 2\.0"),
        ({"prior_guidance_scale": "4"}, "prior_guidance_scale is '4'"),
        ({"prior_guidance_scale": float("nan")}, "prior_guidance_scale is nan"),
        ({"prior_latents": np.zeros((2, 64))}, r"prior_latents has shape \(2, 64\); want \(1, 64\)"),
        ({"prior_latents": np.full((1, 64), np.nan)}, "prior_latents holds NaN"),
        ({"prior_step_noise": np.zeros((24, 1, 64))}, "prior_step_noise has shape"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"text_features": RECORDED_TEXT}, "not both"),
        ({"negative_text_features": 3}, "negative_text_features is int; want TextFeatures"),
        ({"negative_text_features": RECORDED_TEXT}, r"negative_text_features\.states has shape \(4, 77, 40\)"),
    ],
)
def test_arguments_that_are_refused(pipe, arguments, words):
    compiled = pipe.run._cache_size()
    with pytest.raises(ValueError, match=words) as caught:
        pipe(**{"prompt": "a dog", **arguments})
    assert "\n" not in str(caught.value)
    assert pipe.run._cache_size() == compiled


def test_masks_that_hide_everything(pipe):
    text = pipe.encode_prompts(["a cat"])
    with pytest.raises(ValueError, match=r"text_features\.mask hides the first token"):
        pipe(text_features=text._replace(mask=np.zeros_like(text.mask)))


def test_texts_of_the_two_dialects():
    """OpenAI's tokenizer is open_clip's but for the names of its special tokens."""
    tokenizer = Tokenizer.from_json(openai_tokenizer_json(), "open_clip")
    ids, mask = tokenizer.with_mask(["a cat", "<|endoftext|> !", "<end_of_text>", ""])
    assert ids[0, :5].tolist() == [49406, 320, 2368, 49407, 49407]
    assert ids[1, :4].tolist() == [49406, 49407, 256, 49407]
    assert ids[2, 1] != 49407
    assert mask.sum(1)[[0, 1, 3]].tolist() == [4, 4, 2]
