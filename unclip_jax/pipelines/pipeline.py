"""The face of all pipelines: what users call, and nothing else. A call is values, handed from one module to the next:

arguments -> check -> Request -> conditions -> Conditions -> run -> latents -> finish -> images
"""

import dataclasses
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, Concatenate, ParamSpec, Self

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from PIL import Image

from unclip_jax.adapters.loaded import Adapters
from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.conditioning.clip_image import ImageSource
from unclip_jax.pipelines import finish, parts, run, tiny_vae
from unclip_jax.pipelines.arguments import OutputType, signed
from unclip_jax.pipelines.compiled import make_programs
from unclip_jax.pipelines.control_arguments import with_controls, with_hints
from unclip_jax.pipelines.defaults import with_own_defaults
from unclip_jax.pipelines.memory import Memory
from unclip_jax.pipelines.opening import DEFAULT_MEMORY, Opened, fill_networks, open_source
from unclip_jax.pipelines.output import PipelineOutput, StreamState
from unclip_jax.pipelines.parts import Parts
from unclip_jax.pipelines.prepared import make_kernels
from unclip_jax.pipelines.publishing import Publishable
from unclip_jax.pipelines.request import Request, Task
from unclip_jax.safety import SafetyChecker

P = ParamSpec("P")
STREAM = """The same run as a generator: a `StreamState` after every network evaluation. Close it at any step.

All images run in one batch, so `batch_size` is refused, and `output_type` has no meaning.

"""


