"""What diffusers' pipelines correct when they open a folder: mistakes in old files, and in their defaults.

`REPAIRS` lists what the constructors in diffusers 0.42 change, class by class
(pipelines/stable_diffusion/pipeline_*.py). The class that opens a folder decides, not the one that wrote it.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.models.configs import AnyVAEConfig, UNetConfig
from unclip_jax.reference import Reference
from unclip_jax.sampling.solvers.settings import DEFAULTED


@dataclasses.dataclass(frozen=True)
class Repairs:
    """What a constructor changes.

    Args:
        scheduler: Keys of the scheduler's settings, and the values that they get.
        sample_size: Whether the sample_size of a UNet saved before diffusers 0.9.0, if below 64, becomes 64.
        vae_scaling_factor: The value that the VAE's scaling factor gets.
    """

    scheduler: Mapping[str, bool | int] = dataclasses.field(default_factory=dict)
    sample_size: bool = False
    vae_scaling_factor: float | None = None


REPAIRS = {
    "StableDiffusionPipeline": Repairs({"steps_offset": 1, "clip_sample": False}, sample_size=True),
    "StableDiffusionImg2ImgPipeline": Repairs({"steps_offset": 1, "clip_sample": False}, sample_size=True),
    "StableDiffusionInpaintPipeline": Repairs({"steps_offset": 1, "skip_prk_steps": True}, sample_size=True),
    "StableDiffusionDepth2ImgPipeline": Repairs(sample_size=True),
    "StableDiffusionUpscalePipeline": Repairs(vae_scaling_factor=0.08333),
    "StableUnCLIPImg2ImgPipeline": Repairs(),
    "StableUnCLIPPipeline": Repairs(),
    "MarigoldDepthPipeline": Repairs(),
    "MarigoldNormalsPipeline": Repairs(),
    "StableDiffusionInstructPix2PixPipeline": Repairs(),
}


def repaired(config: CheckpointConfig, diffusers_class: str, source: str) -> CheckpointConfig:
    """`config` as diffusers' pipeline of this class has it once constructed.

    Changes are reported in a one-line warning. Checkpoints that follow the original have no such files and are returned
    as they are. A key that the file omits is marked as diffusers marks it: a scheduler that replaces the checkpoint's
    own omits it again (see `swapped`). The reader of folders repairs the networks already, so that their sizes are
    right in whatever is built from them.

    Args:
        config: The configuration as read.
        diffusers_class: The pipeline class that opens the folder.
        source: The checkpoint's name, for the warning.

    Returns:
        The corrected configuration.
    """
    if config.reference == Reference.ORIGINAL:
        return config
    config = dataclasses.replace(config, vae=repaired_vae(config.vae, diffusers_class, source))
    settings, changes = dict(config.scheduler_config), []
    left_out = [key for key in REPAIRS[diffusers_class].scheduler if key not in settings]
    for key, right in REPAIRS[diffusers_class].scheduler.items():
        if _is_wrong(settings, key, right):
            changes.append(f"{key} is {right}, not {'left out' if key in left_out else repr(settings[key])[:80]}")
            settings[key] = right
    if not changes:
        return config
    if defaulted := [key for key in left_out if key in settings]:
        settings[DEFAULTED] = defaulted
    _warn(source, diffusers_class, "; ".join(changes))
    return dataclasses.replace(config, scheduler_config=settings)


def repaired_vae(vae: AnyVAEConfig, diffusers_class: str, source: str) -> AnyVAEConfig:
    """As `repaired`, for the VAE alone."""
    right = REPAIRS[diffusers_class].vae_scaling_factor
    if right is None or vae.scaling_factor == right:
        return vae
    _warn(source, diffusers_class, f"the VAE's scaling_factor is {right}, not {vae.scaling_factor}")
    return dataclasses.replace(vae, scaling_factor=right)


def repaired_unet(unet: UNetConfig, file: Mapping[str, Any], diffusers_class: str, source: str) -> UNetConfig:
    """As `repaired`, for the UNet alone; it depends on the version of diffusers that wrote `file`, its config.json."""
    version = re.match(r"(\d{1,9})\.(\d{1,9})", str(file.get("_diffusers_version")))
    size = file.get("sample_size")
    old = version is not None and (int(version[1]), int(version[2])) < (0, 9)
    if not (REPAIRS[diffusers_class].sample_size and old and isinstance(size, int) and size < 64):
        return unet
    _warn(source, diffusers_class, f"the UNet's sample_size is 64, not {size}")
    return dataclasses.replace(unet, sample_size=64)


def _is_wrong(settings: Mapping[str, Any], key: str, right: bool | int) -> bool:
    if key not in settings:
        return _wrong_by_default(settings.get("_class_name"), key)
    # The constructors ask for the very opposite of a truth value, and for any other number.
    return settings[key] is (not right) if isinstance(right, bool) else settings[key] != right


def _wrong_by_default(kind: Any, key: str) -> bool:
    """Whether a scheduler of this class has the key with a default that is repaired."""
    match key:
        case "clip_sample":
            return kind in ("DDIMScheduler", "DDPMScheduler")
        case "skip_prk_steps":
            return bool(kind == "PNDMScheduler")
        case _:
            return bool(kind != "DPMSolverSinglestepScheduler")  # it has no steps_offset; in the others it is 0


def _warn(source: str, diffusers_class: str, changes: str) -> None:
    warnings.warn(f"{source}: corrected as diffusers' {diffusers_class} does: {changes}", stacklevel=3)
