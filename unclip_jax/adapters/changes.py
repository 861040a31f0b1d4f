"""The kinds of change that an adapter makes to one parameter, each a small pytree.

Every change computes with `delta(base)` what is added to a parameter at scale 1, in float32; another scale multiplies
that. Kernels have our layouts: (in, out), or (h, w, in, out) for a convolution.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


class LowRank(NamedTuple):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): alpha / rank times `down` @ `up`. Floating, of any dtype.

    Attributes:
        down: (in, rank), or (h, w, in, rank) for a convolution.
        up: (rank, out).
        alpha: ().
    """

    down: Any
    up: Any
    alpha: Any

    @property
    def rank(self) -> int:
        return int(self.down.shape[-1])

    @property
    def shape(self) -> Shape:
        return (*self.down.shape[:-1], self.up.shape[-1])

    def delta(self, base: jax.Array) -> jax.Array:
        # The factor goes into the smaller of what is multiplied.
        down = _float32(self.down) * _float32(self.alpha / self.rank)
        return jnp.matmul(down, _float32(self.up), precision="highest")


class Hadamard(NamedTuple):
    """LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098): the elementwise product of two changes of low rank."""

    first: LowRank
    second: LowRank

    @property
    def shape(self) -> Shape:
        return self.first.shape

    def delta(self, base: jax.Array) -> jax.Array:
        return self.first.delta(base) * self.second.delta(base)


class Kronecker(NamedTuple):
    """LoKr (Yeh et al. 2023, arXiv:2309.14859): scale times the Kronecker product of two kernels.

    left: (in, out); right: (in, out) or (h, w, in, out); scale: ().
    """

    left: Any
    right: Any
    scale: Any

    @property
    def shape(self) -> Shape:
        *space, inner, out = self.right.shape
        return (*space, self.left.shape[0] * inner, self.left.shape[1] * out)

    def delta(self, base: jax.Array) -> jax.Array:
        left = _float32(self.left) * _float32(self.scale)
        return jnp.einsum("io,...jp->...ijop", left, _float32(self.right)).reshape(self.shape)


class Difference(NamedTuple):
    """Scale times a whole array, for a kernel, a bias, or a norm. value: the parameter's shape; scale: ()."""

    value: Any
    scale: Any

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    def delta(self, base: jax.Array) -> jax.Array:
        return _float32(self.value) * _float32(self.scale)


class Replacement(NamedTuple):
    """Replaces the parameter: by `value` at scale 1, by an interpolation at scales between 0 and 1."""

    value: Any

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    def delta(self, base: jax.Array) -> jax.Array:
        return _float32(self.value) - _float32(base)


class Factor(NamedTuple):
    """(IA)^3 (Liu et al. 2022, arXiv:2205.05638): the parameter times `value`, which is 0 where nothing changes.

    value: (out,) or (in, 1) for a kernel, (out,) for a bias.
    """

    value: Any

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    def delta(self, base: jax.Array) -> jax.Array:
        return _float32(base) * _float32(self.value)


class Decomposed(NamedTuple):
    """DoRA (Liu et al. 2024, arXiv:2402.09353): the changed kernel, its columns rescaled to the lengths `magnitude`.

    magnitude: (out,), or (in, 1) if a column holds the weights from one input to all outputs.
    """

    change: Any
    magnitude: Any

    @property
    def shape(self) -> Shape:
        return tuple(self.change.shape)

    def delta(self, base: jax.Array) -> jax.Array:
        base = _float32(base)
        whole = base + self.change.delta(base)
        kept = -1 if self.magnitude.ndim == 1 else -2
        axes = tuple(axis for axis in range(whole.ndim) if axis != whole.ndim + kept)
        # As LyCORIS has it: a column of zeros stays one.
        length = jnp.linalg.norm(jnp.moveaxis(whole, kept, -1).reshape(-1, whole.shape[kept]), axis=0)
        length = jnp.expand_dims(length, axes) + np.finfo(np.float32).eps
        return _float32(self.magnitude) / length * whole - base


Change = LowRank | Hadamard | Kronecker | Difference | Replacement | Factor | Decomposed


def fits(change: Change, shape: Shape) -> bool:
    """Whether a change is for a parameter of this shape."""
    if isinstance(change, Factor):
        return _spreads(change.shape, shape)
    if isinstance(change, Decomposed):
        return fits(change.change, shape) and _spreads(tuple(change.magnitude.shape), shape)
    if isinstance(change, Hadamard):
        return change.first.shape == change.second.shape == shape
    return change.shape == shape


def _spreads(vector: Shape, shape: Shape) -> bool:
    """Whether a vector is per output, (out,), or per input, (in, 1), for a kernel of this shape."""
    return vector == shape[-1:] or (len(shape) > 1 and vector == (shape[-2], 1))


def _float32(array: Any) -> jax.Array:
    return jnp.asarray(array, jnp.float32)
