"""Solvers of the diffusion process: pure step functions over a precomputed grid."""

from unclip_jax.sampling.solvers.consistency import lcm, tcd
from unclip_jax.sampling.solvers.ddim import ddim, ddim_inversion
from unclip_jax.sampling.solvers.ddpm import ddpm
from unclip_jax.sampling.solvers.deis import deis
from unclip_jax.sampling.solvers.dpmpp import dpmpp_2m, dpmpp_2s
from unclip_jax.sampling.solvers.euler import euler, euler_ancestral
from unclip_jax.sampling.solvers.ldm import ldm_ddim, ldm_dpm, ldm_plms
from unclip_jax.sampling.solvers.lms import lms
from unclip_jax.sampling.solvers.pndm import pndm
from unclip_jax.sampling.solvers.registry import (
    PUBLISHED_UNCLIP_SCHEDULER,
    SCHEDULERS,
    choose_solver,
    describes,
    first_step,
    make_solver,
    scheduler_name,
)
from unclip_jax.sampling.solvers.second_order import dpm2, heun
from unclip_jax.sampling.solvers.solver import Row, Solver, State
from unclip_jax.sampling.solvers.unipc import unipc

__all__ = [
    "PUBLISHED_UNCLIP_SCHEDULER",
    "SCHEDULERS",
    "Row",
    "Solver",
    "State",
    "choose_solver",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "describes",
    "dpm2",
    "dpmpp_2m",
    "dpmpp_2s",
    "euler",
    "euler_ancestral",
    "first_step",
    "heun",
    "lcm",
    "ldm_ddim",
    "ldm_dpm",
    "ldm_plms",
    "lms",
    "make_solver",
    "pndm",
    "scheduler_name",
    "tcd",
    "unipc",
]
