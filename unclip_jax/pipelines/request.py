"""The values of a call: what was asked for, checked (`Request`), and what the denoiser is told (`Conditions`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from unclip_jax.conditioning.crop import Box
from unclip_jax.conditioning.masks import Mask
from unclip_jax.distributed.mesh import Chunk
from unclip_jax.pipelines.arguments import OutputType
from unclip_jax.pipelines.denoiser import Known
from unclip_jax.sampling.guidance import Guidance
from unclip_jax.sampling.loop import Carry
from unclip_jax.sampling.solvers import Solver

if TYPE_CHECKING:
    from unclip_jax.pipelines.controlnet import ControlNet

Inputs = TypeVar("Inputs")


# What `unclip_jax.pipelines.joined` is told of a field: arrays have their images along the second axis, after the
# network evaluations or encodings; or a number counts images.
BY_CALL = {"axis": 1}
ADDED = {"added": True}


class Kept(NamedTuple):
    """What is pasted back into a finished image: the image (H, W, 3) uint8 where its mask is black, around a box."""

    image: np.ndarray
    mask: Mask
    box: Box | None


@dataclasses.dataclass(frozen=True)
class Controls:
    """The ControlNets of a checked call. Each tuple has one entry a ControlNet.

    Attributes:
        nets: the ControlNets.
        hints: (prompts, H, W, 3) float32 in 0..1.
        scales: (network evaluations, B) float32; 0 where the ControlNet is not run.
        guess_mode: whether it is run for the rows with conditions alone.
    """

    nets: tuple[ControlNet, ...]
    hints: tuple[np.ndarray, ...]
    scales: tuple[np.ndarray, ...] = dataclasses.field(metadata=BY_CALL)
    guess_mode: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Generic[Inputs]):
    """A checked call, as host arrays. B = prompts * repeats, prompt by prompt.

    Attributes:
        solver: with the steps that are run.
        guidance: which rows of guidance there are. strengths: how strong they are, (network evaluations, B) each.
        seeds, indices: (B,) uint32 and (B,) int32, of the images' keys.
        batch: B. repeats: images per prompt. batch_size: images per compiled call.
        latent_shape: (h, w, channels).
        prompts, negative_prompts: one per prompt.
        prompt_embeds, negative_prompt_embeds: (1 or prompts, T, C), instead of those.
        step_noise: (network evaluations, B, h, w, channels).
        output_type: "pil", "np" or "latent".
        deep_cache: every how many network evaluations the whole UNet runs.
        tile: size and overlap in latents, where large images are made in tiles.
        kept: what is pasted back, one per input image.
        controls: the ControlNets, where there are any.
        inputs: what the task alone has.
    """

    solver: Solver
    guidance: Guidance
    strengths: Mapping[str, np.ndarray] = dataclasses.field(metadata=BY_CALL)
    seeds: np.ndarray
    indices: np.ndarray
    batch: int = dataclasses.field(metadata=ADDED)
    repeats: int
    latent_shape: tuple[int, int, int]
    prompts: list[str]
    negative_prompts: list[str]
    prompt_embeds: np.ndarray | None
    negative_prompt_embeds: np.ndarray | None
    step_noise: np.ndarray | None = dataclasses.field(metadata=BY_CALL)
    batch_size: int = dataclasses.field(metadata=ADDED)
    output_type: OutputType
    deep_cache: int = 1
    tile: tuple[int, int] | None = None
    kept: list[Kept] | None = None
    controls: Controls | None = None
    inputs: Inputs

    def active_controls(self, call: int) -> tuple[int, ...]:
        """The numbers of the ControlNets that a network evaluation runs."""
        scales = () if self.controls is None else self.controls.scales
        return tuple(number for number, scale in enumerate(scales) if scale[call].any())


class Conditions(NamedTuple):
    """What the denoiser is told: made once per call; the parts that need an image's own noise are functions of a chunk.

    Attributes:
        text: (1 or prompts, T, C) states of the text encoder, on the host.
        negative: the same of the negative prompts; None without guidance.
        start: the run before its first step.
        labels: class labels, (B, 2 D) of unCLIP or (B,) integers of an upscaler.
        channels: (B, h, w, c), what the UNet reads beside the latents.
        known: the part of the image that is given.
        image_embeds: (images, D) float32, before noising, for the output.
    """

    text: np.ndarray
    negative: np.ndarray | None
    start: Callable[[Chunk], Carry]
    labels: Callable[[Chunk], jax.Array] | None = None
    channels: Callable[[Chunk], jax.Array] | None = None
    known: Callable[[Chunk], Known] | None = None
    image_embeds: np.ndarray | None = None


class Task(NamedTuple):
    """One task: its arguments, and the two functions that lead from them to conditions.

    check: (configuration, arguments) -> `Request`; touches no device. conditions: (parts, request) -> `Conditions`.
    """

    arguments: Any
    check: Callable[[Any, Any], Request[Any]]
    conditions: Callable[[Any, Any], Conditions]
