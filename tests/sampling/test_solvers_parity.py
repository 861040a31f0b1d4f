"""Whole trajectories and tables, live against the installed diffusers."""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampling.trajectories import BIAS, PUBLISHED, SHAPE, network, run
from unclip_jax.sampling.schedule import NoiseSchedule, alphas_cumprod, to_x0_eps
from unclip_jax.sampling.solvers import make_solver
from unclip_jax.sampling.solvers.sigmas import SPACINGS

# diffusers turns tensors into arrays in a way that numpy 2 deprecates.
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

CLASSES = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
    "dpm++2m-karras": DPMSolverMultistepScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "dpm2": KDPM2DiscreteScheduler,
    "dpm2-a": KDPM2AncestralDiscreteScheduler,
}
V = {"prediction_type": "v_prediction"}
COSINE = {**V, "beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {**PUBLISHED, "rescale_betas_zero_snr": True}
TO_SIGMA_MIN = {**PUBLISHED, "final_sigmas_type": "sigma_min"}
TRAINED = {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()}


def reference(name, config, steps, eta, start, noise):
    """Timesteps and end of diffusers' trajectory."""
    if name.endswith("karras"):
        config = {**config, "use_karras_sigmas": True}
    scheduler = CLASSES[name].from_config(config)
    scheduler.set_timesteps(steps)
    if name.startswith("dpm"):
        # As pipelines that start in the middle do: without it two equal timesteps at the start overrun the grid.
        scheduler.set_begin_index(0)
    x, bias = torch.from_numpy(start.copy()), torch.from_numpy(BIAS)
    for i, timestep in enumerate(scheduler.timesteps):
        draw = {"eta": eta, "variance_noise": torch.from_numpy(noise[i])} if eta else {}
        x = scheduler.step(network(x, timestep, torch, bias), timestep, x, **draw).prev_sample
    return scheduler.timesteps.numpy(), x.numpy()


def compare(name, config, steps, eta=0.0):
    """The largest error at the end of a trajectory, relative to its largest value."""
    rng = np.random.default_rng(steps)
    start, noise = rng.standard_normal(SHAPE, np.float32), rng.standard_normal((steps + 10, *SHAPE), np.float32)
    timesteps, end = reference(name, config, steps, eta, start, noise)
    solver = make_solver(name, config, steps, eta)
    np.testing.assert_array_equal(solver.grid["timestep"], timesteps)
    return float(np.abs(run(solver, start, noise) - end).max() / np.abs(end).max())


PREDICTIONS = [
    (name, prediction_type)
    for name in ("ddim", "ddim eta 1", "pndm", "pndm prk", "dpm++2m", "dpm++2m-karras")
    for prediction_type in ("epsilon", "v_prediction", "sample")
    if prediction_type != "sample" or not name.startswith("pndm")
]


@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
@pytest.mark.parametrize(("name", "prediction_type"), PREDICTIONS)
def test_trajectories(name, prediction_type, spacing):
    """Measured: 4e-6 at most, 3e-7 typically."""
    config = {**PUBLISHED, "prediction_type": prediction_type, "skip_prk_steps": name != "pndm prk"}
    if spacing:
        config["timestep_spacing"] = spacing
    for steps in (4, 5, 7, 15, 20, 30, 50) if name == "pndm prk" else (1, 2, 3, 5, 7, 14, 15, 20, 30, 50):
        error = compare(name.split()[0], config, steps, eta=1.0 if name == "ddim eta 1" else 0.0)
        assert error <= 1e-5, f"{steps} steps: {error:.1e}"


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpm++2m", "dpm++2m-karras"])
@pytest.mark.parametrize(("steps", "tolerance"), [(333, 1e-5), (999, 5e-5)])
def test_long_trajectories(name, steps, tolerance):
    """Measured: 8e-6 (333 steps) and 1.4e-5 (999): a thousand roundings on both sides."""
    assert compare(name, PUBLISHED, steps) <= tolerance


@pytest.mark.parametrize(
    ("name", "config", "eta"),
    [
        ("ddim", {}, 0.5),
        ("ddim", {**V, "thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.7}, 0.3),
        ("ddim", {**PUBLISHED, "clip_sample": True, "clip_sample_range": 0.7}, 1.0),
        ("ddim", {**PUBLISHED, "set_alpha_to_one": True, "steps_offset": 0}, 1.0),
        ("ddim", {**ZERO_SNR, "timestep_spacing": "trailing"}, 0.0),
        ("ddim", {**ZERO_SNR, "timestep_spacing": "linspace"}, 1.0),
        ("ddim", {**V, **TRAINED}, 0.2),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}, 0.0),
        ("pndm", {**TRAINED, "skip_prk_steps": True}, 0.0),
        ("pndm", {"set_alpha_to_one": True, "skip_prk_steps": True}, 0.0),
        ("dpm++2m", {}, 0.0),
        ("dpm++2m", TO_SIGMA_MIN, 0.0),
        ("dpm++2m-karras", TO_SIGMA_MIN, 0.0),
        ("dpm++2m", {**TO_SIGMA_MIN, "euler_at_final": True}, 0.0),
        ("dpm++2m", {**TO_SIGMA_MIN, "lower_order_final": False}, 0.0),
        ("dpm++2m", {**TO_SIGMA_MIN, "lower_order_final": False, "solver_order": 3}, 0.0),
        ("dpm++2m", {**PUBLISHED, "solver_order": 3}, 0.0),
        ("dpm++2m", {**PUBLISHED, "solver_order": 1}, 0.0),
        ("dpm++2m", {**PUBLISHED, "solver_type": "heun"}, 0.0),
        ("dpm++2m", {**TO_SIGMA_MIN, "solver_type": "heun"}, 0.0),
        ("dpm++2m", {**PUBLISHED, "solver_type": "bh2"}, 0.0),
        ("dpm++2m", ZERO_SNR, 0.0),
        ("dpm++2m-karras", ZERO_SNR, 0.0),
        ("dpm++2m", {**ZERO_SNR, "timestep_spacing": "trailing", "solver_order": 3}, 0.0),
        ("dpm++2m", {**PUBLISHED, "thresholding": True, "sample_max_value": 1.5}, 0.0),
        ("dpm++2m", {**COSINE, "lambda_min_clipped": -5.1}, 0.0),
        ("dpm++2m", {**COSINE, "lambda_min_clipped": -5.1, "timestep_spacing": "leading"}, 0.0),
        ("dpm++2m", {**COSINE, "lambda_min_clipped": -5.1, "timestep_spacing": "trailing"}, 0.0),
        ("dpm++2m-karras", COSINE, 0.0),
    ],
)
def test_settings(name, config, eta):
    """Measured: 3e-6 at most, 4e-7 typically."""
    for steps in (2, 5, 12, 20, 40):
        error = compare(name, config, steps, eta)
        assert error <= 1e-5, f"{steps} steps: {error:.1e}"


@given(
    st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    st.integers(2, 1200),
    st.floats(1e-5, 0.02),
    st.floats(0.02, 0.05),
)
@settings(deadline=None, max_examples=60)
def test_tables_are_bit_equal(kind, count, start, end):
    fields = {"num_train_timesteps": count, "beta_start": start, "beta_end": end, "beta_schedule": kind}
    theirs = DDIMScheduler(**fields).alphas_cumprod.numpy()
    np.testing.assert_array_equal(alphas_cumprod(NoiseSchedule(**fields), "diffusers"), theirs)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_rescaled_tables_agree_up_to_torchs_square_root(kind):
    """Measured: 4e-7; torch's float32 square root is not always correctly rounded."""
    fields = {"beta_schedule": kind, "rescale_betas_zero_snr": True}
    theirs = DDIMScheduler(**fields).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(NoiseSchedule(**fields), "diffusers"), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_conversions(prediction_type):
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal((2, *SHAPE), np.float32)
    scheduler = DDIMScheduler.from_config({**PUBLISHED, "prediction_type": prediction_type})
    scheduler.set_timesteps(20)
    for timestep in (1, 501, 951):
        theirs = scheduler.step(torch.from_numpy(out), timestep, torch.from_numpy(x)).pred_original_sample
        share = scheduler.alphas_cumprod[timestep].numpy()
        ours, _ = to_x0_eps(prediction_type, jnp.asarray(out), jnp.asarray(x), share)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


class Doubled:
    """torch for a scheduler that would cast to float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def sigma_reference(name, config, steps, start, noise, monkeypatch):
    """Timesteps and end of diffusers' trajectory, of solvers that scale what the network is given.

    In float64, since steps from a high noise level lose digits in float32: what differs then is ours.
    """
    kind, _, spacing = name.rpartition("-") if name.endswith(("-karras", "-exponential", "-beta")) else (name, "", "")
    if spacing:
        config = {**config, f"use_{spacing}_sigmas": True}
    scheduler = CLASSES[kind].from_config(config)
    scheduler.set_timesteps(steps)
    if kind != "ddpm":
        scheduler.set_begin_index(0)
    for table in {"sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down"} & vars(scheduler).keys():
        setattr(scheduler, table, getattr(scheduler, table).double())
    x, bias = torch.from_numpy(start).double() * scheduler.init_noise_sigma, torch.from_numpy(BIAS).double()
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "torch", Doubled())
    for i, timestep in enumerate(scheduler.timesteps):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, i=i, **o: torch.from_numpy(noise[i]), raising=False)
        out = network(scheduler.scale_model_input(x, timestep), timestep, torch, bias)
        x = scheduler.step(out, timestep, x).prev_sample
    return scheduler.timesteps.numpy(), x.numpy()


def sigma_error(name, config, steps, monkeypatch):
    rng = np.random.default_rng(steps)
    start, noise = rng.standard_normal(SHAPE, np.float32), rng.standard_normal((2 * steps, *SHAPE), np.float32)
    timesteps, end = sigma_reference(name, config, steps, start, noise, monkeypatch)
    solver = make_solver(name, config, steps)
    np.testing.assert_allclose(solver.grid["timestep"], timesteps, rtol=0, atol=2e-3)
    # Told exactly what diffusers tells its network, so that only the solver is compared.
    solver = dataclasses.replace(solver, grid={**solver.grid, "timestep": timesteps.astype(np.float32)})
    ours = run(solver, start, noise)
    return float(np.abs(ours - end).max() / np.abs(end).max())


SPACED = [f"{kind}-{spacing}" for kind in ("euler", "heun", "lms", "dpm2", "dpm2-a") for spacing in SPACINGS]
SIGMA_SOLVERS = ["ddpm", "euler", "euler-a", "heun", "lms", "dpm2", "dpm2-a", *SPACED]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SIGMA_SOLVERS)
def test_trajectories_over_noise_levels(name, prediction_type, spacing, monkeypatch):
    """Measured: 7e-6 at most."""
    config = {**PUBLISHED, "prediction_type": prediction_type, "timestep_spacing": spacing}
    # From the highest noise level to the lowest at once diffusers loses an ancestral step's small end.
    for steps in (5, 10, 20, 30, 50) if name.startswith("dpm2-a") else (1, 2, 3, 5, 10, 20, 30, 50):
        error = sigma_error(name, config, steps, monkeypatch)
        assert error <= 1e-5, f"{steps} steps: {error:.1e}"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("euler", {}),
        ("euler", {**ZERO_SNR, "timestep_spacing": "trailing"}),
        ("euler-karras", {**ZERO_SNR, "timestep_spacing": "trailing"}),
        ("euler", {**PUBLISHED, "final_sigmas_type": "sigma_min"}),
        ("euler", {**V, **TRAINED}),
        ("euler-a", {}),
        ("euler-a", {**ZERO_SNR, "timestep_spacing": "trailing"}),
        ("heun", {}),
        ("lms", COSINE),
        ("dpm2", {}),
        ("dpm2-a", {}),
        ("ddpm", {}),
        ("ddpm", {**PUBLISHED, "variance_type": "fixed_large"}),
        ("ddpm", {**PUBLISHED, "variance_type": "fixed_small_log"}),
        ("ddpm", {**ZERO_SNR, "timestep_spacing": "trailing"}),
        ("ddpm", {**V, "thresholding": True, "sample_max_value": 2.0}),
    ],
)
def test_settings_over_noise_levels(name, config, monkeypatch):
    """Measured: 7e-6 at most."""
    for steps in (5, 7, 25) if name.startswith("dpm2-a") else (2, 7, 25):
        error = sigma_error(name, config, steps, monkeypatch)
        assert error <= 1e-5, f"{steps} steps: {error:.1e}"
