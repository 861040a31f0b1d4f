"""The arguments of the estimators, as `unclip_jax.pipelines.arguments` has those of the other pipelines."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from unclip_jax.pipelines.arguments import OutputType

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

    from unclip_jax.conditioning.resample import ResampleMethod
    from unclip_jax.pipelines.arguments import Images
    from unclip_jax.sampling.solvers import Solver


@dataclass(frozen=True, eq=False)
class EstimateArguments:
    """Estimates a map of each image. B = images * ensemble_size, image by image.

    Args:
        image: PIL image, path, address, bytes, uint8 (H, W, 3), float 0..1 (H, W, 3), or a list of them of one size.
        num_inference_steps: 1 to 1000. None: the checkpoint's own number.
        ensemble_size: how many predictions, each from its own noise, are made of an image and reduced to one map.
        processing_resolution: the longest side in pixels at which the network sees the image, a multiple of 8. 0: the
            image's own. None: the checkpoint's own.
        match_input_resolution: whether the map gets the image's size, or stays as large as the network saw it.
        resample_method_input, resample_method_output: "bilinear", "bicubic", "area", "nearest" or "nearest-exact".
        ensembling_kwargs: options of `unclip_jax.estimation.ensemble_depth` or `ensemble_normals`.
        output_uncertainty: whether the uncertainty of the map comes with it; of two predictions at least.
        scheduler: a name of `unclip_jax.sampling.SCHEDULERS`, or a `Solver`. None: the checkpoint's own.
        eta: 0 to 1, how stochastic DDIM is. None: 0, or what the `Solver` has.
        seed: 0 to 2**32 - 1, or a list of one per image. The noise of prediction i comes from (seed, i) alone.
        latents: (B, h, w, 4) initial noise, standard normal for every solver. None: by the seed.
        step_noise: (network evaluations, B, h, w, 4) for stochastic solvers. None: by the seed.
        batch_size: predictions per compiled call. None: all at once.
        output_type: of the output's `images`: "pil", maps in colours; "np", the maps; or "latent".
    """

    image: Images | None = None
    num_inference_steps: int | None = None
    ensemble_size: int = 1
    _: KW_ONLY
    processing_resolution: int | None = None
    match_input_resolution: bool = True
    resample_method_input: ResampleMethod = "bilinear"
    resample_method_output: ResampleMethod = "bilinear"
    ensembling_kwargs: Mapping[str, Any] | None = None
    output_uncertainty: bool = False
    scheduler: str | Solver | None = None
    eta: float | None = None
    seed: int | Sequence[int] = 0
    latents: ArrayLike | None = None
    step_noise: ArrayLike | None = None
    batch_size: int | None = None
    output_type: OutputType = "pil"
