"""Losses against recordings of the original's training step, and against what they are in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.engine import export_tensors
from convert.rules import ldm
from tests.golden_weights import GOLDEN
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import abstract_networks
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.models.timestep import timestep_embedding
from unclip_jax.sampling.schedule import NoiseSchedule, add_noise, alphas_cumprod, to_x0_eps
from unclip_jax.training import objectives
from unclip_jax.training.ema import init_ema, update_ema
from unclip_jax.training.optimizer import adamw

RECORDED = np.load(GOLDEN / "training.npz")
MODELS = {"train_unclip_h": ("unclip_h", "v_prediction"), "train_eps": ("txt2img_eps", "epsilon")}
SCHEDULE = alphas_cumprod(NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), "original")
RATE = 1e-4


def recorded(case):
    """The recording's arrays, images with channels last."""
    arrays = {key.partition("/")[2]: RECORDED[key] for key in RECORDED.files if key.startswith(f"{case}/")}
    return {k: np.moveaxis(a, 1, -1) if k in ("z", "noise", "target_v") else a for k, a in arrays.items()}


@pytest.fixture(scope="module")
def steps(golden_files):
    """Case -> (recording, loss, parameters before, gradients, parameters after, averages after three updates)."""

    @functools.cache
    def step(case):
        model, prediction_type = MODELS[case]
        file, options = golden_files(model)
        with open_checkpoint(file, **options) as checkpoint:
            abstract = {"unet": abstract_networks(checkpoint.config)["unet"]}
            unet = load_networks(checkpoint, abstract, local_mesh(jax.local_devices()[:1]), progress=False)["unet"]
            config = checkpoint.config
        r = recorded(case)

        def loss(params):
            losses = objectives.denoising_losses(
                unet.merge(params),
                r["z"],
                r["noise"],
                r["t"],
                r["ctx"],
                r.get("c_adm"),
                alphas_cumprod=SCHEDULE,
                prediction_type=prediction_type,
            )
            return losses.mean()

        value, gradients = jax.jit(jax.value_and_grad(loss))(unet.params)
        optimizer = adamw(RATE)

        @jax.jit
        def updated(params, gradients):
            updates, _ = optimizer.update(gradients, optimizer.init(params), params)
            after, average = optax.apply_updates(params, updates), init_ema(params)
            for _ in range(3):
                average = update_ema(average, after)
            return after, average

        after, average = updated(unet.params, gradients)
        return r, config, value, unet.params, gradients, after, average

    return step


def foreign(config, params):
    """Parameters of the UNet, or arrays like them, under the original's names."""
    held = {
        f"unet.{name}": Parameter(a.shape, np.dtype(np.float32), (functools.partial(np.asarray, a),))
        for name, a in params.items()
    }
    return {
        name.removeprefix("model."): tensor.read() for name, tensor in export_tensors(
            ldm.table(config, held).rules, held
        ).items()
    }  # fmt: skip


@pytest.mark.e2e
@pytest.mark.parametrize("case", MODELS)
def test_the_recorded_loss(steps, case):
    r, _, value, *_ = steps(case)
    np.testing.assert_allclose(value, r["loss"], rtol=1e-5)  # 3e-7


@pytest.mark.e2e
@pytest.mark.parametrize("case", MODELS)
def test_the_recorded_gradients(steps, case):
    r, config, _, _, gradients, _, _ = steps(case)
    ours = foreign(config, gradients)
    wanted = {key.removeprefix("grad/"): array for key, array in r.items() if key.startswith("grad/")}
    assert len(wanted) > 8
    for name, want in wanted.items():
        assert np.linalg.norm(ours[name] - want) < 2e-5 * np.linalg.norm(want), name  # 8e-6
    np.testing.assert_allclose(jax.jit(optax.tree.norm)(gradients), r["grad_norm"], rtol=1e-5)


@pytest.mark.e2e
@pytest.mark.parametrize("case", MODELS)
def test_the_recorded_step_and_averages(steps, case):
    """One step of AdamW moves each weight by about the rate: compared with that, not with the weight."""
    r, config, _, before, _, after, average = steps(case)
    start, ours, averaged = (foreign(config, params) for params in (before, after, average.params))
    assert int(average.updates) == int(r["ema_num_updates"])
    for key, want in r.items():
        kind, _, name = key.partition("/")
        if kind == "stepped":
            assert np.abs(ours[name] - start[name]).max() > RATE / 2
            np.testing.assert_allclose(ours[name], want, rtol=0, atol=2e-3 * RATE)  # 1.5e-4
        if kind == "ema3":
            np.testing.assert_allclose(averaged[name], want, rtol=0, atol=2e-3 * RATE)  # 1.5e-4


