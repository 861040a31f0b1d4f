"""Guidance: combining a network's predictions for several copies of one image into one prediction.

Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) and what may join it: adaptive projected guidance (APG;
Sadat et al. 2024, arXiv:2410.02416), perturbed-attention guidance (PAG; Ahn et al. 2024, arXiv:2403.17377), rescaling
(Lin et al. 2023, arXiv:2305.08891) and a limited interval (Kynkäänniemi et al. 2024, arXiv:2404.07724). Where an image
is changed by an instruction, either condition has a scale of its own (Brooks et al. 2022, arXiv:2211.09800).

Which of them an evaluation uses is static, a `Guidance`. How strong each is comes from columns of the run's grid: one
traced value for each network evaluation. All arithmetic is float32, and each image's own.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.sampling.loop import StatefulDenoise
from unclip_jax.sampling.schedule import to_x0_eps
from unclip_jax.sampling.solvers.solver import Row, State

GuidedNetwork = Callable[[jax.Array, Row, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Which copies of each image the network is given, and how its predictions for them are combined.

    Each copy is a row of the network's batch. `guided` reads the strengths from columns of the grid, of shape (calls,)
    or (calls, B):

    - unconditional: guidance_scale
    - image: image_guidance_scale
    - projected: apg_eta (1 keeps the parallel part, 0 drops it), apg_threshold (above 0; inf for no bound),
      apg_momentum (in (-1, 1); 0 for none; the paper's are negative)
    - perturbed: pag_scale
    - rescaled: guidance_rescale (0 to 1)

    Args:
        unconditional: Adds a row without the conditions. False: one row per image and no classifier-free guidance.
        projected: Sends the difference of the two predictions through APG. Needs `unconditional`.
        perturbed: Adds a row with the conditions and perturbed self-attention.
        rescaled: Gives the result the standard deviation of the conditional prediction. Needs `unconditional` or
            `perturbed`.
        image: Adds a row with the image that an instruction changes, but without the instruction. The unconditional row
            has neither. Needs `unconditional`.

    Raises:
        ValueError: A part is set without the part that it needs, or `image` with `projected`.
    """

    unconditional: bool = True
    projected: bool = False
    perturbed: bool = False
    rescaled: bool = False
    image: bool = False

    def __post_init__(self) -> None:
        if self.projected and not self.unconditional:
            raise ValueError("Guidance: projected needs unconditional: it projects the difference to that row")
        if self.rescaled and self.rows == 1:
            raise ValueError("Guidance: rescaled needs unconditional or perturbed: without them nothing is rescaled")
        if self.image and (not self.unconditional or self.projected):
            raise ValueError("Guidance: image needs unconditional, and does not go with projected")

    @property
    def rows(self) -> int:
        """The number of rows that an image takes in the network's batch."""
        return self.before + 1 + self.perturbed

    @property
    def before(self) -> int:
        """The number of an image's rows before the conditional one: those without the prompt."""
        return self.unconditional + self.image

    @property
    def strengths(self) -> tuple[str, ...]:
        """The names of the grid's columns that `guided` reads."""
        used = {
            "guidance_scale": self.unconditional,
            "image_guidance_scale": self.image,
            "apg_eta": self.projected,
            "apg_threshold": self.projected,
            "apg_momentum": self.projected,
            "pag_scale": self.perturbed,
            "guidance_rescale": self.rescaled,
        }
        return tuple(name for name, on in used.items() if on)


