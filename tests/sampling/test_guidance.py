"""Guidance against plain numpy, and inside the loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.sampling import (
    PUBLISHED_UNCLIP_SCHEDULER,
    Guidance,
    guidance_rows,
    guidance_state,
    guide,
    guided,
    interleave,
    limit_interval,
    make_solver,
    run_stateful_steps,
    sample,
    start,
)
from unclip_jax.sampling.guidance import guidance_by_call, project, rescale
from unclip_jax.sampling.schedule import PREDICTION_TYPES

RNG = np.random.default_rng(0)
UNCONDITIONAL, CONDITIONAL, PERTURBED, X = RNG.standard_normal((4, 3, 4, 5, 6)).astype(np.float32)
AXES = (1, 2, 3)
# One value an image, or one for all.
SCALE, PAG_SCALE = np.array([0, 1, 10], np.float32), np.float32(2.5)
APG = {
    "apg_eta": np.array([0, 1, 0.3], np.float32),
    "apg_threshold": np.float32(2),
    "apg_momentum": np.float32(-0.5),
}
NEUTRAL = {"apg_eta": np.float32(1), "apg_threshold": np.float32(np.inf), "apg_momentum": np.float32(0)}


def column(value):
    return np.reshape(value, (-1, 1, 1, 1)).astype(np.float64)


def test_the_rows_of_an_image_are_neighbours():
    rows = interleave(jnp.asarray(UNCONDITIONAL), jnp.asarray(CONDITIONAL))
    assert rows.shape == (6, 4, 5, 6)
    np.testing.assert_array_equal(rows[0::2], UNCONDITIONAL)
    np.testing.assert_array_equal(rows[1::2], CONDITIONAL)
    three = guidance_rows(Guidance(perturbed=True), jnp.asarray(UNCONDITIONAL), jnp.asarray(CONDITIONAL))
    for place, want in enumerate((UNCONDITIONAL, CONDITIONAL, CONDITIONAL)):
        np.testing.assert_array_equal(three[place::3], want)
    alone = guidance_rows(Guidance(unconditional=False), None, jnp.asarray(CONDITIONAL))
    np.testing.assert_array_equal(alone, CONDITIONAL)


@pytest.mark.parametrize("scale", [np.float32(7.5), np.float32(-1), np.array([0, 1, 10], np.float32)])
def test_guidance_extrapolates(scale):
    out = guide(interleave(jnp.asarray(UNCONDITIONAL), jnp.asarray(CONDITIONAL)), jnp.asarray(scale))
    want = UNCONDITIONAL + column(scale) * (CONDITIONAL.astype(np.float64) - UNCONDITIONAL)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_half_precision_is_combined_in_float32():
    rows = interleave(jnp.asarray(UNCONDITIONAL, jnp.bfloat16), jnp.asarray(CONDITIONAL, jnp.bfloat16))
    out = guide(rows, jnp.float32(10))
    assert out.dtype == jnp.float32
    low, high = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (UNCONDITIONAL, CONDITIONAL))
    np.testing.assert_allclose(out, low + 10 * (high - low), rtol=1e-5, atol=1e-5)


def plain_rescale(out, conditional, amount):
    ratio = conditional.std(AXES, ddof=1, keepdims=True) / out.std(AXES, ddof=1, keepdims=True)
    return column(amount) * out * ratio + (1 - column(amount)) * out


def plain_projection(conditional, unconditional, average, apg):
    """arXiv:2410.02416, one image at a time."""
    eta, threshold, momentum = (np.broadcast_to(value, len(conditional)).astype(np.float64) for value in apg.values())
    average = conditional - unconditional + column(momentum) * average
    updates = []
    for c, d, e, r in zip(conditional, average, eta, threshold, strict=True):
        d = d * min(1, r / np.linalg.norm(d))
        unit = c / np.linalg.norm(c)
        parallel = (d * unit).sum() * unit
        updates.append(d - parallel + e * parallel)
    return np.stack(updates), average


@pytest.mark.parametrize("amount", [np.float32(0.7), np.array([0, 0.5, 1], np.float32)])
def test_rescaled_deviation(amount):
    out = 3 * CONDITIONAL + UNCONDITIONAL
    got = rescale(jnp.asarray(out), jnp.asarray(CONDITIONAL), jnp.asarray(amount))
    want = plain_rescale(out.astype(np.float64), CONDITIONAL.astype(np.float64), amount)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rescale(jnp.asarray(out), jnp.asarray(CONDITIONAL), jnp.float32(0)), out)
    np.testing.assert_allclose(rescale(out, CONDITIONAL, 1.0).std(AXES), CONDITIONAL.std(AXES), rtol=1e-5)
    assert np.isfinite(rescale(jnp.ones_like(out), jnp.asarray(CONDITIONAL), jnp.float32(0.5))).all()


def test_projection_with_momentum():
    average, plain = jnp.zeros_like(CONDITIONAL), np.zeros(CONDITIONAL.shape)
    for call in range(3):
        c, u = CONDITIONAL * (call + 1), UNCONDITIONAL + call
        update, average = project(c, u, average, *APG.values())
        want, plain = plain_projection(c.astype(np.float64), u.astype(np.float64), plain, APG)
        np.testing.assert_allclose(average, plain, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(update, want, rtol=1e-5, atol=1e-5)
        assert (np.sqrt((np.asarray(update) ** 2).sum(AXES)) < 2.0001).all()
        assert abs((np.asarray(update) * c)[0].sum()) < 1e-4  # eta 0: orthogonal to the conditional prediction
    nothing, _ = project(jnp.zeros_like(c), jnp.zeros_like(c), jnp.zeros_like(c), *APG.values())
    np.testing.assert_array_equal(nothing, np.zeros_like(c))


def predictions(x, row, perturbed):
    """A network whose answer depends on the row of the batch, not on x."""
    parts = [UNCONDITIONAL, CONDITIONAL] if perturbed is None else [UNCONDITIONAL, CONDITIONAL, PERTURBED]
    assert x.shape[0] == 3 * len(parts)
    return interleave(*map(jnp.asarray, parts))


def to_x0(kind, out, a):
    return {
        "epsilon": (X - np.sqrt(1 - a) * out) / np.sqrt(a),
        "v_prediction": np.sqrt(a) * X - np.sqrt(1 - a) * out,
        "sample": out,
    }[kind].astype(np.float64)


def from_x0(kind, x0, a):
    eps = (X - np.sqrt(a) * x0) / np.sqrt(1 - a)
    return {"epsilon": eps, "v_prediction": np.sqrt(a) * eps - np.sqrt(1 - a) * x0, "sample": x0}[kind]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("a", [0.005, 0.6, 0.999])
def test_all_kinds_of_guidance_at_once_are_their_definitions(kind, a):
    """Projected, perturbed and rescaled, in this order, of every type of prediction; then with neutral strengths."""
    row = {"alpha_cumprod": a, "guidance_scale": SCALE, "pag_scale": PAG_SCALE, "guidance_rescale": 0.7, **APG}
    row = {name: jnp.asarray(value, jnp.float32) for name, value in row.items()}
    guidance = Guidance(projected=True, perturbed=True, rescaled=True)
    denoise = jax.jit(guided(predictions, guidance, kind))
    x, (u, c, p) = jnp.asarray(X), (part.astype(np.float64) for part in (UNCONDITIONAL, CONDITIONAL, PERTURBED))
    got, memory = denoise(x, row, guidance_state(guidance, x))
    update, average = plain_projection(to_x0(kind, c, a), to_x0(kind, u, a), 0, APG)
    out = from_x0(kind, to_x0(kind, c, a) + (column(SCALE) - 1) * update, a)
    want = plain_rescale(out + column(PAG_SCALE) * (c - p), c, 0.7)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(memory, average, rtol=1e-4, atol=1e-4)

    neutral = {**row, **NEUTRAL, "pag_scale": 0.0, "guidance_rescale": 0.0}
    got, _ = denoise(x, neutral, guidance_state(guidance, x))
    plain, _ = guided(predictions, Guidance(), kind)(x, row, ())
    np.testing.assert_array_equal(plain, guide(predictions(jnp.zeros(6), row, None), SCALE))
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-4)


def test_perturbed_attention_alone():
    def network(x, row, perturbed):
        np.testing.assert_array_equal(perturbed, [False, True] * 3)
        return jnp.where(perturbed[:, None, None, None], 0.5, 2) * x

    guidance = Guidance(unconditional=False, perturbed=True)
    out, _ = guided(network, guidance, "epsilon")(jnp.asarray(X), {"pag_scale": jnp.float32(3)}, ())
    np.testing.assert_allclose(out, 2 * X + 3 * 1.5 * X, rtol=1e-6)


def test_interval_of_noise_levels():
    sigma = np.array([np.inf, 14, 5.42, 3, 0.28, 0.1])
    share = 1 / (1 + sigma**2)
    np.testing.assert_array_equal(limit_interval(7.5, share, (0.28, 5.43)), [1, 1, 7.5, 7.5, 1, 1])
    np.testing.assert_array_equal(limit_interval(3, share, (5, np.inf), outside=0), [3, 3, 3, 0, 0, 0])
    by_image = np.arange(12, dtype=np.float32).reshape(6, 2)
    limited = limit_interval(by_image, share, (0.2, 4))
    np.testing.assert_array_equal(limited[3:5], by_image[3:5])
    assert (limited[[0, 1, 2, 5]] == 1).all()
    np.testing.assert_array_equal(limit_interval(by_image[:, 0], share, (0, np.inf)), by_image[:, 0])


@pytest.mark.parametrize("interval", [(1, 1), (-1, 2), (3, 2), (np.nan, 2), (0, np.nan)])
def test_intervals_that_are_none(interval):
    with pytest.raises(ValueError, match="guidance_interval is"):
        limit_interval(7.5, np.array([0.5]), interval)


def test_parts_without_what_they_need():
    with pytest.raises(ValueError, match="projected needs unconditional"):
        Guidance(unconditional=False, projected=True, perturbed=True)
    with pytest.raises(ValueError, match="rescaled needs"):
        Guidance(unconditional=False, rescaled=True)
    for other in ({"unconditional": False}, {"projected": True}):
        with pytest.raises(ValueError, match="image needs unconditional, and does not go with projected"):
            Guidance(image=True, **other)


def test_an_image_and_an_instruction_have_scales_of_their_own():
    """With perturbed attention and rescaling, too; and conditions in the order of the rows."""
    guidance = Guidance(perturbed=True, rescaled=True, image=True)
    u, c, p = (part.astype(np.float64) for part in (UNCONDITIONAL, CONDITIONAL, PERTURBED))
    i = 0.3 * u - 0.6 * c
    rows = guidance_rows(guidance, u, c, i)
    np.testing.assert_array_equal(rows, interleave(u, i, c, c))
    np.testing.assert_array_equal(guidance_rows(guidance, u, c), interleave(u, u, c, c))

    def network(x, row, perturbed):
        return jnp.where(perturbed[:, None, None, None], interleave(p, p, p, p), rows)

    row = {"guidance_scale": SCALE, "image_guidance_scale": [1.5, 0.5, 2.0], "pag_scale": 2.0, "guidance_rescale": 0.4}
    assert set(guidance.strengths) == row.keys()
    got, _ = guided(network, guidance, "epsilon")(jnp.asarray(X), {k: jnp.float32(v) for k, v in row.items()}, ())
    want = u + column(SCALE) * (c - i) + column([1.5, 0.5, 2.0]) * (i - u) + 2 * (c - p)
    np.testing.assert_allclose(got, plain_rescale(want, c, 0.4), rtol=1e-4, atol=1e-4)


PLAIN, ALONE = Guidance(), Guidance(unconditional=False)
INSIDE = [0, 0, 1, 1, 0]  # evaluations of an interval
IN_AN_INTERVAL = {"guidance_scale": [4.0 if inside else 1.0 for inside in INSIDE]}
PERTURBED_THERE = {"pag_scale": [2.0 * inside for inside in INSIDE]}
PROJECTED = Guidance(projected=True)
OF_AN_IMAGE = Guidance(image=True)
EVERYTHING = Guidance(projected=True, perturbed=True, rescaled=True)
WHAT_IS_NEEDED = {
    "nothing": (ALONE, {}, [ALONE] * 5),
    "everywhere": (PLAIN, {"guidance_scale": 4.0}, [PLAIN] * 5),
    "nowhere": (PLAIN, {"guidance_scale": 1.0}, [ALONE] * 5),
    "an interval": (PLAIN, IN_AN_INTERVAL, [ALONE, ALONE, PLAIN, PLAIN, ALONE]),
    "perturbed": (
        Guidance(unconditional=False, perturbed=True),
        PERTURBED_THERE,
        [ALONE, ALONE, *[Guidance(unconditional=False, perturbed=True)] * 2, ALONE],
    ),
    "perturbed everywhere": (
        Guidance(perturbed=True, rescaled=True),
        IN_AN_INTERVAL | {"pag_scale": 2.0, "guidance_rescale": 0.5},
        [
            *[Guidance(unconditional=False, perturbed=True, rescaled=True)] * 2,
            *[Guidance(perturbed=True, rescaled=True)] * 2,
            Guidance(unconditional=False, perturbed=True, rescaled=True),
        ],
    ),
    "of an image": (
        OF_AN_IMAGE,
        IN_AN_INTERVAL | {"image_guidance_scale": [1.0, 1.5, 1.5, 1.0, 1.0]},
        [ALONE, *[OF_AN_IMAGE] * 3, ALONE],
    ),
    "rescaled": (
        Guidance(rescaled=True),
        IN_AN_INTERVAL | {"guidance_rescale": 0.5},
        [ALONE, ALONE, *[Guidance(rescaled=True)] * 2, ALONE],
    ),
    "projected": (PROJECTED, IN_AN_INTERVAL, [ALONE, ALONE, PROJECTED, PROJECTED, ALONE]),
    "with momentum": (PROJECTED, IN_AN_INTERVAL | {"apg_momentum": -0.5}, [*[PROJECTED] * 4, ALONE]),
    "everything": (
        EVERYTHING,
        IN_AN_INTERVAL | PERTURBED_THERE | {"apg_momentum": -0.5, "guidance_rescale": 0.5},
        [*[Guidance(projected=True, rescaled=True)] * 2, EVERYTHING, EVERYTHING, ALONE],
    ),
}


@pytest.mark.parametrize("name", WHAT_IS_NEEDED)
@pytest.mark.parametrize("scheduler", ["dpm++2m", "heun"])
def test_rows_that_count_for_nothing_are_left_out(name, scheduler):
    """Each evaluation has the rows that it needs, and the run is that with all rows in all of them.

    Heun's five evaluations are three steps, so that a step may be cut.
    """
    guidance, given, needed = WHAT_IS_NEEDED[name]
    solver = make_solver(scheduler, PUBLISHED_UNCLIP_SCHEDULER, 3 if scheduler == "heun" else 5)
    strengths = {"apg_eta": 0.5, "apg_threshold": 9.0, "apg_momentum": 0.0} | given
    strengths = {key: np.broadcast_to(np.float32(strengths[key]), 5) for key in guidance.strengths}
    assert guidance_by_call(guidance, strengths, solver.calls) == needed
    # One image of three for which a strength counts is enough.
    neutral = {"guidance_scale": 1.0, "image_guidance_scale": 1.0, "pag_scale": 0.0}
    by_image = {
        key: np.stack([value, np.full(5, neutral.get(key, value[0]), np.float32), value], axis=1)
        for key, value in strengths.items()
    }
    assert guidance_by_call(guidance, by_image, solver.calls) == needed

    noise = jnp.asarray(X[..., :4])
    columns = {key: jnp.asarray(value) for key, value in (dict(solver.grid) | by_image).items()}

    def denoise(guidance):
        shift = guidance_rows(guidance, *(jnp.full((3, 1, 1, 1), value) for value in (-0.4, 0.3, 0.1)))

        def network(x, row, perturbed):
            assert x.shape[0] == 3 * guidance.rows
            weight = 0.8 if perturbed is None else jnp.where(perturbed, 0.6, 0.8)[:, None, None, None]
            return jnp.tanh(weight * x + shift + row["timestep"] / 1000)

        return guided(network, guidance, solver.prediction_type)

    begun = start(solver, noise, guidance_state=guidance_state(guidance, noise))
    whole = run_stateful_steps(denoise(guidance), solver, begun, columns)
    carry = begun
    for form, calls in itertools.groupby(range(5), needed.__getitem__):
        first, *_ = numbers = list(calls)
        span = jnp.int32(first), jnp.int32(first + len(numbers))
        read = {key: value for key, value in columns.items() if key in (*solver.grid, *form.strengths)}
        carry = run_stateful_steps(denoise(form), solver, carry, read, span=span)
    for got, want in ((carry.latents, whole.latents), (carry.x0, whole.x0)):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def network(x, row, perturbed):
    """Rows differ, as they do with conditions."""
    shift = jnp.tile(jnp.array([-0.4, 0.3, 0.2]), x.shape[0] // 3)[:, None, None, None]
    return jnp.tanh(0.8 * x + shift + row["timestep"] / 1000)


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_guided_runs_may_be_cut_batched_and_rescaled(name):
    """Cut anywhere it is the same run; an image's neighbours do not matter; strengths compile nothing anew."""
    solver = make_solver(name, PUBLISHED_UNCLIP_SCHEDULER, 4, 0.0)
    noise, guidance = jnp.asarray(X[..., :4]), Guidance(projected=True, perturbed=True, rescaled=True)
    keys = jax.random.split(jax.random.key(0), 3)
    traces = []

    @jax.jit
    def run(carry, rows, keys):
        traces.append(1)
        return run_stateful_steps(guided(network, guidance, solver.prediction_type), solver, carry, rows, keys)

    def rows(momentum=-0.5, pag_scale=1.5):
        strengths = {"guidance_scale": 5, "apg_eta": 0.5, "apg_threshold": 9, "apg_momentum": momentum}
        strengths |= {"pag_scale": pag_scale, "guidance_rescale": 0.5}
        columns = {k: jnp.full(solver.calls, v, jnp.float32) for k, v in strengths.items()}
        return columns | {k: jnp.asarray(v) for k, v in solver.grid.items()}

    def begin(x):
        return start(solver, x, guidance_state=guidance_state(guidance, x))

    whole = run(begin(noise), rows(), keys)
    for other in (rows(momentum=0), rows(pag_scale=0)):
        assert np.abs(run(begin(noise), other, keys).latents - whole.latents).max() > 1e-2
    assert len(traces) == 1

    carry = begin(noise)
    for call in range(solver.calls):
        carry = run(carry, {k: v[call : call + 1] for k, v in rows().items()}, keys)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), carry, whole)
    alone = run(begin(noise[1:2]), rows(), keys[1:2])
    np.testing.assert_allclose(alone.latents, whole.latents[1:2], rtol=1e-5, atol=1e-5)


def test_plain_guidance_is_the_run_without_memory():
    solver = make_solver("dpm++2m", PUBLISHED_UNCLIP_SCHEDULER, 4, 0.0)
    noise = jnp.asarray(X[..., :4])
    columns = {k: jnp.asarray(v) for k, v in solver.grid.items()}
    columns["guidance_scale"] = jnp.full((solver.calls, 3), 4.0)

    def two(x, row, perturbed):
        return jnp.tanh(0.8 * x + jnp.tile(jnp.array([-0.4, 0.3]), 3)[:, None, None, None])

    plain = guided(two, Guidance(), solver.prediction_type)
    got = run_stateful_steps(plain, solver, start(solver, noise), columns).latents
    want = sample(lambda x, row: guide(two(interleave(x, x), row, None), jnp.float32(4)), solver, noise)
    np.testing.assert_array_equal(got, want)
