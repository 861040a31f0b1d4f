"""Recognises an original file without a description as a published checkpoint, by its tensors.

Tensors show everything except what the UNet predicts: those of 512-base (epsilon) and of 768-v (v) are the same. That
comes from the caller, from the file's metadata or marks, or else from a guess.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

import numpy as np

from convert import layouts
from convert.architecture.presets import PRESETS, candidates, look_alikes, unet_ends
from convert.layouts import V_PREDICTION, ZERO_SNR, Places
from convert.readers import CheckpointError, TensorInfo
from unclip_jax.checkpoints.config import TASKS, CheckpointConfig, predicting, unknown_channels

# ComfyUI's, since 2023: the deviation of this parameter is larger in the published models that predict v.
TELLTALE, V_FROM = "up_blocks.3.attentions.2.norm1.bias", 0.09
# https://github.com/Stability-AI/ModelSpec: keys of a safetensors file's metadata.
SPEC_PREDICTION, SPEC_ARCHITECTURE, SPEC_RESOLUTION = (
    f"modelspec.{key}" for key in ("prediction_type", "architecture", "resolution")
)
SPEC_VALUES = {"v": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
SPEC_ARCHITECTURES = {
    r"stable-diffusion-v2.*-v\b": "v_prediction",
    r"stable-diffusion-v2.*-(512|base|inpainting|depth)\b": "epsilon",
}

Read = Callable[[str], np.ndarray]


def recognise(
    tensors: Mapping[str, TensorInfo],
    places: Places,
    where: str,
    *,
    metadata: Mapping[str, str],
    prediction: str | None = None,
    read: Read | None = None,
    without: Collection[str] = (),
    otherwise: str | None = None,
) -> tuple[CheckpointConfig, str]:
    """The published architecture of these tensors, and a note for the user on how it was found, or "".

    Args:
        tensors: As from `convert.layouts.locate`.
        places: As from `convert.layouts.locate`.
        where: The file's name in messages.
        metadata: The file's.
        prediction: What the UNet predicts; None for what the file says.
        read: Reads a tensor, for a guess if nothing says it; None takes the first that fits.
        without: Parts that need not be there.
        otherwise: What the UNet predicts if nothing says it; None for a guess.

    Returns:
        The configuration and the note.

    Raises:
        CheckpointError: The tensors belong to no published checkpoint.
    """
    reports = look_alikes(tensors, places, without)
    fitting = [name for name, report in reports.items() if report.complete]
    if not fitting:
        if (ends := unet_ends(tensors, places)) is not None and ends.in_channels not in TASKS:
            raise CheckpointError(f"{where}: {unknown_channels(ends.in_channels)}")
        nearest = min(
            reports, key=lambda n: len(reports[n].missing) + len(reports[n].misshapen) + len(reports[n].unknown)
        )
        raise CheckpointError(
            f"{where}: its tensors are no published checkpoint's ({', '.join(PRESETS)}), and no config= was given; "
            f"against {nearest}: {reports[nearest]}"
        )
    said, note = prediction or said_prediction(tensors, metadata) or otherwise, ""
    configs = candidates(tensors, places)
    by_prediction = {configs[name].scheduler_config["prediction_type"]: name for name in fitting}
    if said is None and len(by_prediction) > 1:
        if read is None:
            note = f"its tensors are the same in {' and '.join(fitting)}: only its data, which is not read, tells which"
        else:
            said, note = _guess(places, read)
    config = configs[by_prediction.get(said or "", fitting[0])]
    if len(by_prediction) > 1 and (size := _sample_size(metadata)):
        config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, sample_size=size))
    return (config if said is None else predicting(config, said)), note and f"{where}: {note}"


def said_prediction(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str | None:
    """The prediction type that a file's metadata or marks state, or None."""
    if said := SPEC_VALUES.get(metadata.get(SPEC_PREDICTION, "").strip().lower()):
        return said
    architecture = metadata.get(SPEC_ARCHITECTURE, "").lower()
    for pattern, said in SPEC_ARCHITECTURES.items():
        if re.match(pattern, architecture):
            return said
    return "v_prediction" if {V_PREDICTION, ZERO_SNR} & tensors.keys() else None


def ending_without_signal(config: CheckpointConfig) -> CheckpointConfig:
    """A configuration whose noise schedule ends at a signal-to-noise ratio of zero (Lin et al. 2023, arXiv:2305.08891).

    The original's procedures have no such schedule, so the solver becomes diffusers' DDIM, with the paper's timesteps.
    """
    zero = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return dataclasses.replace(config, scheduler="ddim", scheduler_config={**config.scheduler_config, **zero})


def _guess(places: Places, read: Read) -> tuple[str, str]:
    """Guesses what a UNet predicts from how far training moved a norm of its last block; and how to overrule it."""
    name = layouts.foreign_names("unet", places, {TELLTALE: 1})[TELLTALE]
    spread = float(np.std(read(name).astype(np.float64)))
    by_v = spread > V_FROM
    guess, other = ("v_prediction", "epsilon") if by_v else ("epsilon", "v_prediction")
    return guess, (
        f"nothing says what this UNet predicts; the guess is {guess!r}, for the standard deviation of {name} is "
        f"{spread:.3f}, {'above' if by_v else 'not above'} {V_FROM}; if images come out as noise, give "
        f"prediction_type={other!r}"
    )


def _sample_size(metadata: Mapping[str, str]) -> int | None:
    """The side of the latents that a file states, if the networks take it."""
    match = re.fullmatch(r"(\d{2,4})(?:x(\d{2,4}))?", metadata.get(SPEC_RESOLUTION, ""))
    if not match or match[2] not in (None, match[1]) or int(match[1]) % 64:
        return None
    return int(match[1]) // 8
