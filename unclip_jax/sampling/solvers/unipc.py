"""UniPC (Zhao et al. 2023, arXiv:2302.04867) as diffusers' UniPCMultistepScheduler runs it."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np

from unclip_jax.sampling.solvers import linear
from unclip_jax.sampling.solvers.log_snr import CHOICES, DEFAULTS, half_log_snr, levels, warm_up
from unclip_jax.sampling.solvers.settings import check_start_step, read_settings
from unclip_jax.sampling.solvers.sigmas import Spacing
from unclip_jax.sampling.solvers.solver import Solver, make_grid
from unclip_jax.sampling.solvers.thresholding import threshold_columns

UNIPC = {
    **DEFAULTS,
    "predict_x0": True,
    "solver_type": "bh2",
    "lower_order_final": True,
    "disable_corrector": [],
    "solver_p": None,
    "final_sigmas_type": "zero",
    "rescale_betas_zero_snr": False,
    "sigma_min": None,
    "sigma_max": None,
    "shift_terminal": None,
}
UNIPC_CHOICES = {
    **CHOICES,
    # The last three are other classes', which diffusers takes for "bh2".
    "solver_type": ("bh1", "bh2", "midpoint", "heun", "logrho"),
    **dict.fromkeys(("solver_p", "sigma_min", "sigma_max", "shift_terminal"), (None,)),
}


def unipc(
    config: Mapping[str, Any], num_inference_steps: int, spacing: Spacing | None = None, start_step: int = 0
) -> Solver:
    """UniPC: a multistep predictor whose x is corrected by the prediction made there; one network evaluation per step.

    Args:
        config: A diffusers scheduler_config.json. Its solver_order (1, 2 or 3) is the predictor's order and the number
            of predictions remembered. solver_type, predict_x0 and disable_corrector are honoured.
        num_inference_steps: Network evaluations, 1 to the number of training timesteps.
        spacing: See `log_snr.levels`.
        start_step: The number of steps to leave out.

    Returns:
        The solver; it is deterministic.

    Raises:
        ValueError: A setting or a number is out of range.
    """
    settings = read_settings(config, UNIPC, UNIPC_CHOICES)
    uncorrected = _integers(settings["disable_corrector"])
    if settings["thresholding"] and not settings["predict_x0"]:
        raise ValueError("scheduler config: thresholding is True; want false with predict_x0 false")
    if settings["final_sigmas_type"] == "zero" and not settings["predict_x0"]:
        raise ValueError("scheduler config: final_sigmas_type is 'zero'; want 'sigma_min' with predict_x0 false")
    most = settings["solver_order"]
    timesteps, alpha, sigma = levels(settings, num_inference_steps, spacing, "unipc")
    calls, start_step = len(timesteps), check_start_step(start_step, len(timesteps))
    orders = warm_up(most, calls, start_step)
    if settings["lower_order_final"] or settings["final_sigmas_type"] == "zero":
        # A step to zero noise has no second order: without lower_order_final diffusers divides by zero there.
        left = (
            calls - np.arange(calls) if settings["lower_order_final"] else np.where(np.arange(calls) < calls - 1, 9, 1)
        )
        orders = np.minimum(orders, left)
    update = _Update(alpha, sigma, settings["predict_x0"], settings["solver_type"] == "bh1", most)
    shrinkage = update.scale[1:] / update.scale[:-1]
    weights = np.zeros((calls, most + 1))
    for i in range(calls):
        weights[i, :-1] = update.predictor(i, orders[i])
        if i > start_step and i - 1 not in uncorrected:
            # x is the last step's prediction; the corrector starts from where that did, and so only the weights of the
            # predictions differ.
            correction = update.corrector(i, orders[i - 1])
            correction[1:] -= update.predictor(i - 1, orders[i - 1])
            weights[i] += shrinkage[i] * correction
    kind = "x0" if settings["predict_x0"] else "eps"
    columns = dict(zip((kind, "memory", "memory_2", "memory_3"), weights.T, strict=False))
    grid = make_grid(
        timesteps,
        alpha[:-1] ** 2,
        start_step,
        x=shrinkage,
        **columns,
        **{f"keep_{kind}": 1},
        **threshold_columns(settings),
    )
    return linear.table(grid, settings["prediction_type"], remembers=most)


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(i, Integral) for i in value):
        raise ValueError(f"scheduler config: disable_corrector is {value!r:.80}; want a list of integers")
    return tuple(int(i) for i in value)


class _Update:
    """The formulas of B(h): what the predictions add to x in a step, apart from its shrinkage.

    scale: the divisor of x that makes the equation linear in the predictions: sigma for those of x0, alpha for noise.
    """

    def __init__(self, alpha: np.ndarray, sigma: np.ndarray, of_x0: bool, bh1: bool, most: int) -> None:
        self.scale, self.other = (sigma, alpha) if of_x0 else (alpha, sigma)
        self.lambdas, self.of_x0, self.bh1, self.most = half_log_snr(alpha, sigma), of_x0, bh1, most

    def predictor(self, step: int, order: int) -> np.ndarray:
        """The weights of the predictions at the step's start and before, newest first: (most,)."""
        weights, nodes, hh = self._first_order(step)
        nodes = nodes[: order - 1]
        if nodes.size == 1:
            weights += self._residual(step, hh, nodes, np.array([0.5]))
        elif nodes.size:
            matrix, right = self._conditions(hh, nodes)
            weights += self._residual(step, hh, nodes, np.linalg.solve(matrix[:, :-1][:-1], right[:-1]))
        return weights

    def corrector(self, call: int, order: int) -> np.ndarray:
        """The weights of the prediction at this evaluation and of those before it, newest first.

        They belong to the step that led here.
        """
        step = call - 1
        weights, nodes, hh = self._first_order(step)
        if hh == 0:
            return np.append(0, weights)
        nodes = nodes[: order - 1]
        shares = np.array([0.5]) if not nodes.size else np.linalg.solve(*self._conditions(hh, nodes))
        weights += self._residual(step, hh, nodes, shares[:-1])
        new = -self.other[call] * self._b(hh) * shares[-1]
        weights[0] -= new
        return np.append(new, weights)

    def _first_order(self, step: int) -> tuple[np.ndarray, np.ndarray, float]:
        """The exponential Euler step's weights, where earlier predictions lie in units of the step, and +-its width."""
        h = self.lambdas[step + 1] - self.lambdas[step]
        hh = -h if self.of_x0 else h
        weights = np.zeros(self.most)
        weights[0] = -self.other[step + 1] * np.expm1(hh)
        back = self.lambdas[max(step - self.most, 0) : step][::-1] - self.lambdas[step]
        # Equal levels, which rounding produces for some large counts, count as one.
        same = np.flatnonzero(np.diff(np.append(0, back)) == 0)
        usable = same[0] if same.size else len(back)
        return weights, back[:usable] / h if h > 0 else np.zeros(0), hh

    def _b(self, hh: float) -> float:
        return hh if self.bh1 else float(np.expm1(hh))

    def _conditions(self, hh: float, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The linear equations for the shares of the differences at `nodes` and at the step's end."""
        ends = np.append(nodes, 1.0)
        phi, right = np.expm1(hh) / hh - 1, []
        for i in range(1, len(ends) + 1):
            right.append(phi * math.factorial(i) / self._b(hh))
            phi = phi / hh - 1 / math.factorial(i + 1)
        return ends[None, :] ** np.arange(len(ends))[:, None], np.array(right)

    def _residual(self, step: int, hh: float, nodes: np.ndarray, shares: np.ndarray) -> np.ndarray:
        weights = np.zeros(self.most)
        weights[1 : len(nodes) + 1] = -self.other[step + 1] * self._b(hh) * shares / nodes
        weights[0] = -weights[1:].sum()
        return weights
