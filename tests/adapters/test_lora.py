"""Adapters change what they say and no more, merged and on the fly alike, and go again exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unclip_jax.adapters.lora import LowRank, merge_loras, with_lora
from unclip_jax.checkpoints.networks import Network, part


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


PARAMS = {"conv.kernel": normal(3, 3, 4, 6), "linear.kernel": normal(4, 6), "layers.q.kernel": normal(3, 4, 5)}
PARAMS |= {"linear.bias": normal(6), "layers.q.bias": normal(3, 5)}
FIRST = {
    "conv.kernel": LowRank(normal(3, 3, 4, 2), normal(2, 6), np.float32(3)),
    "layers.0.q.kernel": LowRank(normal(4, 2), normal(2, 5), np.float32(2)),
    "layers.2.q.kernel": LowRank(normal(4, 3), normal(3, 5), np.float32(1)),
}
SECOND = {
    "conv.kernel": LowRank(normal(3, 3, 4, 1, seed=1), normal(1, 6, seed=1), np.float32(1)),
    "linear.kernel": LowRank(normal(4, 4, seed=1).astype(np.float16), normal(4, 6, seed=1), np.float32(-2)),
    "layers.2.q.kernel": LowRank(normal(4, 1, seed=1), normal(1, 5, seed=1), np.float32(1)),
}


def changed(params, loras, scales):
    """The definition, in float64."""
    out = {name: np.asarray(value, np.float64) for name, value in params.items()}
    for lora, scale in zip(loras, scales, strict=True):
        for name, (down, up, alpha) in lora.items():
            change = scale * float(alpha) / down.shape[-1] * np.tensordot(down.astype(float), up.astype(float), 1)
            target = out["layers.q.kernel"][int(name[7])] if name.startswith("layers.") else out[name]
            target += change
    return out


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.7, -0.4)])
def test_the_change_is_the_sum_of_the_products(scales):
    params = {name: jnp.asarray(value) for name, value in PARAMS.items()}
    got, want = with_lora(params, [FIRST, SECOND], scales), changed(PARAMS, [FIRST, SECOND], scales)
    assert got.keys() == want.keys()
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-5, atol=1e-5)
    assert got["linear.bias"] is params["linear.bias"]
    np.testing.assert_array_equal(got["layers.q.kernel"][1], PARAMS["layers.q.kernel"][1])


def test_on_the_fly_is_what_is_merged_and_no_scale_compiles_anew():
    traces = []

    @jax.jit
    def program(params, loras, scales):
        traces.append(None)
        return with_lora(params, loras, scales)

    for scales in ((1.0, 0.5), (0.0, -2.0), (3.0, 1e-3)):
        merged = with_lora(PARAMS, [FIRST, SECOND], scales)
        for name, value in program(PARAMS, [FIRST, SECOND], list(scales)).items():
            np.testing.assert_allclose(value, merged[name], rtol=1e-6, atol=1e-6)
    assert len(traces) == 1
    other = {name: LowRank(change.down, change.up, np.float32(9)) for name, change in FIRST.items()}
    program(PARAMS, [other, SECOND], [1.0, 1.0])
    assert len(traces) == 1  # another adapter of the same shapes is another argument


def test_half_precision_is_rounded_once():
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in PARAMS.items()}
    got = with_lora(params, [FIRST, SECOND], [1.0, 0.5])
    for name, value in changed(
        {k: np.asarray(v, np.float32) for k, v in params.items()}, [FIRST, SECOND], [1, 0.5]
    ).items():
        assert got[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got[name], np.float32), value, rtol=2**-8, atol=1e-6)


def networks():
    mesh = jax.make_mesh((2,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    unet = {name: jax.device_put(value, sharding) for name, value in PARAMS.items()}
    text = {"x.kernel": jnp.asarray(normal(4, 4))}
    graph = nnx.graphdef(nnx.Dict())
    return {"unet": Network(graph, unet), "text_encoder": Network(graph, text)}


def test_merging_into_a_pipelines_networks():
    base = networks()
    before = {name: np.asarray(value) for name, value in base["unet"].params.items()}
    lora = {f"unet.{name}": change for name, change in FIRST.items()}
    merged = merge_loras(base, [lora, lora], [1.0, -0.5])
    assert merged["text_encoder"] is base["text_encoder"]
    for name, want in changed(PARAMS, [part(lora, "unet")], [0.5]).items():
        value = merged["unet"].params[name]
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5)
        assert value.sharding == base["unet"].params[name].sharding
    for name, value in base["unet"].params.items():  # what is kept for the way back
        np.testing.assert_array_equal(value, before[name])
    nothing = merge_loras(base, [lora], [0.0])
    assert nothing["unet"] is base["unet"]


def test_what_does_not_fit_is_refused_by_name():
    change = FIRST["layers.0.q.kernel"]
    for lora, words in (
        ({"other.kernel": change}, r"adapter of other\.kernel, \(4, 5\): this network has no such parameter"),
        ({"linear.kernel": change}, r"linear\.kernel, \(4, 5\): this network has shape \(4, 6\)"),
        ({"layers.3.q.kernel": change}, r"layers\.3\.q\.kernel.*shape \(3, 4, 5\)"),
        ({"layers.q.kernel": change}, r"layers\.q\.kernel"),
        ({"layers.0.q.kernel": change._replace(down=normal(4, 3))}, "differ in rank"),
    ):
        with pytest.raises(ValueError, match=words):
            with_lora(PARAMS, [lora], [1.0])
    with pytest.raises(ValueError, match="scales has 1 entries for 2 adapters"):
        with_lora(PARAMS, [FIRST, SECOND], [1.0])
    with pytest.raises(ValueError, match="weight is nan"):
        merge_loras(networks(), [FIRST], [float("nan")])
    with pytest.raises(ValueError, match=r"adapter of vae: want one of unet, text_encoder"):
        merge_loras(networks(), [{"vae.x.kernel": change}], [1.0])
