"""Guidance: what a network predicts for several rows of one image, combined into one prediction.

Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) and what may join it: adaptive projected guidance
(APG; Sadat et al. 2024, arXiv:2410.02416), perturbed-attention guidance (PAG; Ahn et al. 2024, arXiv:2403.17377),
rescaling (Lin et al. 2023, arXiv:2305.08891) and a limited interval (Kynkäänniemi et al. 2024, arXiv:2404.07724).

Which of them a run has is static, a `Guidance`; how strong each is are columns of the run's grid, a value for each
network call, traced. All arithmetic is float32 and of each image alone.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling.loop import StatefulDenoise
from unclip_jax.sampling.schedule import to_x0_eps
from unclip_jax.sampling.solvers.solver import Row, State

GuidedNetwork = Callable[[jax.Array, Row, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Which rows a network is given for each image, and how its predictions for them are combined.

    unconditional: a row without the conditions; off is one row an image, and no classifier-free guidance
    projected: the difference of the two goes through APG; needs `unconditional`
    perturbed: a row with the conditions and with perturbed self-attention
    rescaled: the result gets the conditional prediction's standard deviation; needs one of the two other rows

    The strengths that `guided` reads, columns of the grid of shape (calls,) or (calls, B):

        unconditional   guidance_scale
        projected       apg_eta (1 keeps the parallel part, 0 drops it), apg_threshold (above 0, inf for none),
                        apg_momentum (in (-1, 1); 0 for none, the paper's are negative)
        perturbed       pag_scale
        rescaled        guidance_rescale (0 to 1)

    Raises ValueError for a part without what it needs.
    """

    unconditional: bool = True
    projected: bool = False
    perturbed: bool = False
    rescaled: bool = False

    def __post_init__(self) -> None:
        if self.projected and not self.unconditional:
            raise ValueError("Guidance: projected needs unconditional: it projects the difference to that row")
        if self.rescaled and self.rows == 1:
            raise ValueError("Guidance: rescaled needs unconditional or perturbed: there is nothing to rescale")

    @property
    def rows(self) -> int:
        """How many rows of the network's batch an image takes."""
        return 1 + self.unconditional + self.perturbed


