"""Whole trajectories and tables, live against the installed diffusers."""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampling.trajectories import BIAS, PUBLISHED, SHAPE, network, run
from unclip_jax.sampling.schedule import NoiseSchedule, alphas_cumprod, to_x0_eps
from unclip_jax.sampling.solvers import SCHEDULERS, ddim_inversion, make_solver, scheduler_name

# diffusers turns tensors into arrays in a way that numpy 2 deprecates.
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*dpmsolver.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

CLASSES = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
    "dpm++2m-karras": DPMSolverMultistepScheduler,
    "dpm++2m-sde": DPMSolverMultistepScheduler,
    "dpm++2s": DPMSolverSinglestepScheduler,
    "unipc": UniPCMultistepScheduler,
    "deis": DEISMultistepScheduler,
    "lcm": LCMScheduler,
    "tcd": TCDScheduler,
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
ZERO_SNR_TRAILING = {**ZERO_SNR, "timestep_spacing": "trailing"}
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
    solver = make_solver(name, config, steps, eta, own=True)
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


SPACING_KEYS = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "sgm-uniform": {"timestep_spacing": "trailing"},
}


def described(name, config):
    """Base of a name, and the configuration that makes diffusers' class be that solver."""
    base = max((known for known in CLASSES if name == known or name.startswith(f"{known}-")), key=len)
    base = base.removesuffix("-karras")
    if base == "dpm++2m-sde":
        config = {"algorithm_type": "sde-dpmsolver++", **config}
    return base, {**config, **SPACING_KEYS.get(name[len(base) + 1 :], {})}


