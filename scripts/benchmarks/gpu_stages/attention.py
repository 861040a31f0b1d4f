"""Attention by shape: which kernel it takes, how exact it is, and its speed beside the forms without a kernel."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from gpu_stages.run import Add, Row, Run, add_each, times
from turns import difference
from unclip_jax.models.attention import attend

BOUND = 5e-3  # relative L2 from float32, in half precision
# A form that holds all logits is not tried where they are more: 4 bytes each.
LOGITS = 2**31


def shapes(run: Run) -> list[tuple[int, int, int, int]]:
    """(T, S, N, H): of the UNet's levels at 64x64 and at 96x96 latents, of ViT-H, of the VAE at both sizes."""
    small, large = run.scaled(64), run.scaled(96)
    heads = [max(run.width // 64, 1) * factor for factor in (1, 2, 4, 4)]
    levels = [((small >> level) ** 2, (small >> level) ** 2, heads[level], 64) for level in range(4)]
    more = [(large**2, large**2, heads[0], 64), ((large // 2) ** 2, (large // 2) ** 2, heads[1], 64)]
    text = [(side**2, 77, heads[0], 64) for side in (small, large)]
    return [*levels, *more, *text, (257, 257, 16, 80), (small**2, small**2, 1, 512), (large**2, large**2, 1, 512)]


def measure(run: Run, add: Add) -> None:
    cases: list[tuple[Row, Callable[[], Row], float]] = [
        (
            {"rows": rows, "shape": "{}x{}, {} heads of {}".format(*shape)},
            functools.partial(forms, run, rows, *shape),
            0,
        )
        for rows in (2, 16)
        for shape in shapes(run)
    ]
    add_each(run, add, [*cases, ({"rows": 2, "shape": "vmap over queries"}, functools.partial(mapped, run), 0)])


def inputs(rows: int, tokens: int, context: int, heads: int, head_dim: int, dtype: Any) -> list[jax.Array]:
    """Random queries, keys and values."""
    return [
        jax.random.normal(jax.random.key(seed), (rows, length, heads, head_dim), jnp.dtype(dtype))
        for seed, length in enumerate((tokens, context, context))
    ]


def forms(run: Run, rows: int, tokens: int, context: int, heads: int, head_dim: int) -> Row:
    """What `attend` takes by itself, beside all queries at once, where their logits fit.

    For two rows also an eighth of the queries at a time, the gradient, and how exact the first is.
    """
    given = inputs(rows, tokens, context, heads, head_dim, run.dtype)
    in_blocks = functools.partial(attend, chunk=max(tokens // 8, 1))
    functions: dict[str, Callable[..., Any]] = {"ours": attend}
    if rows * heads * tokens * context <= LOGITS:
        functions["plain"] = functools.partial(attend, chunk=tokens)
    if rows == 2:
        functions["blocks"] = in_blocks
        functions["gradient"] = jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with ThreadPoolExecutor() as pool:
        lowered = [jax.jit(function).lower(*given) for function in functions.values()]
        compiled = dict(zip(functions, pool.map(lambda one: one.compile(), lowered), strict=True))

    def way(program: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready([program(*given) for _ in range(run.calls)])

    timed = times({name: way(program) for name, program in compiled.items()}, run.rounds, run.calls)
    row: Row = {
        "kernel": "cudnn" if "fmha" in compiled["ours"].as_text() else "none",
        "wants_kernel": run.dtype != "float32" and head_dim <= 128,
        "tflop_per_s": 4 * rows * heads * tokens * context * head_dim / timed["ours"]["ms"] / 1e9,
        **{f"{name}_ms": figures["ms"] for name, figures in timed.items()},
    }
    if rows == 2:
        want = jax.jit(in_blocks)(*(x[:1].astype(jnp.float32) for x in given))
        row |= {"relative_l2": difference(compiled["ours"](*given)[:1], want), "bound": BOUND}
    return row


def mapped(run: Run) -> Row:
    """vmap over the queries alone, as when many latents share a prompt; against one after the other."""
    q, k, v = inputs(2, run.scaled(32) ** 2, 77, 5, 64, run.dtype)
    queries = jnp.stack([q, 2 * q, 3 * q])
    got = jax.jit(jax.vmap(attend, (0, None, None)))(queries, k, v)
    want = jnp.stack([jax.jit(attend)(one, k, v) for one in queries])
    return {"relative_l2": difference(got, want), "bound": BOUND}