def interleave(*rows: jax.Array) -> jax.Array:
    """R arrays (B, ...) -> (R B, ...): image i's rows are R i, R i + 1, ..., in the order given.

    Neighbours rather than halves: with the batch split over devices, all rows of an image stay on one.
    """
    stacked = jnp.stack(rows, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def guidance_rows(guidance: Guidance, unconditional: jax.Array | None, conditional: jax.Array) -> jax.Array:
    """A condition for all rows: (B, ...) -> (rows B, ...), in the order unconditional, conditional, perturbed.

    unconditional is not read without that row, and may be None.
    """
    rows = [conditional] * (1 + guidance.perturbed)
    if guidance.unconditional:
        assert unconditional is not None
        rows.insert(0, unconditional)
    return interleave(*rows)


def perturbed_rows(guidance: Guidance, batch: int) -> jax.Array | None:
    """Which of the rows are perturbed: (rows B,) bool; None where none ever is."""
    if not guidance.perturbed:
        return None
    return jnp.tile(jnp.arange(guidance.rows) == guidance.rows - 1, batch)


def guidance_state(guidance: Guidance, latents: jax.Array) -> State:
    """What `start` needs for `guided`: APG's running sum, zeros like latents (B, ...); () without."""
    return jnp.zeros(latents.shape, jnp.float32) if guidance.projected else ()


def guided(network: GuidedNetwork, guidance: Guidance, prediction_type: str) -> StatefulDenoise:
    """The guided prediction, as `unclip_jax.sampling.loop.run_stateful_steps` takes it.

    network: (latents (rows B, ...), row of the grid, perturbed (rows B,) bool or None) -> predictions (rows B, ...) of
        `prediction_type` and of any float dtype. Its conditions are of `guidance_rows`.
    prediction_type: "epsilon", "v_prediction" or "sample"

    With u, c and p for the three rows' predictions:

        out = u + guidance_scale (c - u)    or, projected, see `project`
        out = out + pag_scale (c - p)
        out = rescale(out, c, guidance_rescale)

    All of it acts on predictions as the network makes them, whatever their type (which matters to `rescale` alone), but
    APG: that is defined on x0.
    """

    def denoise(x: jax.Array, row: Row, state: State) -> tuple[jax.Array, State]:
        rows = interleave(*[x] * guidance.rows)
        out = network(rows, row, perturbed_rows(guidance, x.shape[0]))
        parts = out.astype(jnp.float32).reshape(-1, guidance.rows, *out.shape[1:])
        conditional = out = parts[:, int(guidance.unconditional)]
        if guidance.projected:
            a = row["alpha_cumprod"]
            x0, _ = to_x0_eps(prediction_type, conditional, x, a)
            x0_unconditional, _ = to_x0_eps(prediction_type, parts[:, 0], x, a)
            strengths = (row[name] for name in ("apg_eta", "apg_threshold", "apg_momentum"))
            update, state = project(x0, x0_unconditional, state, *strengths)
            # Back by the slope instead of by the whole x0: at low noise that would lose the prediction's digits.
            move = _per_image(row["guidance_scale"] - 1, out.ndim) * update
            out = conditional + _slope(prediction_type, a) * move
        elif guidance.unconditional:
            out = _extrapolate(parts[:, 0], conditional, row["guidance_scale"])
        if guidance.perturbed:
            out = out + _per_image(row["pag_scale"], out.ndim) * (conditional - parts[:, -1])
        if guidance.rescaled:
            out = rescale(out, conditional, row["guidance_rescale"])
        return out, state

    return denoise


def guide(out: jax.Array, scale: jax.Array) -> jax.Array:
    """Plain classifier-free guidance, for loops of your own: u + scale (c - u).

    out: (2 B, ...), predictions without and with the conditions, as `interleave` orders them; scale: () or (B,).
    Returns (B, ...) float32.
    """
    pairs = out.astype(jnp.float32).reshape(-1, 2, *out.shape[1:])
    return _extrapolate(pairs[:, 0], pairs[:, 1], scale)


def rescale(out: jax.Array, conditional: jax.Array, amount: jax.Array) -> jax.Array:
    """Moves a guided prediction's standard deviation towards the conditional one's, against overexposure.

    out, conditional: (B, ...); amount: phi, () or (B,), 0 for nothing to 1 for all of it. Returns (B, ...) float32:
    phi out std(c) / std(out) + (1 - phi) out, the deviations over all axes but the first. Source: section 3.4 of
    arXiv:2305.08891.
    """
    axes = tuple(range(1, out.ndim))
    out, conditional = out.astype(jnp.float32), conditional.astype(jnp.float32)
    deviation = jnp.std(out, axes, keepdims=True)
    ratio = jnp.std(conditional, axes, keepdims=True) / jnp.where(deviation > 0, deviation, 1)
    amount = _per_image(amount, out.ndim)
    return amount * (out * ratio) + (1 - amount) * out


def project(
    conditional: jax.Array,
    unconditional: jax.Array,
    average: jax.Array,
    eta: jax.Array,
    threshold: jax.Array,
    momentum: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """APG's update of a conditional prediction: what takes the place of c - u in c + (scale - 1) (c - u).

    conditional, unconditional: (B, ...), predictions of x0; average: the running sum so far, (B, ...), zeros at first.
    eta, threshold, momentum: () or (B,). Returns the update and the next running sum, (B, ...) float32:

        sum    = (c - u) + momentum sum
        d      = sum min(1, threshold / |sum|)
        update = d - (1 - eta) d_parallel        d_parallel: the part of d along c

    Norms and products over all axes but the first. With eta 1, threshold inf and momentum 0 it is c - u. Source:
    algorithm 1 of arXiv:2410.02416.
    """
    axes = tuple(range(1, conditional.ndim))
    conditional = conditional.astype(jnp.float32)
    eta, threshold, momentum = (_per_image(value, conditional.ndim) for value in (eta, threshold, momentum))
    average = conditional - unconditional.astype(jnp.float32) + momentum * average
    norm = jnp.sqrt(jnp.sum(average**2, axes, keepdims=True))
    update = average * jnp.minimum(1, threshold / jnp.where(norm > 0, norm, 1))
    square = jnp.sum(conditional**2, axes, keepdims=True)
    along = jnp.sum(update * conditional, axes, keepdims=True) / jnp.where(square > 0, square, 1)
    return update - (1 - eta) * along * conditional, average


def limit_interval(
    scale: np.ndarray, alpha_cumprod: np.ndarray, interval: tuple[float, float], outside: float = 1.0
) -> np.ndarray:
    """A scale for each network call that is as given within an interval of noise levels, and `outside` elsewhere.

    scale: () or (calls,) or (calls, B); alpha_cumprod: (calls,), a solver's column; interval: (low, high), where
    0 <= low < high: a call is within when low < sigma <= high, sigma = sqrt((1 - a) / a) being the noise's standard
    deviation beside a picture of full size. (0, inf) is everywhere; the paper has (0.28, 5.42) for Stable Diffusion XL.
    outside: 1, guidance's neutral scale, or 0 for a pag_scale. Returns (calls,) or (calls, B) float32, on the host.

    Raises ValueError for another interval.
    """
    low, high = (float(end) for end in interval)
    if not 0 <= low < high or math.isnan(high):
        raise ValueError(f"guidance_interval is ({low:g}, {high:g}); want 0 <= low < high, in units of sigma")
    share = np.asarray(alpha_cumprod, np.float64)
    with np.errstate(divide="ignore"):
        sigma = np.sqrt((1 - share) / share)
    scale = np.asarray(scale, np.float32)
    scale = np.broadcast_to(scale, sigma.shape) if scale.ndim < 2 else scale
    within = ((low < sigma) & (sigma <= high)).reshape(-1, *[1] * (scale.ndim - 1))
    return np.where(within, scale, np.float32(outside))


def _extrapolate(unconditional: jax.Array, conditional: jax.Array, scale: jax.Array) -> jax.Array:
    return unconditional + _per_image(scale, conditional.ndim) * (conditional - unconditional)


def _per_image(value: jax.Array, ndim: int) -> jax.Array:
    """() or (B,) -> an array that multiplies (B, ...)."""
    return jnp.reshape(value, (-1,) + (1,) * (ndim - 1))


def _slope(prediction_type: str, alpha_cumprod: jax.Array) -> jax.Array:
    """How a prediction changes with the x0 that it stands for, x staying as it is; see `to_x0_eps`."""
    if prediction_type == "sample":
        return jnp.float32(1)
    alpha, sigma = jnp.sqrt(alpha_cumprod), jnp.sqrt(1 - alpha_cumprod)
    return -alpha / sigma if prediction_type == "epsilon" else -1 / sigma
