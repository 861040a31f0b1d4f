"""Attention: which implementation runs where, and each of them that a CPU can run against its definition."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from unclip_jax.models import attention
from unclip_jax.models.attention import attend, attention_kernel
from unclip_jax.models.attention_tpu import flash, largest_block

F32, BF16 = jnp.float32, jnp.bfloat16
# One program: operation by operation every shape would compile some twenty.
EVERY_FORM = jax.jit(lambda *a: [form(*a) for form in (attention._plain, attention._queries, attention._heads, attend)])
FLASH_GRADIENT = jax.grad(lambda *arrays: flash(*arrays).sum(), (0, 1, 2))

F16 = jnp.float16
CHOICES = [  # platform, dtype, (B, T, N, H), S
    (("cpu", F32, (2, 256, 5, 64), 77), "plain"),
    (("cpu", F32, (2, 4096, 5, 64), 4096), "heads"),
    (("cpu", BF16, (64, 4096, 5, 64), 4096), "heads"),
    (("cpu", F32, (64, 4096, 5, 64), 77), "plain"),
    (("gpu", BF16, (2, 4096, 5, 64), 4096), "cudnn"),
    (("gpu", F16, (2, 9216, 5, 64), 77), "cudnn"),
    (("gpu", BF16, (1, 257, 16, 80), 257), "cudnn"),
    (("gpu", F32, (2, 4096, 5, 64), 4096), "plain"),  # 0.6 GiB of logits
    (("gpu", F32, (8, 4096, 5, 64), 4096), "queries"),  # 2.5 GiB
    (("gpu", F32, (2, 9216, 5, 64), 9216), "queries"),
    (("gpu", BF16, (1, 9216, 1, 512), 9216), "plain"),  # the VAE's one head is too wide for cuDNN
    (("gpu", BF16, (4, 9216, 1, 512), 9216), "queries"),
    (("old-gpu", F16, (2, 4096, 5, 64), 4096), "plain"),
    (("old-gpu", F16, (8, 4096, 5, 64), 4096), "queries"),
    (("tpu", BF16, (2, 4096, 5, 64), 4096), "flash"),
    (("tpu", F32, (1, 9216, 1, 512), 9216), "flash"),
    (("tpu", F16, (2, 4096, 5, 64), 4096), "plain"),  # Mosaic has no float16
    (("tpu", BF16, (2, 4096, 5, 64), 77), "plain"),  # the text does not fill a block
    (("old-tpu", BF16, (8, 4096, 5, 64), 4096), "queries"),  # v2 and v3 have no products of bfloat16 in Mosaic
    (("rocm", BF16, (2, 9216, 5, 64), 9216), "queries"),
    (("cpu", F32, (2, 77, 16, 64), 77, True), "plain"),
    (("gpu", BF16, (2, 77, 16, 64), 77, True), "plain"),
]


@pytest.mark.parametrize(("situation", "kernel"), CHOICES)
def test_the_kernel_is_chosen_by_platform_and_shapes(situation, kernel):
    assert attention_kernel(*situation) == kernel


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_way_around_the_kernels(platform, monkeypatch):
    monkeypatch.setenv("UNCLIP_JAX_PLAIN_ATTENTION", "1")
    assert attention_kernel(platform, BF16, (2, 4096, 5, 64), 4096) == "plain"
    assert attention_kernel(platform, BF16, (8, 4096, 5, 64), 4096) == "queries"
    monkeypatch.setenv("UNCLIP_JAX_PLAIN_ATTENTION", "")
    assert attention_kernel(platform, BF16, (2, 4096, 5, 64), 4096) in ("cudnn", "flash")


def definition(q, k, v, bias=0.0):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def inputs(b, t, s, n, h, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((b, t, n, h), (b, s, n, h), (b, s, n, h)))


@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.sampled_from([1, 5, 16]))
@settings(max_examples=15)
def test_every_form_is_the_definition(b, t, s, n, h):
    q, k, v = inputs(b, t, s, n, h)
    want = definition(q, k, v)
    for got in EVERY_FORM(q, k, v):
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("block", [1, 700, 10_000])
def test_blocks_that_do_not_divide_the_queries(block, monkeypatch):
    monkeypatch.setattr(attention, "_HEADS_BLOCK", block)
    monkeypatch.setattr(attention, "_QUERIES_BLOCK", block)
    monkeypatch.setattr(attention, "_QUERIES_ROWS", 1)
    q, k, v = inputs(2, 37, 53, 2, 8)
    for form in (attention._queries, attention._heads):
        np.testing.assert_allclose(form(q, k, v), definition(q, k, v), atol=2e-6)


def test_blocks_of_queries_are_not_small():
    """However many images and heads there are: 64 and 5 of 96x96 latents, without computing them."""
    q = jax.ShapeDtypeStruct((64, 9216, 5, 64), F32)
    assert "f32[72,64,5,128,64]" in str(jax.make_jaxpr(attention._queries)(q, q, q))


def test_large_logits_do_not_overflow():
    q, k, v = inputs(1, 40, 40, 1, 8)
    got = attention._heads(100 * q, 100 * k, v)
    np.testing.assert_allclose(got, definition(100 * q, 100 * k, v), atol=1e-4)


def test_a_causal_bias():
    q, k, v = inputs(2, 20, 20, 2, 8)
    future = np.triu(np.full((20, 20), -np.inf, np.float32), 1)
    np.testing.assert_allclose(attend(q, k, v, jnp.asarray(future)), definition(q, k, v, future), atol=2e-6)


@pytest.mark.parametrize("form", [attention._plain, attention._queries, attention._heads])
def test_gradients_are_the_definitions(form, monkeypatch):
    monkeypatch.setattr(attention, "_HEADS_BLOCK", 100)
    monkeypatch.setattr(attention, "_QUERIES_BLOCK", 100)
    monkeypatch.setattr(attention, "_QUERIES_ROWS", 1)
    check_grads(form, inputs(1, 11, 7, 2, 4), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_under_jit_and_vmap():
    q, k, v = inputs(6, 33, 21, 2, 8)
    want = definition(q, k, v)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), want, atol=2e-6)
    parts = (a.reshape(3, 2, *a.shape[1:]) for a in (q, k, v))
    np.testing.assert_allclose(jax.jit(jax.vmap(attend))(*parts).reshape(want.shape), want, atol=2e-6)


def test_half_precision_accumulates_in_float32():
    q, k, v = inputs(1, 300, 300, 2, 64, dtype=BF16)
    got = attend(q, k, v)
    assert got.dtype == BF16
    want = definition(q, k, v)
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 5e-3 * np.linalg.norm(want)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.local_devices()).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(("heads", "split"), [(2, P("data", None, "model")), (3, P("data"))])
@pytest.mark.parametrize("axes", [P("data"), P("data", None, "model")], ids=str)
def test_devices_look_at_their_own_images_and_heads(mesh, axes, heads, split):
    """What XLA makes of a loop over images that are split over devices is a loop over all of them on each device."""
    arrays = inputs(4, 64, 48, heads, 8)
    axes = axes if heads == 2 else P("data")
    q, k, v = (jax.device_put(a, NamedSharding(mesh, axes)) for a in arrays)
    compiled = jax.jit(attention._heads).lower(q, k, v).compile()
    assert "all-" not in compiled.as_text()
    out = compiled(q, k, v)
    np.testing.assert_allclose(out, definition(q, k, v), atol=2e-6)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, split), 4)
    assert "all-gather" in jax.jit(attention._each_head).lower(q, k, v).compile().as_text()
    gradient = jax.jit(jax.grad(lambda *a: attention._heads(*a).var(), (0, 1, 2)))
    assert "all-gather" not in gradient.lower(q, k, v).compile().as_text()
    for got, want in zip(gradient(q, k, v), gradient(*arrays), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_program_knows_its_mesh_by_its_arguments_or_by_where_it_runs(mesh):
    """And where it knows none, it is right but communicates."""
    split = NamedSharding(mesh, P("data", None, "model"))
    arrays = inputs(4, 64, 48, 2, 8)

    def program():  # a new one each time: a traced one is kept
        return jax.jit(lambda *a: attention._heads(*a), in_shardings=split, out_shardings=split)

    with jax.set_mesh(mesh):
        assert "all-gather" not in program().lower(*arrays).compile().as_text()
    unknown = program().lower(*arrays).compile()
    assert "all-gather" in unknown.as_text()
    np.testing.assert_allclose(program()(*arrays), definition(*arrays), atol=2e-6)


@pytest.mark.parametrize(
    "axes",
    [
        (P(None, "data"), P(), P("model")),
        (P(None, None, None, "model"), P(None, "data"), P("data", None, "model")),
        (P("data", "model"), P(None, None, "data"), P(None, None, ("data", "model"))),
    ],
    ids=str,
)
def test_however_the_arrays_are_split_the_values_are_right(mesh, axes):
    arrays = (jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip(inputs(4, 64, 48, 4, 8), axes, strict=True))
    np.testing.assert_allclose(jax.jit(attention._heads)(*arrays), definition(*inputs(4, 64, 48, 4, 8)), atol=2e-6)


def test_under_shard_map_vmap_and_forward_differentiation(mesh):
    q, k, v = inputs(4, 64, 48, 2, 8)
    want = definition(q, k, v)
    for names in ({"data", "model"}, {"data"}):
        specs = {"in_specs": P("data"), "out_specs": P("data"), "axis_names": names}
        mapped = jax.jit(jax.shard_map(attention._heads, mesh=mesh, **specs))
        split = (jax.device_put(a, NamedSharding(mesh, P("data", "model"))) for a in (q, k, v))
        np.testing.assert_allclose(mapped(*split), want, atol=2e-6)
    over_queries = jax.vmap(attention._heads, in_axes=(0, None, None))(jnp.stack([q, 2 * q]), k, v)
    np.testing.assert_allclose(over_queries, [want, definition(2 * q, k, v)], atol=2e-6)
    check_grads(attention._heads, inputs(1, 11, 7, 2, 4), order=1, modes=["fwd"], atol=2e-2, rtol=2e-2)


def test_the_kernel_for_tpus_is_the_definition():
    """As JAX interprets it without one."""
    q, k, v = (jnp.asarray(a) for a in inputs(2, 256, 128, 2, 16))

    def squares(form):
        return jax.grad(lambda *arrays: (form(*arrays) ** 2).sum(), (0, 1, 2))(q, k, v)

    with force_tpu_interpret_mode():
        np.testing.assert_allclose(flash(q, k, v), definition(q, k, v), atol=2e-6)  # 5e-7
        for got, want in zip(squares(flash), squares(attention._plain), strict=True):
            np.testing.assert_allclose(got, want, atol=5e-6)  # 1.2e-6
        over_queries = jax.vmap(flash, in_axes=(0, None, None))(jnp.stack([q, 2 * q]), k, v)
        np.testing.assert_allclose(over_queries[1], definition(2 * q, k, v), atol=2e-6)


@pytest.mark.parametrize(("length", "block"), [(9216, 1024), (4096, 1024), (2304, 768), (1024, 1024), (1664, 128)])
def test_blocks_of_the_kernel_for_tpus_are_large(length, block):
    assert largest_block(length, 1024) == block


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(4096, 5, 64), (9216, 5, 64), (1024, 10, 64), (9216, 1, 512)])
def test_the_kernel_for_tpus_is_made_for_the_networks_shapes(tokens, heads, width, dtype):
    array = jax.ShapeDtypeStruct((2, tokens, heads, width), dtype)
    for function, kernels in ((flash, 1), (FLASH_GRADIENT, 3)):
        program = jax.jit(function).trace(array, array, array).lower(lowering_platforms=("tpu",)).as_text()
        assert program.count("tpu_custom_call") == kernels


@pytest.mark.parametrize(("function", "kernels"), [(flash, 1), (FLASH_GRADIENT, 3)], ids=["value", "gradient"])
def test_the_kernel_for_tpus_is_split_over_devices(mesh, function, kernels):
    """As far as a machine without one can say: the program is made, with each device's share in the kernel."""
    split = NamedSharding(mesh, P("data", None, "model"))
    q, k, v = (jax.ShapeDtypeStruct((4, tokens, 2, 64), BF16, sharding=split) for tokens in (256, 128, 128))
    program = jax.jit(function).trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    calls = [line for line in program.splitlines() if "@tpu_custom_call" in line]
    assert len(calls) == kernels
    assert all("(tensor<2x1x256x64xbf16>, tensor<2x1x128x64xbf16>, tensor<2x1x128x64xbf16>" in line for line in calls)
    assert "CustomSPMDPartitioning" not in program


