"""A checked call of a pipeline: what every one of B images is made from, as host arrays."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.pipelines import arguments as check
from unclip_jax.pipelines.image_condition import ImageCondition
from unclip_jax.pipelines.init_image import InitImage
from unclip_jax.sampling.guidance import Guidance
from unclip_jax.sampling.solvers import Solver, describes, first_step, make_solver

OutputType = Literal["pil", "np", "latent"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What all pipelines are asked. B = prompts * repeats, prompt-major; see `Pipeline` for the arguments.

    condition: the pictures that condition an unCLIP checkpoint. start: the pictures that the run begins with. tile:
    size and overlap in latents, where large pictures are made in tiles.
    """

    solver: Solver
    guidance: Guidance
    strengths: dict[str, np.ndarray]  # of guidance, (calls, B) each
    seed: int
    batch: int
    repeats: int
    latent_shape: tuple[int, int, int]
    prompts: list[str]
    negative_prompts: list[str]
    prompt_embeds: np.ndarray | None
    negative_prompt_embeds: np.ndarray | None
    latents: np.ndarray | None
    step_noise: np.ndarray | None
    batch_size: int
    output_type: OutputType
    condition: ImageCondition | None = None
    start: InitImage | None = None
    tile: tuple[int, int] | None = None

    def chunks(self) -> Iterator[np.ndarray]:
        """The images' indices, `batch_size` at a time."""
        for first in range(0, self.batch, self.batch_size):
            yield np.arange(first, min(first + self.batch_size, self.batch))


def follows_original(config: CheckpointConfig, a: Mapping[str, Any]) -> bool:
    """Whether a call follows the original's procedure, which the solver's name says, or diffusers'."""
    name = config.scheduler if a["scheduler"] is None else a["scheduler"]
    return isinstance(name, str) and name.startswith("ldm-")


def check_latent_shape(config: CheckpointConfig, height: Any, width: Any) -> tuple[int, int, int]:
    """(h, w, channels) of pictures of this size in pixels, None being the checkpoint's own. Raises ValueError."""
    factor, unit = config.vae.factor, config.vae.factor * config.unet.size_multiple
    default = config.unet.sample_size * factor
    height, width = check.check_size("height", height, unit, default), check.check_size("width", width, unit, default)
    return height // factor, width // factor, config.vae.latent_channels


def check_request(
    config: CheckpointConfig,
    a: Mapping[str, Any],
    latent_shape: tuple[int, int, int],
    prompts: int | None = None,
    strength: Any = None,
    depth: bool = False,
) -> dict[str, Any]:
    """The fields of `Request` but `condition` and `start`, from a call's arguments `a`.

    prompts: how many there must be, as many as pictures; None: as many as are given. strength: of pipelines that begin
    with a picture, which then leave out the first steps; depth: of depth to image, see `first_step`. Raises ValueError.
    """
    steps = check.check_integer("num_inference_steps", a["num_inference_steps"], 1, 1000)
    repeats = check.check_integer("num_images_per_prompt", a["num_images_per_prompt"], 1, 1 << 20)
    seed = check.check_integer("seed", a["seed"], 0, check.MAX_SEED)
    if a["output_type"] not in get_args(OutputType):
        raise ValueError(f"output_type is {a['output_type']!r}; accepted: 'pil', 'np', 'latent'")
    name = config.scheduler if a["scheduler"] is None else a["scheduler"]
    if isinstance(name, Solver):
        solver, name = name, "solver"
    elif isinstance(name, str):
        train = config.scheduler_config.get("num_train_timesteps", 1000)
        start_step = 0 if strength is None else first_step(name, steps, strength, train, depth)
        own = a["scheduler"] is None and describes(config.scheduler_config, name)
        solver = make_solver(name, config.scheduler_config, steps, a["eta"], start_step, own=own)
    else:
        raise ValueError(f"scheduler is {name!r}; want None, a name or a Solver")

    text = (config.text_encoder.context_length, config.text_encoder.width)
    embeds = {key: a[key] for key in ("prompt_embeds", "negative_prompt_embeds")}
    if prompts is None:
        given = (
            a["prompt"]
            if embeds["prompt_embeds"] is None
            else check.check_array("prompt_embeds", embeds["prompt_embeds"], (None, *text))
        )
        prompts = 1 if isinstance(given, str) or not hasattr(given, "__len__") else len(given)
        if prompts == 0:
            raise ValueError("prompt is an empty list")
    embeds = {
        key: value if value is None else check.check_array(key, value, (1, *text), (prompts, *text))
        for key, value in embeds.items()
    }
    batch = prompts * repeats
    guidance, strengths = check.check_guidance(a, name, solver, batch)
    shapes = {"latents": (batch, *latent_shape), "step_noise": (solver.calls, batch, *latent_shape)}
    arrays = {k: None if a.get(k) is None else check.check_array(k, a[k], shape) for k, shape in shapes.items()}
    size = batch if a["batch_size"] is None else check.check_integer("batch_size", a["batch_size"], 1, 1 << 20)
    return {
        "solver": solver,
        "guidance": guidance,
        "strengths": strengths,
        "seed": seed,
        "batch": batch,
        "repeats": repeats,
        "latent_shape": latent_shape,
        "prompts": check.check_prompts("prompt", a["prompt"], prompts),
        "negative_prompts": check.check_prompts("negative_prompt", a["negative_prompt"], prompts),
        **embeds,
        **arrays,
        "batch_size": min(size, batch),
        "output_type": a["output_type"],
    }
