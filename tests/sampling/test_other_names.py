"""Every scheduler and sampler of diffusers, AUTOMATIC1111, ComfyUI and k-diffusion, and what a refusal says of it."""

import re

import pytest

from unclip_jax.sampling import make_solver
from unclip_jax.sampling.solvers import PUBLISHED_UNCLIP_SCHEDULER, SCHEDULERS

# Name there -> name here; "~" before it: there is no such solver here, and that one is the nearest; None: nothing is.
# All that inherit SchedulerMixin in diffusers 0.42, but those of no diffusion or of other kinds of models.
DIFFUSERS = {
    "CMStochasticIterativeScheduler": "~lcm",
    "CosineDPMSolverMultistepScheduler": "~dpm++2m-sde",
    "DDIMInverseScheduler": None,
    "DDIMParallelScheduler": "ddim",
    "DDIMScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepInverseScheduler": None,
    "DPMSolverMultistepScheduler": "dpm++2m",
    "DPMSolverSDEScheduler": "~dpm++2m-sde",
    "DPMSolverSinglestepScheduler": "dpm++2s",
    "EDMDPMSolverMultistepScheduler": "~dpm++2m-karras",
    "EDMEulerScheduler": "~euler-karras",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "IPNDMScheduler": "~lms",
    "KDPM2AncestralDiscreteScheduler": "dpm2-a",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "SASolverScheduler": "~dpm++2m-sde",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
    "FlaxDDIMScheduler": "ddim",
    "FlaxDPMSolverMultistepScheduler": "dpm++2m",
    "FlaxPNDMScheduler": "pndm",
    **dict.fromkeys(
        (
            "AmusedScheduler",
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler",
            "DDPMWuerstchenScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "FlowMatchLCMScheduler",
            "KarrasVeScheduler",
            "LTXEulerAncestralRFScheduler",
            "RePaintScheduler",
            "SCMScheduler",
            "ScoreSdeVeScheduler",
            "ScoreSdeVpScheduler",
            "UnCLIPScheduler",
            "VQDiffusionScheduler",
        )
    ),
}
# Of versions 1.6 to 1.10, where names with a schedule in them became names and schedules.
AUTOMATIC1111 = {
    "DPM++ 2M Karras": "dpm++2m-karras",
    "DPM++ SDE Karras": "~dpm++2m-sde-karras",
    "DPM++ 2M SDE Exponential": "dpm++2m-sde-exponential",
    "DPM++ 2M SDE Karras": "dpm++2m-sde-karras",
    "Euler a": "euler-a",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2-a",
    "DPM++ 2S a": "~dpm++2s",
    "DPM++ 2M": "dpm++2m",
    "DPM++ SDE": "~dpm++2m-sde",
    "DPM++ 2M SDE": "dpm++2m-sde",
    "DPM++ 2M SDE Heun": "~dpm++2m-sde",
    "DPM++ 2M SDE Heun Karras": "~dpm++2m-sde-karras",
    "DPM++ 2M SDE Heun Exponential": "~dpm++2m-sde-exponential",
    "DPM++ 3M SDE": "~dpm++2m-sde",
    "DPM++ 3M SDE Karras": "~dpm++2m-sde-karras",
    "DPM++ 3M SDE Exponential": "~dpm++2m-sde-exponential",
    "DPM fast": "~dpm++2s",
    "DPM adaptive": "~dpm++2s",
    "LMS Karras": "lms-karras",
    "DPM2 Karras": "dpm2-karras",
    "DPM2 a Karras": "dpm2-a-karras",
    "DPM++ 2S a Karras": "~dpm++2s-karras",
    "Restart": "~heun-karras",
    "DDIM": "ddim",
    "DDIM CFG++": "~ddim",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "LCM": "lcm",
    # Its API's other names.
    "k_euler_a": "euler-a",
    "k_dpm_2_a_ka": "dpm2-a-karras",
    "k_dpmpp_2m_ka": "dpm++2m-karras",
    "k_dpmpp_2m_sde_exp": "dpm++2m-sde-exponential",
    "k_dpm_ad": "~dpm++2s",
}
# With every schedule of it, as its settings line has them, or just one after the other.
SCHEDULES = {
    "DPM++ 2M, Schedule type: Automatic": "dpm++2m-karras",
    "Sampler: DPM++ 2M SDE, Schedule type: Automatic": "dpm++2m-sde-exponential",
    "Euler a, Schedule type: Automatic": "euler-a",
    "Euler, Schedule type: Uniform": "euler",
    "DPM++ 2M, Schedule type: Karras": "dpm++2m-karras",
    "Sampler: DPM++ 2M, Schedule type: Karras": "dpm++2m-karras",
    "DPM++ 2M Exponential": "dpm++2m-exponential",
    "Euler Polyexponential": "~euler",
    "Euler SGM Uniform": "euler-sgm-uniform",
    "Euler a SGM Uniform": "euler-a-sgm-uniform",
    "Euler KL Optimal": "~euler",
    "Euler Align Your Steps": "~euler",
    "Euler Simple": "euler-sgm-uniform",
    "Euler Normal": "euler",
    "Euler DDIM": "euler",
    "UniPC Beta": "unipc-beta",
    "Euler a Karras": "~euler-a",
    "DDIM Karras": "~ddim",
}
COMFYUI = {
    "euler": None,  # which is a name here
    "euler_cfg_pp": "~euler",
    "euler_ancestral": "euler-a",
    "euler_ancestral_cfg_pp": "~euler-a",
    "heun": None,
    "heunpp2": "~heun",
    "exp_heun_2_x0": "~dpm++2s",
    "exp_heun_2_x0_sde": "~dpm++2m-sde",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2-a",
    "lms": None,
    "dpm_fast": "~dpm++2s",
    "dpm_adaptive": "~dpm++2s",
    "dpmpp_2s_ancestral": "~dpm++2s",
    "dpmpp_2s_ancestral_cfg_pp": "~dpm++2s",
    "dpmpp_sde": "~dpm++2m-sde",
    "dpmpp_sde_gpu": "~dpm++2m-sde",
    "dpmpp_2m": "dpm++2m",
    "dpmpp_2m_cfg_pp": "~dpm++2m",
    "dpmpp_2m_sde": "dpm++2m-sde",
    "dpmpp_2m_sde_gpu": "dpm++2m-sde",
    "dpmpp_2m_sde_heun": "~dpm++2m-sde",
    "dpmpp_2m_sde_heun_gpu": "~dpm++2m-sde",
    "dpmpp_3m_sde": "~dpm++2m-sde",
    "dpmpp_3m_sde_gpu": "~dpm++2m-sde",
    "ddpm": None,
    "lcm": None,
    "ipndm": "~lms",
    "ipndm_v": "~lms",
    "deis": None,
    "cfgpp_ud10_ab": "~dpm++2m",
    "res_multistep": "~dpm++2m",
    "res_multistep_cfg_pp": "~dpm++2m",
    "res_multistep_ancestral": "~dpm++2m-sde",
    "res_multistep_ancestral_cfg_pp": "~dpm++2m-sde",
    "gradient_estimation": "~euler",
    "gradient_estimation_cfg_pp": "~euler",
    "er_sde": "~dpm++2m-sde",
    "seeds_2": "~dpm++2m-sde",
    "seeds_3": "~dpm++2m-sde",
    "sa_solver": "~dpm++2m-sde",
    "sa_solver_pece": "~dpm++2m-sde",
    "ddim": None,
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    # With every schedule of it.
    "dpmpp_2m simple": "dpm++2m-sgm-uniform",
    "dpmpp_2m_sgm_uniform": "dpm++2m-sgm-uniform",
    "dpmpp_2m_karras": "dpm++2m-karras",
    "dpmpp_2m / exponential": "dpm++2m-exponential",
    "ddim ddim_uniform": "ddim",
    "dpmpp_2m beta": "dpm++2m-beta",
    "dpmpp_2m normal": "dpm++2m",
    "dpmpp_2m linear_quadratic": "~dpm++2m",
    "dpmpp_2m kl_optimal": "~dpm++2m",
}
K_DIFFUSION = {
    "sample_euler": "euler",
    "sample_euler_ancestral": "euler-a",
    "sample_heun": "heun",
    "sample_dpm_2": "dpm2",
    "sample_dpm_2_ancestral": "dpm2-a",
    "sample_lms": "lms",
    "sample_dpm_fast": "~dpm++2s",
    "sample_dpm_adaptive": "~dpm++2s",
    "sample_dpmpp_2s_ancestral": "~dpm++2s",
    "sample_dpmpp_sde": "~dpm++2m-sde",
    "sample_dpmpp_2m": "dpm++2m",
    "sample_dpmpp_2m_sde": "dpm++2m-sde",
    "sample_dpmpp_3m_sde": "~dpm++2m-sde",
}


@pytest.mark.parametrize(
    ("name", "here"), [*{**DIFFUSERS, **AUTOMATIC1111, **SCHEDULES, **COMFYUI, **K_DIFFUSION}.items()]
)
def test_what_a_refusal_says(name, here):
    if name in SCHEDULERS:
        assert here is None
        return
    with pytest.raises(ValueError, match=r"^unknown scheduler '.*; accepted: ddim, ddpm|\? accepted: ddim") as caught:
        make_solver(name, PUBLISHED_UNCLIP_SCHEDULER, 20)
    message = str(caught.value)
    same, nearest = re.search(r"did you mean '(.*?)'\?", message), re.search(r"the nearest is '(.*?)'", message)
    said = same[1] if same else f"~{nearest[1]}" if nearest else None
    assert said == here
    assert said is None or said.removeprefix("~") in SCHEDULERS
    assert ("there is no such solver here" in message) == (same is None)
    assert "\n" not in message
