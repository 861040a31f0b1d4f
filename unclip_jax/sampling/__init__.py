"""The mathematics of diffusion: schedules, solvers, guidance, and the compiled loop. Knows no network."""

from unclip_jax.sampling.guidance import double, guide, interleave
from unclip_jax.sampling.loop import advance, sample, start
from unclip_jax.sampling.noise import Branch, draw, image_keys
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
    "Solver",
    "advance",
    "ddim_inversion",
    "double",
    "draw",
    "first_step",
    "guide",
    "image_keys",
    "interleave",
    "make_solver",
    "sample",
    "start",
]
