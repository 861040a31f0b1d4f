"""The tables of both layouts: bijective on any architecture, lossless both ways, complete on the published tensors."""

import dataclasses
from collections import defaultdict

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import engine
from convert.architecture.presets import PRESETS
from convert.random import TINY
from convert.readers import CheckpointError, TensorInfo
from convert.rules import diffusers, ldm
from tests.convert.lossless import ARCHITECTURES, TEXT_TO_IMAGE, assert_lossless, foreign_arrays, unets
from tests.golden_weights import GOLDEN, inventory
from unclip_jax.checkpoints.networks import abstract_networks, abstract_params
from unclip_jax.models.configs import VAEConfig


def table_and_params(layout, config):
    """The rules of a layout for an architecture, and the parameters that they are to fill."""
    params = abstract_params(config)
    if layout is ldm:  # the original keeps the statistics in a file of their own
        params = {name: spec for name, spec in params.items() if not name.startswith("image_normalizer.")}
    return layout.table(config, params).rules, params


# --- the tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [ldm, diffusers])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tables_are_bijective(architecture, layout):
    engine.prove(*table_and_params(layout, ARCHITECTURES[architecture]))


@pytest.mark.parametrize("layout", [ldm, diffusers])
@pytest.mark.parametrize(
    ("dtype", "architecture"), [(np.float16, "text-to-image"), (ml_dtypes.bfloat16, "tiny"), (np.float32, "upscaler")]
)
def test_import_and_export_are_lossless(architecture, layout, dtype):
    rules, params = table_and_params(layout, ARCHITECTURES[architecture])
    assert_lossless(rules, params, foreign_arrays(rules, params, dtype))


@st.composite
def vaes(draw):
    return VAEConfig(
        in_channels=draw(st.integers(1, 4)),
        latent_channels=draw(st.integers(1, 5)),
        block_out_channels=tuple(8 * c for c in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))),
        layers_per_block=draw(st.integers(1, 2)),
        norm_groups=4,
    )


@settings(max_examples=12)
@given(config=unets(), layout=st.sampled_from([ldm, diffusers]))
def test_tables_fit_any_unet(config, layout):
    assert_component("unet", dataclasses.replace(TEXT_TO_IMAGE, unet=config), layout)


@settings(max_examples=12)
@given(config=vaes(), layout=st.sampled_from([ldm, diffusers]))
def test_tables_fit_any_vae(config, layout):
    assert_component("vae", dataclasses.replace(TEXT_TO_IMAGE, vae=config), layout)


def assert_component(component, config, layout):
    params = {f"{component}.{name}": spec for name, spec in abstract_networks(config)[component].params.items()}
    rules = layout.table(config, params).rules
    engine.prove(rules, params)
    assert_lossless(rules, params, foreign_arrays(rules, params))


def test_prove_finds_mistakes():
    rules, params = table_and_params(ldm, TINY)
    first = rules[0]
    with pytest.raises(AssertionError, match="unfilled or unknown"):
        engine.prove(rules[1:], params)
    with pytest.raises(AssertionError, match="unfilled or unknown"):
        engine.prove([*rules, dataclasses.replace(first, ours="unet.no_such_layer.kernel")], params)
    with pytest.raises(AssertionError, match="filled twice"):
        engine.prove([*rules, first], params)
    with pytest.raises(AssertionError, match=r"parts \[0, 0\] of 1"):
        engine.prove([first, *(dataclasses.replace(r, foreign=first.foreign) for r in rules[1:2]), *rules[2:]], params)
    layered = next(rule for rule in rules if rule.layer == 0)
    with pytest.raises(AssertionError, match="unfilled or unknown"):
        engine.prove([rule for rule in rules if rule != layered], params)


# --- against the published tensors ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """Letter of the image encoder -> the published file's tensors, and what `check` wants beside them."""

    def arguments(which):
        config = PRESETS[f"sd21-unclip-{which}"]
        rules, params = table_and_params(ldm, config)
        return inventory(GOLDEN / "inventory" / f"v2-1-stable-unclip-{which}.tsv.gz"), rules, params, ldm.unused(config)

    return {which: arguments(which) for which in ("h", "l")}