def interleave(*rows: jax.Array) -> jax.Array:
    """Interleaves R arrays (B, ...) into one of shape (R B, ...): image i has the rows R i, R i + 1, ...

    The rows of an image are neighbours, in the order of the arguments. With the batch split over devices, all rows of
    an image therefore stay on one device.

    Args:
        *rows: R arrays of shape (B, ...).

    Returns:
        An array (R B, ...).
    """
    stacked = jnp.stack(rows, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def guidance_rows(
    guidance: Guidance, unconditional: jax.Array | None, conditional: jax.Array, image: jax.Array | None = None
) -> jax.Array:
    """Builds a condition for all rows: (B, ...) -> (rows B, ...), ordered unconditional, image, conditional, perturbed.

    Args:
        guidance: Which rows there are.
        unconditional: (B, ...), the condition of the unconditional rows; not read without those rows, and then may be
            None.
        conditional: (B, ...), the condition of the other rows.
        image: (B, ...), the condition of the rows with the image alone; None: that of the unconditional rows.

    Returns:
        An array (rows B, ...), where rows is `guidance.rows`.
    """
    rows = [conditional] * (1 + guidance.perturbed)
    if guidance.unconditional:
        assert unconditional is not None
        rows = [unconditional, *[unconditional if image is None else image] * guidance.image, *rows]
    return interleave(*rows)


def perturbed_rows(guidance: Guidance, batch: int) -> jax.Array | None:
    """Marks the perturbed rows: (rows B,) bool, or None if there are none."""
    if not guidance.perturbed:
        return None
    return jnp.tile(jnp.arange(guidance.rows) == guidance.rows - 1, batch)


def guidance_state(guidance: Guidance, latents: jax.Array) -> State:
    """The initial guidance state for `start`: zeros (B, ...) for APG's running sum, or () without APG.

    Args:
        guidance: Which parts the run uses.
        latents: (B, ...), whose shape the sum has.

    Returns:
        float32 zeros of the latents' shape with `projected`, else ().
    """
    return jnp.zeros(latents.shape, jnp.float32) if guidance.projected else ()


def guided(network: GuidedNetwork, guidance: Guidance, prediction_type: str) -> StatefulDenoise:
    """Makes the guided prediction, in the form that `unclip_jax.sampling.loop.run_stateful_steps` takes.

    With u, i, c and p for the predictions of the unconditional, image, conditional and perturbed rows:

        out = u + guidance_scale (c - u)    or, if projected, see `project`; or, with an image row,
        out = u + guidance_scale (c - i) + image_guidance_scale (i - u)
        out = out + pag_scale (c - p)
        out = rescale(out, c, guidance_rescale)

    All of this acts on predictions as the network makes them, whatever their type (which matters to `rescale` only),
    except APG, which is defined on x0.

    Args:
        network: (latents (rows B, ...), row of the grid, perturbed (rows B,) bool or None) -> predictions (rows B, ...)
            of `prediction_type` and of any float dtype. Its conditions come from `guidance_rows`.
        guidance: Which rows there are and how they are combined.
        prediction_type: "epsilon", "v_prediction" or "sample".

    Returns:
        (latents (B, ...), row of the grid, guidance state) -> prediction (B, ...) float32, next guidance state.
    """

    def denoise(x: jax.Array, row: Row, state: State) -> tuple[jax.Array, State]:
        rows = interleave(*[x] * guidance.rows)
        out = network(rows, row, perturbed_rows(guidance, x.shape[0]))
        parts = out.astype(jnp.float32).reshape(-1, guidance.rows, *out.shape[1:])
        conditional = out = parts[:, guidance.before]
        if guidance.projected:
            a = row["alpha_cumprod"]
            x0, _ = to_x0_eps(prediction_type, conditional, x, a)
            x0_unconditional, _ = to_x0_eps(prediction_type, parts[:, 0], x, a)
            strengths = (row[name] for name in ("apg_eta", "apg_threshold", "apg_momentum"))
            update, state = project(x0, x0_unconditional, state, *strengths)
            # Converted back by the slope, not through the whole x0: at low noise that would lose digits.
            move = _per_image(row["guidance_scale"] - 1, out.ndim) * update
            out = conditional + _slope(prediction_type, a) * move
        elif guidance.image:
            with_image = _extrapolate(parts[:, 0], parts[:, 1], row["image_guidance_scale"])
            out = with_image + _per_image(row["guidance_scale"], out.ndim) * (conditional - parts[:, 1])
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

    Args:
        out: (2 B, ...), predictions without and with the conditions, in the order of `interleave`.
        scale: () or (B,).

    Returns:
        (B, ...) float32.
    """
    pairs = out.astype(jnp.float32).reshape(-1, 2, *out.shape[1:])
    return _extrapolate(pairs[:, 0], pairs[:, 1], scale)


def rescale(out: jax.Array, conditional: jax.Array, amount: jax.Array) -> jax.Array:
    """Moves a guided prediction's standard deviation towards the conditional one's, against overexposure.

    Computes phi out std(c) / std(out) + (1 - phi) out, with deviations over all axes but the first. Source: section 3.4
    of arXiv:2305.08891.

    Args:
        out: (B, ...), the guided prediction.
        conditional: (B, ...), the conditional prediction c.
        amount: phi, () or (B,), from 0 (no change) to 1 (the conditional prediction's deviation).

    Returns:
        (B, ...) float32.
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
    """APG's update of a conditional prediction: it replaces c - u in c + (scale - 1) (c - u).

        sum    = (c - u) + momentum sum
        d      = sum min(1, threshold / |sum|)
        update = d - (1 - eta) d_parallel        d_parallel: the part of d along c

    Norms and products are over all axes but the first. With eta 1, threshold inf and momentum 0 the update is c - u.
    Source: algorithm 1 of arXiv:2410.02416.

    Args:
        conditional: (B, ...), prediction of x0 with the conditions, c.
        unconditional: (B, ...), prediction of x0 without them, u.
        average: (B, ...), the running sum so far; zeros at first.
        eta: () or (B,).
        threshold: () or (B,).
        momentum: () or (B,).

    Returns:
        The update and the next running sum, (B, ...) float32 each.
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
    """Limits a scale to an interval of noise levels: as given within it, `outside` elsewhere.

    An evaluation is within the interval when low < sigma <= high. Here sigma = sqrt((1 - a) / a) is the standard
    deviation of the noise beside an image of full size. The paper uses (0.28, 5.42) for Stable Diffusion XL; (0, inf)
    is everywhere.

    Args:
        scale: () or (calls,) or (calls, B).
        alpha_cumprod: a, (calls,), the solver's column of that name.
        interval: (low, high), with 0 <= low < high.
        outside: The value elsewhere: 1, guidance's neutral scale, or 0 for a pag_scale.

    Returns:
        (calls,) or (calls, B) float32 numpy array.

    Raises:
        ValueError: The interval is not 0 <= low < high.
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


def guidance_by_call(guidance: Guidance, strengths: Mapping[str, np.ndarray], calls: int) -> list[Guidance]:
    """What each network evaluation needs of a run's guidance: without the rows that count for no image.

    The run stays the same, up to rounding: at scales of 1 the guided prediction is the conditional one, and where no
    other row is left there is nothing to rescale. APG's momentum takes the difference of an evaluation to later ones,
    so that the unconditional row stays until the last that is guided.

    Args:
        guidance: What the run uses.
        strengths: Its columns on the host, (calls,) or (calls, B) each.
        calls: The number of evaluations.

    Returns:
        A list of `calls`.
    """

    def counts(name: str, neutral: float) -> np.ndarray:
        """(calls,) bool: whether a strength is not neutral for some image."""
        return np.any(np.reshape(strengths[name] != np.float32(neutral), (calls, -1)), axis=1)

    unconditional = perturbed = np.zeros(calls, bool)
    if guidance.unconditional:
        unconditional = counts("guidance_scale", 1)
    if guidance.image:
        unconditional |= counts("image_guidance_scale", 1)
    if guidance.projected and counts("apg_momentum", 0).any():
        unconditional = np.logical_or.accumulate(unconditional[::-1])[::-1]
    if guidance.perturbed:
        perturbed = counts("pag_scale", 0)
    return [
        Guidance(u, guidance.projected and u, p, guidance.rescaled and (u or p), guidance.image and u)
        for u, p in zip(unconditional.tolist(), perturbed.tolist(), strict=True)
    ]


def _extrapolate(unconditional: jax.Array, conditional: jax.Array, scale: jax.Array) -> jax.Array:
    return unconditional + _per_image(scale, conditional.ndim) * (conditional - unconditional)


def _per_image(value: jax.Array, ndim: int) -> jax.Array:
    """() or (B,) -> an array that multiplies (B, ...)."""
    return jnp.reshape(value, (-1,) + (1,) * (ndim - 1))


def _slope(prediction_type: str, alpha_cumprod: jax.Array) -> jax.Array:
    """The derivative of a prediction with respect to the x0 that it implies, at fixed x; see `to_x0_eps`."""
    if prediction_type == "sample":
        return jnp.float32(1)
    alpha, sigma = jnp.sqrt(alpha_cumprod), jnp.sqrt(1 - alpha_cumprod)
    return -alpha / sigma if prediction_type == "epsilon" else -1 / sigma
