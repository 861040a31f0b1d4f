"""Warns about NaN or infinite weights, which silently produce black images."""

import warnings

import numpy as np

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_BLOCK = 1 << 18  # numbers that stay in the cache: the check costs less than reading them from a disk


def is_finite(array: np.ndarray) -> bool:
    """Whether every number is finite. array: any shape and floating dtype, bfloat16 included."""
    bits = np.ascontiguousarray(array).reshape(-1).view(_UNSIGNED[array.dtype.itemsize])
    # NaN and the infinities are the numbers with every bit of the exponent set, as infinity has it.
    exponent = np.array(np.inf, array.dtype).view(bits.dtype)
    return all(((bits[i : i + _BLOCK] & exponent) != exponent).all() for i in range(0, bits.size, _BLOCK))


def warn_unless_finite(name: str, array: np.ndarray) -> np.ndarray:
    """Returns the array as it is, with a UserWarning that names it if it holds NaN or an infinity."""
    if not is_finite(array):
        warnings.warn(f"{name} holds NaN or infinite numbers", stacklevel=2)
    return array


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts to another dtype, C-contiguous, with a UserWarning if numbers become infinite."""
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)
    if out.dtype != array.dtype and not is_finite(out) and is_finite(array):
        warnings.warn(f"{name} has numbers beyond the range of {dtype.name}: they become infinite", stacklevel=2)
    return out
