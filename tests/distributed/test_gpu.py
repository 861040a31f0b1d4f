"""Networks and attention for NVIDIA GPUs, as far as a machine without one can say: their programs are made."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.distributed.lowering import CONFIG, DECODER, ONE_LEVEL, UNET, lower, mesh
from unclip_jax.models import platform
from unclip_jax.models.attention import _cudnn as cudnn


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """JAX looks for cuDNN while it traces."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(platform, "accelerator", lambda: "gpu")


def calls(program):
    """The shapes of the queries in each call of cuDNN's forward kernel, and of its backward kernel."""

    def of(name):
        shapes = []
        for line in program.splitlines():
            if f"@__cudnn$fmhaSoftmax{name}(" in line:
                operand = re.search(r": \(tensor<([\dx]+)x\w+>", line)
                shapes.append(tuple(map(int, operand[1].split("x"))))
        return shapes

    return of(""), of("Backward")


def program(function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def array(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


def squares(q, k, v):
    return (cudnn(q, k, v).astype(jnp.float32) ** 2).sum()


GRADIENT = jax.grad(squares, (0, 1, 2))
QUERIES, CONTEXT = array(3, 2, 256, 4, 64), array(2, 64, 4, 64)


def test_the_kernel_and_its_gradient():
    q, k = array(2, 256, 4, 64), CONTEXT
    assert calls(program(cudnn, q, k, k)) == ([(2, 256, 4, 64)], [])
    assert calls(program(GRADIENT, q, k, k)) == ([(2, 256, 4, 64)] * 2, [(2, 256, 4, 64)])


def test_the_gradient_of_odd_lengths_is_not_cudnns():
    q, k = array(2, 256, 4, 64), array(2, 77, 4, 64)
    assert calls(program(GRADIENT, q, k, k)) == ([(2, 256, 4, 64)], [])


def test_under_vmap_with_a_context_for_all():
    over_queries = (0, None, None)
    assert calls(program(jax.vmap(cudnn, over_queries), QUERIES, CONTEXT, CONTEXT)) == ([(6, 256, 4, 64)], [])
    forward, backward = calls(program(jax.vmap(GRADIENT, over_queries), QUERIES, CONTEXT, CONTEXT))
    assert set(forward) == set(backward) == {(6, 256, 4, 64)}
    total = jax.grad(lambda q, k: jax.vmap(squares, over_queries)(q, k, k).sum(), (0, 1))
    assert set(calls(program(total, QUERIES, CONTEXT))[1]) == {(6, 256, 4, 64)}


@pytest.mark.parametrize(
    ("splits", "heads", "share"),
    [
        (P("data", None, "model"), 4, (2, 256, 2, 64)),
        (P(None, None, None, "model"), 4, (2, 256, 2, 64)),  # which cuDNN's own partitioning refuses
        (P("data"), 5, (2, 256, 5, 64)),
    ],
    ids=["by heads", "within heads", "whole heads"],
)
def test_devices_have_their_own_images_and_heads(splits, heads, share):
    sharding = NamedSharding(mesh(2, 2), splits)
    q, k = array(4, 256, heads, 64, sharding=sharding), array(4, 64, heads, 64, sharding=sharding)
    text = program(GRADIENT, q, k, k)
    assert calls(text) == ([share] * 2, [share])
    assert "CustomSPMDPartitioning" not in text  # which holds an address of this process


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_one_level_over_four_devices(gradient):
    """Self-attention and cross-attention of its down block, of the middle and of its two up blocks."""
    text = lower("cuda", ONE_LEVEL, mesh(2, 2), *UNET, gradient)
    assert text.count("call @on_each_device") == (2 if gradient else 1) * 8
    forward, backward = calls(text)
    assert set(forward) == {(2, 9216, 5, 64)}
    assert set(backward) == (set(forward) if gradient else set())


def test_float32_is_exact():
    """In which cuDNN has no attention."""
    text = lower("cuda", ONE_LEVEL, mesh(1, 1), *UNET, dtype=jnp.float32)
    assert "fmha" not in text
    products = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)\b", line)]
    assert products
    assert all("HIGHEST" in line for line in products)


@pytest.mark.e2e
@pytest.mark.parametrize(("network", "attentions"), [(UNET, 32), (DECODER, 0)], ids=["unet", "decoder"])
def test_every_attention_that_is_narrow_enough_is_cudnns(network, attentions):
    assert lower("cuda", CONFIG, mesh(1, 1), *network).count("call @on_each_device") == attentions
