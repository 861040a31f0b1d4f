"""A small checkpoint's adapters, as files hold them."""

import dataclasses

import numpy as np

from convert.adapters import parameter
from convert.rules import lora as names
from tests import small_models
from unclip_jax.adapters.changes import LowRank
from unclip_jax.checkpoints.networks import abstract_params

CONFIG = dataclasses.replace(
    small_models.TEXT_TO_IMAGE, text_encoder=dataclasses.replace(small_models.TEXT, layers=2, projection_dim=None)
)


TO_K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


OURS = "unet.down_blocks.1.attentions.0.attn2.to_k.kernel"


def kernels(config=CONFIG):
    """Our name in an adapter -> the kernel's shape."""
    params = abstract_params(config)
    return {
        parameter(rule): params[rule.ours].shape[(rule.layer is not None) :]
        for rules in names.written(config, "diffusers").values()
        for rule in rules
    }


def random_lora(seed, share=1.0, dtype=np.float32, config=CONFIG):
    """An adapter of some of the kernels, of ranks and alphas of their own."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32).astype(dtype)

    lora = {}
    for name, (*inner, out) in kernels(config).items():
        if rng.random() < share or not lora:
            rank = int(rng.integers(1, 4))
            alpha = np.float32(rng.choice([rank, 0.3, 7, 1e-3]))
            lora[name] = LowRank(draw(*inner, rank), draw(rank, out), alpha)
    return lora


def pair(module, inner=32, out=32, rank=2, ends=("lora_A.weight", "lora_B.weight")):
    down, up = np.ones((rank, inner), np.float32), np.ones((out, rank), np.float32)
    return {f"{module}.{ends[0]}": down, f"{module}.{ends[1]}": up}


GOOD = pair(f"unet.{TO_K}")
