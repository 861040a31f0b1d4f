"""Names of solvers, and settings that are honoured or refused by name."""

import numpy as np
import pytest

from tests.sampling.trajectories import DIFFERENT, PUBLISHED, config_of
from unclip_jax.sampling.solvers import (
    PUBLISHED_UNCLIP_SCHEDULER,
    SCHEDULERS,
    describes,
    make_solver,
    scheduler_name,
)


def test_the_published_configuration_names_pndm():
    assert scheduler_name(PUBLISHED_UNCLIP_SCHEDULER) == "pndm"
    assert scheduler_name({"_class_name": "DDIMScheduler"}) == "ddim"
    assert scheduler_name({"_class_name": "DPMSolverMultistepScheduler"}) == "dpm++2m"
    karras = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    assert scheduler_name(karras) == "dpm++2m-karras"
    assert scheduler_name({"_class_name": "HeunDiscreteScheduler", "use_beta_sigmas": True}) == "heun-beta"
    sde = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    assert scheduler_name(sde) == "dpm++2m-sde"
    assert scheduler_name({**sde, "use_lu_lambdas": True}) == "dpm++2m-sde-lu"
    assert scheduler_name({"_class_name": "UniPCMultistepScheduler", "use_exponential_sigmas": True}) == (
        "unipc-exponential"
    )
    # Keys that the class does not have are another's.
    assert scheduler_name({"_class_name": "EulerAncestralDiscreteScheduler", "use_karras_sigmas": True}) == "euler-a"
    for kind in ("RePaintScheduler", None):
        with pytest.raises(ValueError, match=f"{kind}.*accepted: DDIMScheduler, DDPMScheduler, PNDMScheduler"):
            scheduler_name({"_class_name": kind})


@pytest.mark.parametrize(
    ("name", "meant"), [("ddiim", "ddim"), ("DDIM", "ddim"), ("dpm++2m_karras", "dpm++2m-karras"), ("plms-ldm", "lms")]
)
def test_unknown_names_suggest_the_nearest(name, meant):
    with pytest.raises(ValueError, match=r"unknown scheduler .*accepted: ddim, ddpm, pndm, dpm\+\+2m") as error:
        make_solver(name, PUBLISHED, 5)
    assert meant is None or f"did you mean {meant!r}?" in str(error.value)


@pytest.mark.parametrize("name", DIFFERENT)
def test_bad_step_counts_are_refused(name):
    for steps in (0, -1, 1001, 2.0, "20", True, None, float("nan")):
        with pytest.raises(ValueError, match=r"^num_inference_steps is "):
            make_solver(name, config_of(name), steps)


@pytest.mark.parametrize("name", ["ddim", "heun", "ldm-dpm"])
@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), float("inf"), "1", None, True])
def test_bad_eta_is_refused(name, eta):
    with pytest.raises(ValueError, match=r"^eta is "):
        make_solver(name, PUBLISHED, 5, eta)


