"""Checks of the arguments about ControlNets, which are the same for all pipelines that take them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from unclip_jax.conditioning.vae_image import load_init_image
from unclip_jax.pipelines.arguments import CommonArguments, ControlArguments, InitImageArguments
from unclip_jax.pipelines.checks import MAX_SCALE, check_flag, check_number
from unclip_jax.pipelines.controlnet import ControlNet
from unclip_jax.pipelines.instruct_arguments import InstructArguments
from unclip_jax.pipelines.opening import Opened
from unclip_jax.pipelines.request import Controls, Request


def with_hints(a: CommonArguments) -> CommonArguments:
    """The arguments with hints that are loaded: a list of images for each ControlNet.

    They decide about the size of what begins with noise, unless a size is given. Raises ValueError.
    """
    if not isinstance(a, ControlArguments) or (a.controlnet is None and a.control_image is None):
        return a
    if a.controlnet is None:
        raise ValueError("control_image is given without a controlnet that reads it")
    if a.control_image is None:
        raise ValueError("control_image is missing: give the image that controlnet reads")
    of_each = [a.control_image]
    if isinstance(a.controlnet, list | tuple):
        of_each = a.control_image
        if not isinstance(of_each, list | tuple) or len(of_each) != len(a.controlnet):
            raise ValueError(f"control_image is not a list of {len(a.controlnet)}: want one for each ControlNet")
    hints = [[_load(image) for image in (of if isinstance(of, list | tuple) else [of])] for of in of_each]
    if not all(hints) or not hints:
        raise ValueError("controlnet or control_image is an empty list")
    changed: Any = dataclasses.replace(a, control_image=hints)
    if not isinstance(a, InitImageArguments | InstructArguments) and changed.height is None and changed.width is None:
        height, width = hints[0][0].shape[:2]
        changed = dataclasses.replace(changed, height=height, width=width)
    return changed


def with_controls(request: Request[Any], a: CommonArguments, opened: Opened) -> Request[Any]:
    """The request with the ControlNets of the call and what they read.

    Args:
        request: what was checked of the call.
        a: from `with_hints`.
        opened: what it is made with.

    Raises:
        ValueError: for an argument out of its range, a hint of another size, or a ControlNet of another base.
    """
    if not isinstance(a, ControlArguments) or not (check_flag("guess_mode", a.guess_mode) or a.controlnet):
        return request
    if a.controlnet is None:
        raise ValueError("guess_mode is True without a controlnet")
    several = isinstance(a.controlnet, list | tuple)
    nets: Any = a.controlnet if several else [a.controlnet]
    for net in nets:
        _check_net(net, opened)
    if request.deep_cache > 1:
        raise ValueError(f"deep_cache is {request.deep_cache}, and controlnet is given; want one of them")

    def of_each(name: str, value: Any) -> Sequence[Any]:
        """One value for each ControlNet; a number is for all."""
        if not isinstance(value, list | tuple):
            return [value] * len(nets)
        if not several or len(value) != len(nets):
            raise ValueError(f"{name} has {len(value)} values; want one for each ControlNet, {len(nets)}, or a number")
        return value

    scales = of_each("controlnet_conditioning_scale", a.controlnet_conditioning_scale)
    starts, ends = (of_each(name, getattr(a, name)) for name in ("control_guidance_start", "control_guidance_end"))
    size = tuple(side * opened.config.vae.factor for side in request.latent_shape[:2])
    prompts = request.batch // a.num_images_per_prompt
    each = request.batch // prompts // request.repeats
    controls = Controls(
        nets=tuple(nets),
        hints=tuple(np.repeat(_stacked(hints, prompts, size), each, axis=0) for hints in a.control_image),
        scales=tuple(
            np.repeat(_scales(*given, request.solver.calls)[:, None], request.batch, axis=1)
            for given in zip(scales, starts, ends, strict=True)
        ),
        guess_mode=a.guess_mode or nets[0].config.global_pool_conditions,
    )
    return dataclasses.replace(request, controls=controls)


def _check_net(net: Any, opened: Opened) -> None:
    """Whether a ControlNet goes with a checkpoint, and is where that is."""
    if not isinstance(net, ControlNet):
        raise ValueError(f"controlnet is {net!r:.80}; want a ControlNet, from ControlNet.from_pretrained, or a list")
    config, theirs, unet = opened.config, net.config.unet, opened.config.unet
    facts = {
        "latent channels": (theirs.in_channels, config.vae.latent_channels),
        "a text width of": (theirs.cross_attention_dim, unet.cross_attention_dim),
        "block_out_channels": (theirs.block_out_channels, unet.block_out_channels),
        "layers_per_block": (theirs.layers_per_block, unet.layers_per_block),
        "pixels a latent": (net.config.factor, config.vae.factor),
        "colours of a hint": (net.config.conditioning_channels, 3),
    }
    if theirs.class_embedding is not None:
        facts["class labels"] = (theirs.class_embedding_size, unet.class_embedding_size or 0)
    for what, (have, want) in facts.items():
        if have != want:
            raise ValueError(f"controlnet has {what} {have}; this checkpoint needs {want}: it is for another base")
    if net.mesh != opened.mesh or net.dtype != opened.dtype:
        raise ValueError(
            "controlnet is on other devices or in another dtype than the pipeline: open it with "
            "ControlNet.from_pretrained(..., dtype=pipe.dtype, mesh=pipe.mesh)"
        )


def _load(image: Any) -> np.ndarray:
    """(H, W, 3) float32 in 0..1."""
    hint = load_init_image(image)
    return hint.astype(np.float32) / 255 if hint.dtype == np.uint8 else hint


def _stacked(hints: Sequence[np.ndarray], prompts: int, size: tuple[int, ...]) -> np.ndarray:
    """(prompts, H, W, 3): one hint for each prompt, or one for all."""
    if len(hints) not in (1, prompts):
        raise ValueError(f"control_image has {len(hints)} images; want one, or {prompts}, one for each prompt or image")
    for hint in hints:
        if hint.shape[:2] != size:
            height, width = hint.shape[:2]
            raise ValueError(
                f"control_image is {width}x{height} and the image is {size[1]}x{size[0]}; want the same: resize it, or "
                "give height and width"
            )
    return np.broadcast_to(np.stack(hints), (prompts, *size, 3))


def _scales(scale: Any, start: Any, end: Any, calls: int) -> np.ndarray:
    """The conditioning scale of each network evaluation, (calls,) float32: 0 outside of the window."""
    scale = check_number("controlnet_conditioning_scale", scale, -MAX_SCALE, MAX_SCALE)
    start = check_number("control_guidance_start", start, 0, 1)
    end = check_number("control_guidance_end", end, 0, 1)
    if start >= end:
        raise ValueError(f"control_guidance_start is {start:g}, control_guidance_end is {end:g}; want start before end")
    # As diffusers counts: an evaluation that begins before the window or ends after it is outside.
    outside = [call / calls < start or (call + 1) / calls > end for call in range(calls)]
    return np.where(outside, np.float32(0), np.float32(scale))