class Pipeline(Publishable):
    """From inputs to images. Build one with `from_pretrained`, call it, or `stream` it.

    Attributes:
        config, tokenizer, networks, mesh, dtype, memory: what was opened, for research code that takes the parts.
            networks: name -> `Network`; of `Memory(free_networks=True)` with shapes in the place of parameters.
        programs: the compiled functions of a run.
        progress: False for silence; the whole denoising loop is then one compiled program instead of one per step.
        watermark: bytes, as `unclip_jax.MARK`, to mark images of 256x256 and more invisibly; None: no mark.
        tiny_vae: from `unclip_jax.TinyVAE.from_pretrained`, for `StreamState.preview("tiny")`; None: none.
        safety_checker: from `unclip_jax.open_safety_checker`, to make flagged images black; None: no check. Both need
            `output_type="pil"`, see docs/use-restrictions.md.
    """

    accepts: ClassVar[tuple[str, ...]]  # the tasks of checkpoints that it takes
    diffusers_class: ClassVar[str]  # the same pipeline there
    task: Task
    _images_of = staticmethod(finish.images_of)

    def __init__(self, opened: Opened):
        self.opened = opened
        self.config, self.tokenizer, self.networks = opened.config, opened.tokenizer, dict(opened.networks)
        self.mesh, self.dtype, self.memory, self.residency = opened.mesh, opened.dtype, opened.memory, opened.residency
        self.adapters = Adapters((self.tokenizer, self.networks), self.tokenizer)
        self.programs = make_programs(self.config, self.networks, self.mesh, self.dtype, self.memory)
        self.kernels = make_kernels(self.networks, self.mesh, self.dtype, self.memory)
        self.progress = True
        self.watermark: bytes | None = None
        self.safety_checker: SafetyChecker | None = None
        self.tiny_vae: tiny_vae.TinyVAE | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        memory: Memory = DEFAULT_MEMORY,
        **overrides: Any,
    ) -> Self:
        """Opens a checkpoint and puts its networks on the devices.

        Args:
            source: a converted directory, a diffusers folder, an original `.ckpt` or `.safetensors` file, or one of
                these on the hub ("owner/name", "owner/name/FILE" or FOLDER, an address). None: the demo model that
                comes with the package (64x64 drawings), see docs/demo-model.md.
            dtype: of weights and computation, "float32", "bfloat16" or "float16" (or a jnp dtype). None: float32 on a
                CPU, bfloat16 on accelerators.
            mesh: a `jax.sharding.Mesh` with axes "data" and/or "model". None: all local devices along "data".
            memory: how to need less memory.
            overrides: `config`, `prediction_type`, `clip_stats`, `vae`, `unet`, `preprocess`, `variant`, `revision`,
                `subfolder`, `mirrors`, `ema`, as for `unclip_jax.open_checkpoint`; `executables`, a folder of
                `unclip-jax compile`, which is then trusted, see docs/start.md.

        Raises FileNotFoundError for a source that is not there, ValueError for what is refused.
        """
        return open_source(lambda c: cls.from_checkpoint(c, dtype, mesh, memory), source, memory, overrides)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        memory: Memory = DEFAULT_MEMORY,
    ) -> Self:
        """Fills the networks of an open checkpoint of the right task, see `from_pretrained`. Raises ValueError.

        With `Memory(free_networks=True)` nothing is read yet, and the checkpoint has to stay open.
        """
        return cls(fill_networks(checkpoint, cls.accepts, cls.__name__, cls.diffusers_class, dtype, mesh, memory))

    def __call__(self, *args: Any, **kwargs: Any) -> PipelineOutput:
        """Makes images; every pipeline has its own arguments, `unclip_jax.pipelines.arguments`."""
        return self._make(self.task.arguments(*args, **kwargs))

    def stream(self, *args: Any, **kwargs: Any) -> Generator[StreamState, None, None]:
        """A call as a generator of its steps."""
        return self._stream(self.task.arguments(*args, **kwargs))

    def check(self, *args: Any, **kwargs: Any) -> Request[Any]:
        """The checked request of a call, which is not made. Raises what the call would raise."""
        return self._check(self.task.arguments(*args, **kwargs))

    @property
    def parts(self) -> Parts:
        """What runs now, as a value that `conditions` and `unclip_jax.pipelines.run` take."""
        kept = (self.config, self.tokenizer, self.networks, self.programs, self.opened.noising)
        return Parts(*kept, self.mesh, self.memory, self.freeu, self.progress, self.residency, self.kernels)

    def encode_prompts(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> the text encoder's states (B, T, C) float32."""
        return parts.encode_prompts(self.parts, prompts)

    def encode_image_embeds(self, images: ImageSource | Sequence[ImageSource]) -> np.ndarray:
        """Images, as a call takes them -> CLIP embeddings (images, D) float32, un-normalised. Raises ValueError."""
        return parts.encode_image_embeds(self.parts, images)

    def vae_encode(self, pixels: np.ndarray) -> np.ndarray:
        """Images (B, H, W, 3) in -1..1 -> the moments of the VAE's posterior (B, H/f, W/f, 8), a tiny one's latents."""
        return parts.vae_encode(self.parts, pixels)

    def decode_latents(self, latents: np.ndarray, in_tiles: int | None = None) -> np.ndarray:
        """Scaled latents (B, H/f, W/f, 4) -> images (B, H, W, 3) float32 in 0..1. in_tiles: a tile's side in cells."""
        return parts.decode_latents(self.parts, latents, in_tiles)

    def to_pil(self, images: np.ndarray) -> list[Image.Image]:
        """(B, H, W, 3) in 0..1 -> PIL images, with the rounding of the checkpoint's reference."""
        return finish.to_pil(self.config.reference, images)

    def _check(self, arguments: Any, output_type: OutputType | None = None) -> Request[Any]:
        arguments = with_hints(with_own_defaults(arguments, self.config.distilled))
        request = with_controls(self.task.check(self.config, arguments), arguments, self.opened)
        request = request if output_type is None else dataclasses.replace(request, output_type=output_type)
        finish.check_marks(self._marks, request, self.config.vae.factor)
        return request

    def _make(self, arguments: Any) -> PipelineOutput:
        request, now, marks = self._check(arguments), self.parts, self._marks
        latents = run.sample_latents(now, request, conditions := self.task.conditions(now, request))
        return finish.finish(now, marks, request, conditions, latents)

    def _stream(self, arguments: Any) -> Generator[StreamState, None, None]:
        if arguments.batch_size is not None:
            raise ValueError("batch_size has no meaning for stream: all images run together")
        # Checked when `stream` is called, not at the first step.
        request, now, tiny = self._check(arguments, "pil"), self.parts, tiny_vae.previews(self.tiny_vae, self.config)
        images_of = self._images_of(now, self._marks, request)

        def states() -> Generator[StreamState, None, None]:
            for step, latents, x0 in run.stream_states(now, request, self.task.conditions(now, request)):
                yield StreamState(step, request.solver.calls, latents, x0, images_of, tiny)

        return states()

    @property
    def _marks(self) -> finish.Marks:
        return finish.Marks(self.watermark, self.safety_checker)


def calls(
    arguments: Callable[P, Any],
) -> Callable[[Callable[..., Any]], Callable[Concatenate[Any, P], PipelineOutput]]:
    """Decorates the `__call__` of a pipeline with these arguments: editors, `help` and type checkers see them."""

    def __call__(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> PipelineOutput:
        return self._make(arguments(*args, **kwargs))

    return lambda stub: signed(__call__, arguments, "")


def streams(
    arguments: Callable[P, Any],
) -> Callable[[Callable[..., Any]], Callable[Concatenate[Any, P], Generator[StreamState, None, None]]]:
    """The same for its `stream`."""

    def stream(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Generator[StreamState, None, None]:
        return self._stream(arguments(*args, **kwargs))

    return lambda stub: signed(stream, arguments, STREAM)