def test_the_recorded_class_labels():
    """A dropped condition is zeros, level and all; what was kept ends with its level's embedding."""
    r = recorded("train_unclip_h")
    keep, levels = r["input_rng_003_bernoulli"][:, 0], r["input_rng_001_randint"]
    width = r["input_rng_002_randn_like"].shape[1]
    embeds = jnp.ones((3, width))
    made = objectives.image_conditioning(
        embeds,
        levels,
        r["input_rng_002_randn_like"],
        keep.astype(bool),
        alphas_cumprod=alphas_cumprod(NoiseSchedule(beta_schedule="squaredcos_cap_v2"), "original"),
        mean=jnp.zeros(width),
        std=jnp.ones(width),
    )
    assert not r["c_adm"][keep == 0].any()
    np.testing.assert_array_equal(made[keep == 0], r["c_adm"][keep == 0])
    np.testing.assert_allclose(made[:, width:], r["c_adm"][:, width:], atol=1e-6)
    np.testing.assert_allclose(made[keep == 1, width:], timestep_embedding(levels, width)[keep == 1], atol=1e-6)


@given(st.sampled_from(["epsilon", "v_prediction", "sample"]), st.floats(0.01, 0.99))
def test_a_right_prediction_gives_back_the_data(kind, share):
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 2, 3, 3, 4), np.float32)
    a = jnp.full(2, share)
    found = to_x0_eps(kind, objectives.prediction_target(kind, x0, noise, a), add_noise(x0, noise, a), a)
    for got, want in zip(found, (x0, noise), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


@given(st.floats(0.001, 0.999), st.floats(0.5, 20))
def test_min_snr_is_the_same_for_every_prediction(share, gamma):
    """One error of x0, told as an error of each kind of prediction, weighs the same."""
    a = jnp.asarray([share])
    error = {"sample": 1.0, "epsilon": share / (1 - share), "v_prediction": 1 / (1 - share)}  # squared, for 1 of x0
    weighed = [float(objectives.min_snr_weights(kind, a, gamma)[0]) * error[kind] for kind in error]
    np.testing.assert_allclose(weighed, min(share / (1 - share), gamma), rtol=1e-3)


def test_min_snr_without_signal():
    """Of a schedule that ends in pure noise."""
    a = jnp.zeros(1)
    assert [float(objectives.min_snr_weights(k, a)[0]) for k in ("epsilon", "v_prediction", "sample")] == [1, 0, 0]


def test_added_channels_reach_the_network():
    seen = []

    def denoise(x, timesteps, context, labels):
        seen.append(x)
        return x[..., :4]

    x0 = jnp.ones((2, 4, 4, 4))
    added = jnp.arange(2 * 16 * 5, dtype=jnp.float32).reshape(2, 4, 4, 5)
    losses = objectives.denoising_losses(
        denoise,
        x0,
        0 * x0,
        jnp.array([0, 999]),
        jnp.zeros((2, 1, 1)),
        alphas_cumprod=SCHEDULE,
        prediction_type="sample",
        added_channels=added,
    )
    np.testing.assert_array_equal(seen[0][..., 4:], added)
    np.testing.assert_allclose(losses, (np.sqrt(SCHEDULE[[0, 999]]) - 1) ** 2, rtol=1e-4)


def test_offset_noise_moves_channels():
    noise, offset = jnp.zeros((2, 3, 3, 4)), jnp.arange(8.0).reshape(2, 4)
    moved = objectives.offset_noise(noise, offset, 0.1)
    np.testing.assert_allclose(moved, np.broadcast_to(0.1 * offset[:, None, None], noise.shape), rtol=1e-6)


def test_what_is_refused():
    x = jnp.zeros((1, 2, 2, 4))
    for call in (
        lambda: objectives.prediction_target("flow", x, x, jnp.ones(1)),
        lambda: objectives.min_snr_weights("flow", jnp.ones(1) / 2),
        lambda: objectives.min_snr_weights("epsilon", jnp.ones(1) / 2, 0.0),
    ):
        with pytest.raises(ValueError, match=r"prediction_type|min_snr_gamma"):
            call()