def test_numpy_numbers_are_numbers():
    assert make_solver("ddim", PUBLISHED, np.int64(5), np.float32(0.5)).calls == 5


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("ddim", {"timestep_spacing": "random"}, "timestep_spacing is 'random'; accepted: 'leading'"),
        ("ddim", {"steps_offset": 1.5}, "steps_offset"),
        ("ddim", {"steps_offset": 10**30}, "steps_offset"),
        ("ddim", {"steps_offset": 900}, "steps_offset 900 needs timestep 1"),
        ("ddim", {"clip_sample": "yes"}, "clip_sample"),
        ("ddim", {"clip_sample_range": -1.0}, "clip_sample_range"),
        ("ddim", {"clip_sample_range": float("nan")}, "clip_sample_range"),
        ("ddim", {"thresholding": True, "dynamic_thresholding_ratio": 2.0}, "dynamic_thresholding_ratio"),
        ("ddim", {"thresholding": True, "sample_max_value": 0.0}, "sample_max_value"),
        ("ddim", {"beta_start": "small"}, "beta_start"),
        ("ddim", {"beta_start": 10**400}, "beta_start"),
        ("ddim", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("ddim", {"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values"),
        ("ddim", {"trained_betas": "betas"}, "trained_betas"),
        ("ddim", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("ddim", {"prediction_type": ["epsilon"]}, "prediction_type"),
        (
            "ddim",
            {"prediction_type": "epsilon", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "zero signal",
        ),
        ("pndm", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("dpm++2m", {"algorithm_type": "unipc"}, "algorithm_type is 'unipc'"),
        ("dpm++2m", {"algorithm_type": "dpmsolver"}, "which wants final_sigmas_type 'sigma_min', not 'zero'"),
        ("dpm++2s", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type is 'sde-dpmsolver"),
        ("unipc", {"solver_p": "DDIMScheduler"}, "solver_p is 'DDIMScheduler'"),
        ("unipc", {"disable_corrector": 3}, "disable_corrector is 3; want a list of integers"),
        ("unipc", {"predict_x0": False}, "final_sigmas_type is 'zero'; want 'sigma_min' with predict_x0 false"),
        ("deis", {"thresholding": True}, "thresholding is True"),
        ("lcm", {"original_inference_steps": 0}, "original_inference_steps is 0; want 1 to 1000"),
        ("lcm", {"original_inference_steps": 15}, "num_inference_steps is 20; want 1 to 15 for 'lcm', whose"),
        ("ldm-plms", {"prediction_type": "v_prediction"}, "'ldm-plms' works with models that predict epsilon only"),
        ("dpm++2m", {"solver_order": 4}, "solver_order is 4; accepted: 1, 2, 3"),
        ("dpm++2m", {"solver_type": "euler"}, "solver_type"),
        ("dpm++2m", {"final_sigmas_type": "one"}, "final_sigmas_type"),
        ("dpm++2m", {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ("dpm++2m", {"variance_type": "learned"}, "variance_type is 'learned'"),
        ("ldm-ddim", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("ldm-dpm", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(name, setting, message):
    with pytest.raises(ValueError, match=message) as error:
        make_solver(name, {**PUBLISHED, **setting}, 20, own=True)
    assert "\n" not in str(error.value)


def test_keys_of_other_classes_are_ignored():
    foreign = {"_diffusers_version": "0.1", "thresholding": "?", "clip_sample": "?", "solver_order": 9, "mine": [1]}
    for name in ("pndm", "ldm-ddim", "ldm-dpm"):
        make_solver(name, {**PUBLISHED, **foreign}, 5)


def test_absent_keys_take_the_new_classes_default():
    """The published PNDM file has no timestep_spacing: leading for DDIM, linspace for DPM-Solver++."""
    assert make_solver("ddim", PUBLISHED, 5).grid["timestep"].tolist() == [801, 601, 401, 201, 1]
    assert make_solver("dpm++2m", PUBLISHED, 5).grid["timestep"].tolist() == [999, 799, 599, 400, 200]
    leading = {**PUBLISHED, "timestep_spacing": "leading"}
    assert make_solver("dpm++2m", leading, 5).grid["timestep"].tolist() == [831, 665, 499, 333, 167]
    # DDIM's own defaults: clipping on, no offset, alphas_cumprod 1 at the end.
    grid = make_solver("ddim", {}, 5, own=True).grid
    assert (grid["timestep"][-1], grid["clip"][0], grid["x0"][-1]) == (0, 1, 1)


@pytest.mark.parametrize("setting", [{"clip_sample": True}, {"clip_sample": ...}, {"thresholding": True}])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("ldm-")])
def test_a_solver_that_takes_anothers_place_never_limits_x0(name, setting):
    """Latents go far beyond what these settings, and some classes' defaults, would leave of them."""
    config = {key: value for key, value in {**PUBLISHED, **setting}.items() if value is not ...}
    grid = make_solver(name, config, 5).grid
    assert np.all(np.isinf(grid.get("clip", np.inf)))
    assert "threshold_ratio" not in grid


def test_defaults_of_the_class_whose_place_is_taken_do_not_count():
    """As in diffusers, which marks them."""
    config = {**PUBLISHED, "steps_offset": 1, "_use_default_values": ["steps_offset"]}
    assert make_solver("ddim", config, 5).grid["timestep"][-1] == 0
    assert make_solver("ddim", config, 5, own=True).grid["timestep"][-1] == 1
    assert make_solver("ddim", {**PUBLISHED, "_use_default_values": 5}, 5).grid["timestep"][-1] == 1


def test_what_a_file_describes():
    assert describes(PUBLISHED_UNCLIP_SCHEDULER, "pndm")
    assert not describes(PUBLISHED_UNCLIP_SCHEDULER, "ddim")
    assert describes({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler-karras")
    assert not describes({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler")
    for config in ({}, {"_class_name": "RePaintScheduler"}, {"_class_name": ["DDIMScheduler"]}):
        assert not describes(config, "ddim")


@pytest.mark.parametrize("steps", [61, 998])
def test_trailing_spacing_ends_before_timestep_zero(steps):
    """Where diffusers' rounding adds a timestep of -1."""
    for name, calls in (("ddim", steps), ("pndm", steps + 1), ("dpm++2m", steps)):
        grid = make_solver(name, {**PUBLISHED, "timestep_spacing": "trailing"}, steps).grid
        assert len(grid["index"]) == calls
        assert grid["timestep"].min() >= 0
