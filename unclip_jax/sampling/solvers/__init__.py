"""Solvers of the diffusion process, as pure step functions over a precomputed grid."""

from unclip_jax.sampling.solvers.ddim import ddim
from unclip_jax.sampling.solvers.ddpm import ddpm
from unclip_jax.sampling.solvers.dpmpp import dpmpp_2m
from unclip_jax.sampling.solvers.euler import euler, euler_ancestral
from unclip_jax.sampling.solvers.ldm import ldm_ddim, ldm_dpm
from unclip_jax.sampling.solvers.lms import lms
from unclip_jax.sampling.solvers.names import PUBLISHED_UNCLIP_SCHEDULER, SCHEDULERS, make_solver, scheduler_name
from unclip_jax.sampling.solvers.pndm import pndm
from unclip_jax.sampling.solvers.solver import Row, Solver, State
from unclip_jax.sampling.solvers.two_calls import dpm2, heun

__all__ = [
    "PUBLISHED_UNCLIP_SCHEDULER",
    "SCHEDULERS",
    "Row",
    "Solver",
    "State",
    "ddim",
    "ddpm",
    "dpm2",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "heun",
    "ldm_ddim",
    "ldm_dpm",
    "lms",
    "make_solver",
    "pndm",
    "scheduler_name",
]
