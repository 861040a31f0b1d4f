"""Ancestral sampling (Ho et al. 2020, arXiv:2006.11239) over respaced timesteps, as Karlo's prior runs it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.reference import Reference
from unclip_jax.sampling.schedule import NoiseSchedule, alphas_cumprod, cosine_betas
from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.registry import make_solver, scheduler_name
from unclip_jax.sampling.solvers.settings import check_steps, read_settings
from unclip_jax.sampling.solvers.solver import Solver, make_grid
from unclip_jax.sampling.solvers.thresholding import limits

DEFAULTS = {
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_small_log",
    "clip_sample": True,
    "clip_sample_range": 1.0,
}
CHOICES = {
    "prediction_type": ("epsilon", "sample"),
    "beta_schedule": ("squaredcos_cap_v2",),
    "variance_type": ("fixed_small_log",),
}


def prior_solver(
    config: Mapping[str, Any], num_inference_steps: int, reference: Reference = Reference.DIFFUSERS
) -> Solver:
    """The solver that a prior's scheduler_config.json names: UnCLIPScheduler, or one of those of `make_solver`.

    Args:
        config: The contents of the file.
        num_inference_steps: Network evaluations.
        reference: As in `unclip_scheduler`.

    Returns:
        The solver.

    Raises:
        ValueError: The class or a setting is not supported.
    """
    if config.get("_class_name") == "UnCLIPScheduler":
        return unclip_scheduler(config, num_inference_steps, reference)
    return make_solver(scheduler_name(config), config, num_inference_steps, own=True)


def unclip_scheduler(
    config: Mapping[str, Any], num_inference_steps: int, reference: Reference = Reference.DIFFUSERS
) -> Solver:
    """Ancestral sampling with `num_inference_steps` network evaluations, from the last timestep to the first.

    Args:
        config: A diffusers scheduler_config.json (UnCLIPScheduler). Models that predict their variance are refused.
        num_inference_steps: Network evaluations, 2 to the number of training timesteps.
        reference: Whose rounding to reproduce, of the tables and of timesteps between two integers: "diffusers", or
            "original" for the original's `SpacedDiffusion`, which accumulates its strides.

    Returns:
        The solver; it is stochastic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, DEFAULTS, CHOICES)
    schedule = NoiseSchedule(int(settings["num_train_timesteps"]), beta_schedule="squaredcos_cap_v2")
    table = alphas_cumprod(schedule, reference)
    count = check_steps(num_inference_steps, len(table), 2, "the prior's respaced timesteps")
    stride = (len(table) - 1) / (count - 1)
    added = np.cumsum(np.append(0.0, np.full(count - 1, stride)))
    rising = added if reference == Reference.ORIGINAL else np.arange(count) * stride
    timesteps = rising.round()[::-1].astype(np.int64)
    here = table[timesteps].astype(np.float64)
    there = np.append(here[1:], 1.0)
    beta = 1 - here / there
    if reference == Reference.DIFFUSERS:
        # Between neighbours diffusers takes the beta itself: at the end, where 1 - alpha_cumprod has lost its digits in
        # float32, the embedding comes out 0.05 % shorter.
        single = cosine_betas(len(table)).astype(np.float32)
        beta = np.where(np.append(timesteps[1:], -1) == timesteps - 1, single[timesteps], beta)
    variance = (1 - there) / (1 - here) * beta
    return Solver(
        grid=make_grid(
            timesteps,
            here,
            x=np.sqrt(1 - beta) * (1 - there) / (1 - here),
            x0=np.sqrt(there) * beta / (1 - here),
            noise=np.where(timesteps > 0, np.sqrt(np.maximum(variance, 1e-20)), 0),
            **limits({**settings, "thresholding": False}),
        ),
        prediction_type=settings["prediction_type"],
        init=linear.remember(0),
        step=linear.step,
        stochastic=True,
        start_alpha_cumprod=np.float32(here[0]),
    )