@pytest.mark.parametrize("function", [flash, FLASH_GRADIENT], ids=["value", "gradient"])
@pytest.mark.parametrize(
    ("dtype", "asked", "exact"),
    [
        (F32, None, True),
        (F32, "highest", True),
        (F32, "tensorfloat32", True),  # which Mosaic does not have
        (F32, "bfloat16", False),
        (BF16, None, False),
        (BF16, "highest", False),  # which Mosaic refuses
    ],
)
def test_the_kernel_for_tpus_has_the_precision_of_its_dtype(function, dtype, asked, exact):
    array = jax.ShapeDtypeStruct((1, 128, 1, 64), dtype)
    with jax.default_matmul_precision(asked) if asked else contextlib.nullcontext():
        program = str(jax.make_jaxpr(function)(array, array, array))
    assert ("HIGHEST" in program) == exact


def test_memory_is_far_below_that_of_all_logits():
    """At 4096 tokens: forwards, and backwards as well."""
    q, k, v = (jax.ShapeDtypeStruct((2, 4096, 5, 64), F32) for _ in range(3))
    logits = 2 * 5 * 4096 * 4096 * 4
    forward = jax.jit(attend).lower(q, k, v).compile().memory_analysis()
    assert forward.temp_size_in_bytes < logits / 5
    gradient = jax.jit(jax.grad(lambda *a: attend(*a).sum(), argnums=(0, 1, 2))).lower(q, k, v).compile()
    assert gradient.memory_analysis().temp_size_in_bytes < logits / 3
