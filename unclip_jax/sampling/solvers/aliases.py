"""Solvers by other programs' names: diffusers' classes, and the samplers of AUTOMATIC1111, ComfyUI and k-diffusion.

None of these names is accepted. They are listed so that an error can give the name that the same solver has here.
"""

import re
from collections.abc import Collection

# A normalised name (no spaces, signs or capitals, no "sample_", "k_" or "Scheduler") -> the same solver here.
SAME = {
    "ddim": "ddim",
    "ddimparallel": "ddim",
    "ddpm": "ddpm",
    "ddpmparallel": "ddpm",
    "pndm": "pndm",
    "plms": "pndm",
    "euler": "euler",
    "eulerdiscrete": "euler",
    "eulera": "euler-a",
    "eulerancestral": "euler-a",
    "eulerancestraldiscrete": "euler-a",
    "heun": "heun",
    "heundiscrete": "heun",
    "lms": "lms",
    "lmsdiscrete": "lms",
    "dpm2": "dpm2",
    "kdpm2discrete": "dpm2",
    "dpm2a": "dpm2-a",
    "dpm2ancestral": "dpm2-a",
    "kdpm2ancestraldiscrete": "dpm2-a",
    "dpmpp2m": "dpm++2m",
    "dpmsolvermultistep": "dpm++2m",
    "dpmpp2msde": "dpm++2m-sde",
    "dpmsolversinglestep": "dpm++2s",
    "dpmpp2s": "dpm++2s",
    "unipc": "unipc",
    "unipcbh2": "unipc",
    "unipcmultistep": "unipc",
    "deis": "deis",
    "deismultistep": "deis",
    "lcm": "lcm",
    "tcd": "tcd",
}
# Solvers that are not here -> the nearest one that is; None for solvers of other kinds of models.
NEAREST = {
    "ddimcfgpp": "ddim",
    "ddiminverse": None,
    "ipndm": "lms",
    "ipndmv": "lms",
    "eulercfgpp": "euler",
    "eulerancestralcfgpp": "euler-a",
    "gradientestimation": "euler",
    "gradientestimationcfgpp": "euler",
    "edmeuler": "euler-karras",
    "heunpp2": "heun",
    "restart": "heun-karras",
    "expheun2x0": "dpm++2s",
    "expheun2x0sde": "dpm++2m-sde",
    "dpmfast": "dpm++2s",
    "dpmadaptive": "dpm++2s",
    "dpmad": "dpm++2s",
    "dpmpp2sa": "dpm++2s",
    "dpmpp2sancestral": "dpm++2s",
    "dpmpp2sancestralcfgpp": "dpm++2s",
    "dpmppsde": "dpm++2m-sde",
    "dpmsolversde": "dpm++2m-sde",
    "dpmpp2mcfgpp": "dpm++2m",
    "dpmpp2msdeheun": "dpm++2m-sde",
    "dpmpp3msde": "dpm++2m-sde",
    "cfgppud10ab": "dpm++2m",
    "resmultistep": "dpm++2m",
    "resmultistepcfgpp": "dpm++2m",
    "resmultistepancestral": "dpm++2m-sde",
    "resmultistepancestralcfgpp": "dpm++2m-sde",
    "edmdpmsolvermultistep": "dpm++2m-karras",
    "cosinedpmsolvermultistep": "dpm++2m-sde",
    "dpmsolvermultistepinverse": None,
    "ersde": "dpm++2m-sde",
    "seeds2": "dpm++2m-sde",
    "seeds3": "dpm++2m-sde",
    "sasolver": "dpm++2m-sde",
    "sasolverpece": "dpm++2m-sde",
    "cmstochasticiterative": "lcm",
}
# Schedules, which other programs name separately or last -> the last part of a name here; None: no part is needed.
SPACING = {
    "karras": "karras",
    "ka": "karras",
    "exponential": "exponential",
    "exp": "exponential",
    "beta": "beta",
    "sgmuniform": "sgm-uniform",
    "simple": "sgm-uniform",
    "trailing": "sgm-uniform",
    "lu": "lu",
    "normal": None,
    "uniform": None,
    "automatic": None,
    "ddimuniform": None,
    "ddim": None,
}
# Schedules that are not here.
NO_SPACING = (
    "alignyoursteps",
    "ays",
    "beta57",
    "gits",
    "karrasexponential",
    "kloptimal",
    "linearquadratic",
    "polyexponential",
    "turbo",
)
# The schedules of AUTOMATIC1111's "Automatic".
AUTOMATIC = {"dpm++2m": "karras", "dpm++2m-sde": "exponential", "dpm2": "karras", "dpm2-a": "karras"}


def advice(name: str, accepted: Collection[str]) -> str | None:
    """The hint in an error about another program's solver `name`; None if no program has a solver of that name.

    Args:
        name: What was given as the solver's name.
        accepted: The names that are accepted here.

    Returns:
        The hint, with a space at its end, or None.
    """
    text = re.sub(r"^(sample|k)[ _-]|^Flax|(sampler|schedule type|scheduler):|_gpu\b", "", name.strip(), flags=re.I)
    plain = re.sub(r"[^a-z0-9]", "", re.sub(r"scheduler\b", "", text.lower().replace("+", "p")))
    base, schedule = _split(plain)
    if base is None:
        # diffusers' schedulers for other models have no near solver here, however similar the name.
        return "there is no such solver here; " if name.endswith("Scheduler") else None
    same = SAME.get(base)
    ours = same or NEAREST[base]
    if ours is None:
        return "there is no such solver here; "
    part = AUTOMATIC.get(ours) if schedule == "automatic" else SPACING.get(schedule)
    spaced = f"{ours}-{part}" if part else ours
    if same and schedule not in NO_SPACING and spaced in accepted:
        return f"did you mean {spaced!r}? "
    if spaced not in accepted:
        spaced = ours
    return f"there is no such solver here, the nearest is {spaced!r}; "


def _split(plain: str) -> tuple[str | None, str]:
    """The solver's name and the schedule's in a normalised name; None where there is no such solver."""
    known = SAME.keys() | NEAREST.keys()
    if plain in known:
        return plain, ""
    for schedule in sorted([*SPACING, *NO_SPACING], key=len, reverse=True):
        if plain.endswith(schedule) and plain.removesuffix(schedule) in known:
            return plain.removesuffix(schedule), schedule
    return None, ""
