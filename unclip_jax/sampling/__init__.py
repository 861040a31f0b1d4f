"""The mathematics of diffusion: schedules, solvers, guidance, and the compiled loop. Knows no network."""

from unclip_jax.sampling.guidance import (
    Guidance,
    guidance_rows,
    guidance_state,
    guide,
    guided,
    interleave,
    limit_interval,
)
from unclip_jax.sampling.loop import run_stateful_steps, run_steps, sample, start
from unclip_jax.sampling.noise import Branch, draw, image_keys
from unclip_jax.sampling.schedule import NoiseSchedule, add_noise, alphas_cumprod, to_x0_eps
from unclip_jax.sampling.solvers import (
    PUBLISHED_UNCLIP_SCHEDULER,
    SCHEDULERS,
    Solver,
    ddim_inversion,
    first_step,
    make_solver,
)

__all__ = [
    "PUBLISHED_UNCLIP_SCHEDULER",
    "SCHEDULERS",
    "Branch",
    "Guidance",
    "NoiseSchedule",
    "Solver",
    "add_noise",
    "alphas_cumprod",
    "ddim_inversion",
    "draw",
    "first_step",
    "guidance_rows",
    "guidance_state",
    "guide",
    "guided",
    "image_keys",
    "interleave",
    "limit_interval",
    "make_solver",
    "run_stateful_steps",
    "run_steps",
    "sample",
    "start",
    "to_x0_eps",
]