def double_reference(name, config, steps, start, noise, monkeypatch, eta=0.0, start_step=0, clean=None):
    """Timesteps and end of diffusers' trajectory.

    In float64, since steps from a high noise level lose digits in float32: what differs then is ours.
    """
    base, config = described(name, config)
    scheduler = CLASSES[base].from_config(config)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[start_step * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start_step * scheduler.order)
    for table in {"sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "alphas_cumprod"} & vars(scheduler).keys():
        setattr(scheduler, table, getattr(scheduler, table).double())
    module = sys.modules[type(scheduler).__module__]
    x, bias = torch.from_numpy(start).double(), torch.from_numpy(BIAS).double()
    options = {"eta": eta} if base in ("ddim", "tcd") else {}
    # Only around the steps: the next scheduler's tables are to be float32.
    with monkeypatch.context() as patch:
        patch.setattr(module, "torch", Doubled())
        if clean is None:
            x = x * scheduler.init_noise_sigma
        else:
            x = scheduler.add_noise(torch.from_numpy(clean).double(), x, timesteps[:1])
        for i, timestep in enumerate(timesteps):
            draw = torch.from_numpy(noise[i]).double()
            patch.setattr(module, "randn_tensor", lambda *a, draw=draw, **o: draw, raising=False)
            out = network(scheduler.scale_model_input(x, timestep), timestep, torch, bias)
            x = scheduler.step(out, timestep, x, **options).prev_sample
    return timesteps.numpy(), x.numpy()


def double_error(name, config, steps, monkeypatch, eta=0.0, start_step=0):
    """As `compare`; with `start_step`, from a noised image."""
    rng = np.random.default_rng(steps)
    start, clean = rng.standard_normal((2, *SHAPE), np.float32)
    noise, clean = rng.standard_normal((2 * steps + 10, *SHAPE), np.float32), clean if start_step else None
    timesteps, end = double_reference(name, config, steps, start, noise, monkeypatch, eta, start_step, clean)
    solver = make_solver(name, config, steps, eta, start_step, own=True)
    # Where diffusers rounds down, its first timestep is 998 or 999 from run to run: float32 logarithms decide.
    tolerance = 1 if name.endswith(("exponential", "beta", "lu")) else 2e-3
    np.testing.assert_allclose(solver.grid["timestep"], timesteps, rtol=0, atol=tolerance)
    # Told exactly what diffusers tells its network, so that only the solver is compared.
    solver = dataclasses.replace(solver, grid={**solver.grid, "timestep": timesteps.astype(np.float32)})
    ours = run(solver, start, noise, clean=clean)
    return float(np.abs(ours - end).max() / np.abs(end).max())


OLD = ("ddim", "pndm", "dpm++2m", "dpm++2m-karras")  # above, in float32
DIFFUSERS = [name for name in SCHEDULERS if not name.startswith("ldm-")]
SPACED = [name for name in DIFFUSERS if name not in CLASSES and name not in OLD]
UNSPACED = [name for name in DIFFUSERS if name in CLASSES and name not in OLD]


@pytest.mark.parametrize("name", SPACED)
def test_trajectories_of_every_spacing(name, monkeypatch):
    """Measured: 1.7e-5 (dpm2-a-beta, 3 steps), else 8e-6 at most, 3e-7 typically."""
    for prediction_type, steps in (("epsilon", 5), ("v_prediction", 5), ("v_prediction", 10), ("epsilon", 20)):
        error = double_error(name, {**PUBLISHED, "prediction_type": prediction_type}, steps, monkeypatch)
        assert error <= 1e-5, f"{prediction_type}, {steps} steps: {error:.1e}"


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", UNSPACED)
def test_trajectories_of_every_timestep_spacing(name, spacing, monkeypatch):
    """Measured: 7e-6 at most, 3e-7 typically."""
    for prediction_type, steps in (("epsilon", 5), ("v_prediction", 5), ("epsilon", 10), ("v_prediction", 30)):
        config = {**PUBLISHED, "prediction_type": prediction_type, "timestep_spacing": spacing}
        error = double_error(name, config, steps, monkeypatch)
        assert error <= 1e-5, f"{prediction_type}, {steps} steps: {error:.1e}"


@pytest.mark.parametrize("name", [name for name in DIFFUSERS if name in CLASSES or name.endswith("lu")])
def test_trajectories_that_start_from_an_image(name, monkeypatch):
    """Measured: 6e-7 at most."""
    for steps, start_step in ((3, 1), (3, 2), (8, 1), (8, 3), (20, 2), (20, 11)):
        error = double_error(name, PUBLISHED, steps, monkeypatch, start_step=start_step)
        assert error <= 5e-6, f"{steps} steps from {start_step}: {error:.1e}"


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_runge_kutta_steps_that_start_from_an_image(spacing, monkeypatch):
    """Of which diffusers runs twelve from wherever it starts, or as many as there are.

    Measured: 7e-6 (of 20 steps the last, which is taken for the first of all), else 1e-6 at most.
    """
    config = {**PUBLISHED, "skip_prk_steps": False, "timestep_spacing": spacing}
    for steps, start_step in ((4, 1), (4, 2), (4, 3), (8, 1), (8, 3), (20, 2), (20, 11), (20, 19)):
        error = double_error("pndm", config, steps, monkeypatch, start_step=start_step)
        assert error <= 2e-5, f"{steps} steps from {start_step}: {error:.1e}"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("euler", {}),
        ("euler", ZERO_SNR_TRAILING),
        ("euler-karras", ZERO_SNR_TRAILING),
        ("euler", TO_SIGMA_MIN),
        ("euler", {**V, **TRAINED}),
        ("euler-a", {}),
        ("euler-a", ZERO_SNR_TRAILING),
        ("heun", {}),
        ("lms", COSINE),
        ("dpm2", {}),
        ("dpm2-a", {}),
        ("ddpm", {}),
        ("ddpm", {**PUBLISHED, "variance_type": "fixed_large"}),
        ("ddpm", {**PUBLISHED, "variance_type": "fixed_small_log"}),
        ("ddpm", ZERO_SNR_TRAILING),
        ("ddpm", {**V, "thresholding": True, "sample_max_value": 2.0}),
        ("ddim", ZERO_SNR_TRAILING),
        ("dpm++2m", ZERO_SNR_TRAILING),
        ("dpm++2m", {**TO_SIGMA_MIN, "algorithm_type": "dpmsolver"}),
        ("dpm++2m", {**TO_SIGMA_MIN, "algorithm_type": "dpmsolver", "solver_order": 3}),
        ("dpm++2m", {**TO_SIGMA_MIN, "algorithm_type": "dpmsolver", "solver_type": "heun"}),
        ("dpm++2m-lu", COSINE),
        ("dpm++2m-sde", {}),
        ("dpm++2m-sde", ZERO_SNR_TRAILING),
        ("dpm++2m-sde", TO_SIGMA_MIN),
        ("dpm++2m-sde", {**PUBLISHED, "solver_type": "heun"}),
        ("dpm++2m-sde", {**PUBLISHED, "solver_order": 3}),
        ("dpm++2m-sde", {**TO_SIGMA_MIN, "algorithm_type": "sde-dpmsolver"}),
        ("dpm++2m-sde", {**TO_SIGMA_MIN, "algorithm_type": "sde-dpmsolver", "solver_type": "heun"}),
        ("dpm++2s", {}),
        ("dpm++2s", {**PUBLISHED, "solver_order": 1}),
        ("dpm++2s", {**PUBLISHED, "solver_order": 3}),
        ("dpm++2s", {**PUBLISHED, "solver_order": 3, "solver_type": "heun"}),
        ("dpm++2s", {**TO_SIGMA_MIN, "solver_order": 3, "lower_order_final": True}),
        ("dpm++2s", {**TO_SIGMA_MIN, "algorithm_type": "dpmsolver", "solver_order": 3, "solver_type": "heun"}),
        ("unipc", {}),
        ("unipc", ZERO_SNR_TRAILING),
        ("unipc", {**PUBLISHED, "solver_order": 1}),
        ("unipc", {**PUBLISHED, "solver_order": 3}),
        ("unipc", {**PUBLISHED, "disable_corrector": [0, 1, 3]}),
        ("unipc", {**TO_SIGMA_MIN, "solver_order": 3, "lower_order_final": False}),
        # "bh1" to no noise at all gives NaN in diffusers.
        ("unipc", {**TO_SIGMA_MIN, "solver_order": 3, "solver_type": "bh1"}),
        ("unipc", {**TO_SIGMA_MIN, "predict_x0": False}),
        ("unipc-karras", COSINE),
        ("deis", {}),
        ("deis", {**PUBLISHED, "solver_order": 3}),
        ("deis", {**PUBLISHED, "solver_order": 1}),
        ("lcm", {}),
        ("lcm", ZERO_SNR_TRAILING),
        ("lcm", {**PUBLISHED, "original_inference_steps": 100}),
        ("lcm", {**PUBLISHED, "clip_sample": True}),
        ("lcm", {**PUBLISHED, "thresholding": True, "sample_max_value": 2.0}),
        ("tcd", ZERO_SNR_TRAILING),
    ],
)
def test_settings_in_float64(name, config, monkeypatch):
    """Measured: 7e-6 at most, 3e-7 typically."""
    for steps, start_step in ((5, 0), (7, 2), (25, 0)):
        error = double_error(name, config, steps, monkeypatch, start_step=start_step)
        assert error <= 1e-5, f"{steps} steps from {start_step}: {error:.1e}"


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_tcd_draws_as_much_noise_as_eta_says(eta, monkeypatch):
    """Measured: 3e-7."""
    for steps in (1, 4, 25):
        assert double_error("tcd", PUBLISHED, steps, monkeypatch, eta) <= 2e-6


@pytest.mark.parametrize("config", [{}, PUBLISHED, ZERO_SNR_TRAILING])
def test_inversion(config):
    """Measured: 4e-7."""
    for steps in (3, 20, 50):
        scheduler = DDIMInverseScheduler.from_config(config, clip_sample=False)
        scheduler.set_timesteps(steps)
        start = np.random.default_rng(steps).standard_normal(SHAPE, np.float32)
        x, bias = torch.from_numpy(start), torch.from_numpy(BIAS)
        for timestep in scheduler.timesteps:
            x = scheduler.step(network(x, timestep, torch, bias), timestep, x).prev_sample
        solver = ddim_inversion(config, steps)
        np.testing.assert_array_equal(solver.grid["timestep"], scheduler.timesteps)
        np.testing.assert_allclose(run(solver, start), x, rtol=0, atol=5e-6 * np.abs(x.numpy()).max())


@pytest.mark.parametrize("name", DIFFUSERS)
def test_saved_configurations_name_their_solver(name):
    base, config = described(name, PUBLISHED)
    saved = {**CLASSES[base].from_config(config).config, "_class_name": CLASSES[base].__name__}
    assert scheduler_name(saved) == name.removesuffix("-sgm-uniform")  # which is in timestep_spacing
