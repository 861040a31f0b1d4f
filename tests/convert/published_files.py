"""The tensors of published checkpoints."""

from tests.golden_weights import GOLDEN, inventory


def shapes(name):
    return {key: (info.shape, info.dtype) for key, info in inventory(GOLDEN / "inventory" / f"{name}.tsv.gz").items()}
