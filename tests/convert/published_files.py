"""The tensors of published checkpoints."""

import functools

import numpy as np

from convert import layouts
from convert.architecture.presets import PRESETS
from convert.engine import foreign_shape
from convert.readers import TensorInfo
from convert.rules import ldm
from tests.golden_weights import GOLDEN, inventory

HALF = np.dtype(np.float16)


def shapes(name):
    return {key: (info.shape, info.dtype) for key, info in inventory(GOLDEN / "inventory" / f"{name}.tsv.gz").items()}


@functools.cache
def file_params(name):
    return layouts.file_params(PRESETS[name])


def published(name, places=ldm.PLACES):
    """The tensors of a published checkpoint, as a file in half precision has them."""
    params = file_params(name)
    rules = layouts.table(PRESETS[name], params, places).rules
    return {rule.foreign: TensorInfo(foreign_shape(rule, params), HALF) for rule in rules}