@pytest.mark.parametrize("which", ["h", "l"])
def test_published_tensors_are_complete(published, which):
    tensors, rules, params, unused = published[which]
    report = engine.check(rules, params, tensors, unused)
    assert report.complete, str(report)
    assert str(report) == ""
    assert len(report.used) + len(report.unused) == len(tensors)
    reasons = defaultdict(list)
    for name, reason in report.unused.items():
        reasons[reason].append(name)
    # Of the text tower one block of twelve tensors, of its tail the projection and the temperature.
    assert {reason: len(names) for reason, names in reasons.items() if "text" in reason or "path" in reason} == {
        "the last text block: the penultimate layer's states are used": 12,
        "not part of the hidden states' path": 2,
        "the image embedder's text half": len([n for n in tensors if n.startswith("embedder") and "visual" not in n]),
    }
    assert not any(name.startswith((f"{ldm.UNET}.", f"{ldm.VAE}.")) for name in report.unused)


def test_moving_averages_are_known(published):
    _, rules, params, unused = published["h"]
    tensors = inventory(GOLDEN / "inventory" / "v2-1-stable-unclip-h-ema.tsv.gz")
    report = engine.check(rules, params, tensors, unused)
    assert report.complete, str(report)
    averages = [name for name in tensors if name.startswith("model_ema.")]
    # One a weight of the UNet, under its name without dots, and two counters.
    weights = {name.removeprefix("model.").replace(".", "") for name in tensors if name.startswith(f"{ldm.UNET}.")}
    assert {name.removeprefix("model_ema.") for name in averages} == weights | {"decay", "num_updates"}


@pytest.mark.parametrize("which", ["h", "l"])
def test_one_wrong_tensor_is_named(published, which):
    tensors, rules, params, unused = published[which]
    name = f"{ldm.UNET}.input_blocks.1.0.in_layers.2.weight"

    def report(change):
        found = engine.check(rules, params, change, unused)
        with pytest.raises(CheckpointError) as caught:
            engine.require_complete(found, "x.ckpt")
        assert str(caught.value) == f"x.ckpt: {found}"
        return str(found)

    missing = {key: info for key, info in tensors.items() if key != name}
    assert report(missing) == f"1 missing: {name} (320, 320, 3, 3)"
    misshapen = tensors | {name: TensorInfo((320, 320, 1, 3), np.dtype(np.float32))}
    assert report(misshapen) == f"1 misshapen: {name} has shape (320, 320, 1, 3), want (320, 320, 3, 3)"
    integers = tensors | {name: TensorInfo((320, 320, 3, 3), np.dtype(np.int64))}
    assert report(integers) == f"1 misshapen: {name} has dtype int64, want a floating one"
    unknown = tensors | {f"{name}.lora": TensorInfo((4,), np.dtype(np.float32))}
    assert report(unknown) == f"1 unknown: {name}.lora (4,)"
    assert "2 missing" in report({key: info for key, info in missing.items() if not key.endswith("out.2.bias")})
    assert "… (" in report({})  # many are counted, not listed


def test_linear_layers_may_be_kept_as_convolutions(published):
    """use_linear_in_transformer and 1x1 convolutions hold the same numbers."""
    tensors, rules, params, unused = published["h"]
    name = f"{ldm.UNET}.input_blocks.1.1.proj_in.weight"
    assert tensors[name].shape == (320, 320)
    changed = tensors | {name: TensorInfo((320, 320, 1, 1), np.dtype(np.float32))}
    assert engine.check(rules, params, changed, unused).complete
    one = [rule for rule in rules if rule.foreign == name]
    ours = {rule.ours: params[rule.ours] for rule in one}
    array = np.random.default_rng(0).standard_normal((320, 320, 1, 1), np.float32)
    (imported,) = engine.import_params(one, ours, changed, lambda name: array).values()
    np.testing.assert_array_equal(imported.read(), array[:, :, 0, 0].T)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("vae/encoder.mid_block.attentions.0.query.weight", "vae/encoder.mid_block.attentions.0.to_q.weight"),
        ("vae/decoder.mid_block.attentions.0.key.bias", "vae/decoder.mid_block.attentions.0.to_k.bias"),
        ("vae/decoder.mid_block.attentions.0.value.bias", "vae/decoder.mid_block.attentions.0.to_v.bias"),
        ("vae/decoder.mid_block.attentions.0.proj_attn.bias", "vae/decoder.mid_block.attentions.0.to_out.0.bias"),
        ("text_encoder/final_layer_norm.weight", "text_encoder/text_model.final_layer_norm.weight"),
        ("text_encoder/encoder.layers.0.mlp.fc1.bias", "text_encoder/text_model.encoder.layers.0.mlp.fc1.bias"),
        ("text_encoder/text_model.final_layer_norm.bias", "text_encoder/text_model.final_layer_norm.bias"),
        ("unet/mid_block.attentions.0.norm.bias", "unet/mid_block.attentions.0.norm.bias"),
    ],
)
def test_dialects_have_one_form(name, want):
    assert diffusers.canonical(name) == diffusers.canonical(want) == want
