"""Adapters in every form there is: read, written and read again bit for bit; what does not fit is refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from convert.adapters import METADATA, parameter, read_lora, read_textual_inversion
from convert.architecture.presets import PRESETS
from convert.export.lora import lora_tensors, save_lora
from convert.export.textual_inversion import save_textual_inversion
from convert.readers import CheckpointError
from convert.rules import lora as names
from tests.convert.adapter_files import CONFIG, GOOD, OURS, TO_K, kernels, pair, random_lora
from tests.convert.hostile_pickles import HOSTILE
from tests.convert.torch_files import mapping, storage, tensor, text, torch_bytes
from unclip_jax.adapters.changes import LowRank

FORMS = ("diffusers", "kohya", "original")
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
Q = "text_model.encoder.layers.1.self_attn.q_proj"


def assert_equal(read, lora):
    assert read.keys() == lora.keys()
    for name, change in lora.items():
        for got, want in zip(read[name], change, strict=True):
            want = np.asarray(want)
            assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes()), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@settings(max_examples=12)
@given(st.sampled_from(FORMS), st.integers(0, 2**31), st.sampled_from([0.1, 0.6, 1.0]), st.sampled_from(DTYPES))
def test_what_is_written_is_read_again(folder, form, seed, share, dtype):
    lora = random_lora(seed, share, dtype)
    path = save_lora(CONFIG, lora, folder / "a.safetensors", form)
    assert_equal(read_lora(path, CONFIG), lora)
    first = load_file(path)
    save_lora(CONFIG, read_lora(path, CONFIG), path, form)
    again = load_file(path)
    assert again.keys() == first.keys()
    assert all(again[name].tobytes() == value.tobytes() for name, value in first.items())


def test_query_key_and_value_of_one_adapter_are_written_fused(tmp_path):
    rng = np.random.default_rng(0)
    down, ups = rng.standard_normal((32, 2), np.float32), rng.standard_normal((3, 2, 32), np.float32)
    lora = {
        f"text_encoder.layers.0.{name}_proj.kernel": LowRank(down, up, np.float32(2))
        for name, up in zip("qkv", ups, strict=True)
    }
    path = save_lora(CONFIG, lora, tmp_path, "original")
    module = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj"
    found = load_file(path)
    assert {name: value.shape for name, value in found.items()} == {
        f"{module}.lora_A.weight": (2, 32),
        f"{module}.lora_B.weight": (96, 2),
    }
    assert_equal(read_lora(tmp_path, CONFIG), lora)
    # As peft calls it, whose adapter sits in the attention itself.
    save_file({name.replace(".in_proj", ""): value for name, value in found.items()}, path)
    assert_equal(read_lora(path, CONFIG), lora)


@pytest.mark.parametrize(
    ("down", "up", "ours"),
    [
        *(
            (f"{module}.{down}.weight", f"{module}.{up}.weight", OURS)
            for module in (f"unet.{TO_K}", TO_K, f"lora_unet_{TO_K.replace('.', '_')}")
            for down, up in (("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_down", "lora_up"))
        ),
        (f"unet.{TO_K}.lora_A.default.weight", f"unet.{TO_K}.lora_B.default.weight", OURS),
        *(
            (f"{prefix}.input_blocks.3.1.transformer_blocks.0.attn2.to_k.{down}.weight",
             f"{prefix}.input_blocks.3.1.transformer_blocks.0.attn2.to_k.{up}.weight", OURS)
            for prefix in ("model.diffusion_model", "diffusion_model")
            for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up"))
        ),
        ("lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
         "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k.lora_up.weight", OURS),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
         "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
         "unet.mid_block.attentions.0.attn1.to_out.kernel"),
        *(
            (f"{module}.{down}.weight", f"{module}.{up}.weight", "text_encoder.layers.1.q_proj.kernel")
            for module in (f"text_encoder.{Q}", f"text_encoder.{Q.removeprefix('text_model.')}",
                           f"lora_te_{Q.replace('.', '_')}", f"lora_te1_{Q.replace('.', '_')}")
            for down, up in (("lora_linear_layer.down", "lora_linear_layer.up"), ("lora_down", "lora_up"))
        ),
        ("text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.down.weight",
         "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.up.weight",
         "text_encoder.layers.1.q_proj.kernel"),
        ("cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.lora_A.weight",
         "cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.lora_B.weight",
         "text_encoder.layers.1.fc1.kernel"),
    ],
)  # fmt: skip
def test_names_of_every_tool_are_understood(tmp_path, down, up, ours):
    inner, out = kernels()[ours]
    a, b = np.ones((2, inner), np.float32), np.full((out, 2), 2, np.float16)
    alpha = down.split(".lora" if ".lora" in down else "_lora")[0] + ".alpha"
    for alphas in ({}, {alpha: np.float16(0.5)} if "processor" not in down and "_lora.down" not in down else {}):
        save_file({down: a, up: b, **{k: np.array(v) for k, v in alphas.items()}}, tmp_path / "a.safetensors")
        ((name, change),) = read_lora(tmp_path / "a.safetensors", CONFIG).items()
        assert name == ours
        assert (change.down.shape, change.up.shape) == ((inner, 2), (2, out))
        assert (change.down.dtype, change.up.dtype) == (np.float32, np.float16)
        assert change.alpha == (0.5 if alphas else 2)


def test_names_of_a_published_checkpoint():
    modules = names.read(PRESETS["768-v"])
    for name, ours in {
        "lora_unet_input_blocks_1_1_proj_in": "unet.down_blocks.0.attentions.0.proj_in.kernel",
        "lora_unet_output_blocks_11_0_skip_connection": "unet.up_blocks.3.resnets.2.conv_shortcut.kernel",
        "lora_unet_up_blocks_3_resnets_2_conv_shortcut": "unet.up_blocks.3.resnets.2.conv_shortcut.kernel",
        "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.resample.kernel",
        "lora_te_text_model_encoder_layers_22_mlp_fc2": "text_encoder.layers.22.fc2.kernel",
    }.items():
        assert [parameter(rule) for rule in modules[names.find(name, modules)].weight] == [ours]
    # Of which the family reads no more.
    assert modules[names.find("lora_te_text_model_encoder_layers_23_mlp_fc2", modules)] == names.Module()
    held = {parameter(rule) for module in modules.values() for rule in module.weight}
    assert len(held & kernels(PRESETS["768-v"]).keys()) == len(kernels(PRESETS["768-v"]))  # no name stands for two


def test_the_last_text_layer_is_left_out_and_a_convolution_may_be_a_linear_layer(tmp_path):
    lora = random_lora(0, 0.3)
    tensors, _ = lora_tensors(CONFIG, lora, "kohya")
    extra = {f"lora_te_text_model_encoder_layers_2_mlp_fc1.lora_{end}.weight": np.ones((2, 2), np.float32)
             for end in ("down", "up")}  # fmt: skip
    wide = {name: v[:, :, None, None] if v.ndim == 2 else v for name, v in tensors.items()}
    save_file({n: np.ascontiguousarray(v) for n, v in {**wide, **extra}.items()}, tmp_path / "a.safetensors")
    assert_equal(read_lora(tmp_path / "a.safetensors", CONFIG), lora)


FLAT = TO_K.replace(".", "_")
DOWN = f"unet.{TO_K}.lora_A.weight"
PEFT = {"unet.r": 2, "unet.lora_alpha": 2}
BROKEN = {
    "of Stable Diffusion 1": (pair(f"unet.{TO_K}", 768), ["lora_A", "(2, 768)", "Stable Diffusion 1"]),
    "of Stable Diffusion XL": (
        pair(f"unet.{TO_K}", 2048) | pair("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"),
        ["(2, 2048)", "Stable Diffusion XL"],
    ),
    "another text encoder": (pair(f"text_encoder.{Q}", 768, 768), ["(2, 768)", "another base model"]),
    "a second text encoder": (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), ["no such module", "lora_te2"]),
    "another width": (pair(f"unet.{TO_K}", out=48), ["lora_B", "(48, 2)", "(32, 2)"]),
    "ranks that differ": (
        GOOD | {f"unet.{TO_K}.lora_B.weight": np.ones((32, 3), np.float32)},
        ["lora_B", "(32, 3)", "want (32, 2)"],
    ),
    "a rank of 0": (pair(f"unet.{TO_K}", rank=0), ["rank of 0"]),
    "a scalar": (GOOD | {DOWN: np.float32(1)}, ["rank of 0"]),
    "half a pair": ({DOWN: GOOD[DOWN]}, ["up factor is missing"]),
    "alpha alone": ({f"unet.{TO_K}.alpha": np.float32(1)}, ["factor is missing"]),
    "unknown layers": (GOOD | pair("unet.down_blocks.7.x.to_k"), ["down_blocks.7", "and 1 more"]),
    "whole weights": ({f"{TO_K}.weight": GOOD[DOWN]}, ["not a name of a LoRA"]),
    "no role": ({f"{TO_K}.kernel": GOOD[DOWN]}, ["not a name of a LoRA"]),
    "twice": (GOOD | pair(f"lora_unet_{TO_K.replace('.', '_')}"), ["there twice"]),
    "twice by two ends": (
        GOOD | pair(f"unet.{TO_K}", ends=("lora.down.weight", "lora.up.weight")),
        ["there twice"],
    ),
    "integers": (GOOD | {DOWN: np.ones((2, 32), np.int32)}, ["int32", "floating"]),
    "two alphas": (GOOD | {f"unet.{TO_K}.alpha": np.ones(2, np.float32)}, ["alpha", "one number"]),
    "an infinite alpha": (GOOD | {f"unet.{TO_K}.alpha": np.float32(np.inf)}, ["alpha is inf"]),
    "DoRA of another model": (
        GOOD | {f"unet.{TO_K}.lora_magnitude_vector": np.ones(48, np.float32)},
        ["lora_magnitude_vector", "(48,)", "want 32"],
    ),
    "DoRA alone": ({f"unet.{TO_K}.lora_magnitude_vector": np.ones(32, np.float32)}, ["down factor is missing"]),
    "DoRA without magnitudes": (GOOD, ["use_dora", "no magnitude"], json.dumps(PEFT | {"unet.use_dora": True})),
    "a part of LoHa": ({"lora_unet_conv_in.hada_w1_a": GOOD[DOWN]}, ["LoHa", "hada_w1_b factor is missing"]),
    "LoHa of another model": (
        {
            f"lora_unet_{FLAT}.hada_w{n}_{e}": np.ones((32, 2) if e == "a" else (2, 768), np.float32)
            for n in "12"
            for e in "ab"
        },
        ["hada_w1_b", "(2, 768)", "Stable Diffusion 1"],
    ),
    "a part of LoKr": ({"lora_unet_conv_in.lokr_w1": np.ones((2, 2), np.float32)}, ["lokr_w2_a factor is missing"]),
    "LoKr of no factors": ({"lora_unet_conv_in.lokr_w1": np.ones((5, 2), np.float32)}, ["no multiple of (5, 2)"]),
    "LoKr that is empty": ({"lora_unet_conv_in.lokr_w1": np.ones((0, 2), np.float32)}, ["(0, 2)"]),
    "Tucker without factors": ({"lora_unet_conv_in.lora_mid.weight": GOOD[DOWN]}, ["down factor is missing"]),
    "Tucker of another kernel": (
        pair("lora_unet_conv_in", 4, 32, ends=("lora_down.weight", "lora_up.weight"))
        | {"lora_unet_conv_in.lora_mid.weight": np.ones((2, 2, 5, 5), np.float32)},
        ["lora_mid", "(2, 2, 5, 5)", "want (2, 2, 3, 3)"],
    ),
    "a bias of a layer without": (GOOD | {f"unet.{TO_K}.lora_B.bias": np.ones(32, np.float32)}, ["a bias", "none"]),
    "two kinds at once": (GOOD | {f"unet.{TO_K}.diff": np.ones((32, 32), np.float32)}, ["diff", "stands beside LoRA"]),
    "a difference of another shape": ({f"unet.{TO_K}.diff": np.ones((32, 48), np.float32)}, ["(32, 48)"]),
    "(IA)^3 without its side": ({f"lora_unet_{FLAT}.weight": np.ones(32, np.float32)}, ["a whole weight"]),
    "(IA)^3 of another size": (
        {f"lora_unet_{FLAT}.weight": np.ones(48, np.float32), f"lora_unet_{FLAT}.on_input": np.int64(0)},
        ["(48,)", "want 32"],
    ),
    "(IA)^3 of which side": (
        {"unet.mid_block.resnets.0.conv1.ia3_l": np.ones((1, 32, 1, 1), np.float32)},
        ["of the inputs or of the outputs"],
    ),
    "LoRA of a norm": (pair("unet.conv_norm_out"), ["LoRA of a layer that has no kernel"]),
    "OFT": ({"lora_unet_conv_in.oft_blocks": np.ones((2, 4, 4), np.float32)}, ["OFT"]),
    "BOFT": ({"base_model.model.conv_in.boft_R": np.ones((2, 4, 4), np.float32)}, ["BOFT"]),
    "GLoRA": ({"lora_unet_conv_in.a1.weight": GOOD[DOWN]}, ["GLoRA"]),
    "VeRA": ({"base_model.model.conv_in.vera_lambda_b": GOOD[DOWN]}, ["VeRA"]),
    "AdaLoRA": ({"base_model.model.conv_in.lora_E": GOOD[DOWN]}, ["AdaLoRA"]),
    "a bundled word of another model": (
        GOOD | {"bundle_emb.cat.string_to_param.*": np.ones((1, 768), np.float32)},
        ["'cat'", "Stable Diffusion 1"],
    ),
    "a bundled word twice": (
        GOOD | {f"bundle_emb.cat.{end}": np.ones((1, 32), np.float32) for end in ("clip_h", "emb_params")},
        ["twice", "bundle_emb.cat.clip_h"],
    ),
    "numbered, of another model": (
        {f"unet:0:{end}": np.ones(shape, np.float32) for end, shape in (("up", (32, 2)), ("down", (2, 48)))},
        ["1 pairs of factors", "do not fit"],
    ),
    "numbered with a gap": ({"unet:1:up": GOOD[DOWN], "unet:1:down": GOOD[DOWN]}, ["unet:0", "missing"]),
    "numbered of another network": ({"vae:0:up": GOOD[DOWN], "vae:0:down": GOOD[DOWN]}, ["'vae'", "known: unet"]),
    "a long name": ({"x." * 400: GOOD[DOWN]}, ["800 characters"]),
    "line breaks": ({"a\nb.lora_A.weight": GOOD[DOWN], "a\nb.lora_B.weight": GOOD[DOWN]}, [r"a\nb"]),
    "metadata of no JSON": (GOOD, ["JSON"], "{"),
    "metadata of a list": (GOOD, [METADATA, "object"], "[]"),
    "a pattern that is code": (GOOD, ["alpha_pattern"], json.dumps(PEFT | {"unet.alpha_pattern": {"(a+)+$": 1}})),
    "patterns that are none": (GOOD, ["alpha_pattern"], json.dumps(PEFT | {"unet.alpha_pattern": [1]})),
    "alpha that is text": (GOOD, ["lora_alpha", "number"], json.dumps(PEFT | {"unet.lora_alpha": "1"})),
    "nothing that is run": (pair("text_encoder.text_model.encoder.layers.2.mlp.fc1"), ["no adapter"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_by_name(tmp_path, case):
    tensors, words, *metadata = BROKEN[case]
    path = tmp_path / "a.safetensors"
    save_file(
        {name: np.asarray(value) for name, value in tensors.items()},
        path,
        {METADATA: metadata[0]} if metadata else None,
    )
    with pytest.raises(CheckpointError) as caught:
        read_lora(path, CONFIG)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 500
    assert not [word for word in words if word not in message], message


def test_pefts_settings(tmp_path):
    settings_ = {"unet.r": 4, "unet.lora_alpha": 3, "unet.alpha_pattern": {"conv_in": 9, "attn2.to_k": 5, "to_k": 6}}
    save_file(GOOD, tmp_path / "a.safetensors", {METADATA: json.dumps(settings_)})
    for changes, alpha in (
        ({}, 5),
        ({"unet.alpha_pattern": {}}, 3),
        ({"unet.alpha_pattern": {f"^{TO_K}": 7, "to_k": 6}}, 7),
        ({"unet.alpha_pattern": {"^to_k": 6, "o_k": 1}}, 3),
        ({"unet.alpha_pattern": None, "unet.lora_alpha": 2.5, "unet.use_rslora": True}, 2.5 * 2**0.5),
    ):
        save_file(GOOD, tmp_path / "a.safetensors", {METADATA: json.dumps(settings_ | changes)})
        assert read_lora(tmp_path / "a.safetensors", CONFIG)[OURS].alpha == np.float32(alpha)


@pytest.mark.parametrize("case", ["os.system", "eval", "stack global"])
@pytest.mark.parametrize("reader", [read_lora, read_textual_inversion])
def test_hostile_pickles_of_adapters_are_refused(tmp_path, case, reader):
    path = tmp_path / "a.bin"
    path.write_bytes(torch_bytes(HOSTILE[case][0]))
    with pytest.raises(CheckpointError, match=r"refused|do not need") as caught:
        reader(path, CONFIG)
    assert str(caught.value).count(str(path)) == 1


def test_a_file_of_torch(tmp_path):
    """Its arrays stay what they were when the file is written over."""
    path = tmp_path / "pytorch_lora_weights.bin"
    a, b = np.arange(64, dtype=np.float32), np.arange(64, 128, dtype=np.float32)
    module = f"unet.{TO_K}"
    code = {f"{module}.lora.down.weight": tensor(storage(key="0", size=64), shape=(2, 32), strides=(32, 1)),
            f"{module}.lora.up.weight": tensor(storage(key="1", size=64), shape=(32, 2), strides=(2, 1))}  # fmt: skip
    path.write_bytes(torch_bytes(mapping(code), {"0": a.tobytes(), "1": b.tobytes()}))
    change = read_lora(tmp_path, CONFIG)[OURS]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    np.testing.assert_array_equal(change.down, a.reshape(2, 32).T)
    np.testing.assert_array_equal(change.up, b.reshape(32, 2).T)


def test_writing_refuses_what_the_checkpoint_does_not_have(tmp_path):
    (name, change), *_ = random_lora(0).items()
    with pytest.raises(ValueError, match=r"unet\.other\.kernel"):
        save_lora(CONFIG, {name: change, "unet.other.kernel": change}, tmp_path)
    with pytest.raises(ValueError, match="form is 'comfy'; accepted: diffusers, kohya, original"):
        save_lora(CONFIG, {name: change}, tmp_path, "comfy")
    with pytest.raises(ValueError, match="of nothing"):
        save_lora(CONFIG, {}, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="holds none of pytorch_lora_weights"):
        read_lora(tmp_path, CONFIG)


def test_a_file_of_a_folder_by_its_name(tmp_path):
    (name, change), *_ = random_lora(0).items()
    path = save_lora(CONFIG, {name: change}, tmp_path)
    path.rename(tmp_path / "cat.safetensors")
    assert read_lora(tmp_path, CONFIG, "cat.safetensors").keys() == {name}
    with pytest.raises(FileNotFoundError, match=r"holds none of dog\.safetensors"):
        read_lora(tmp_path, CONFIG, "dog.safetensors")
    with pytest.raises(ValueError, match=r"weight_name is 'x', but .* is not a folder"):
        read_lora(tmp_path / "cat.safetensors", CONFIG, "x")


# --- learnt words ----------------------------------------------------------------------------------------------------

ROWS = np.random.default_rng(0).standard_normal((3, 32), np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_words_are_written_and_read_again(tmp_path, dtype):
    rows = ROWS.astype(dtype)
    for form, word in (("diffusers", "<my/cat>"), ("a1111", "my-cat")):
        path = save_textual_inversion(word, rows, tmp_path, form)
        ((got, values),) = read_textual_inversion(path, CONFIG).items()
        assert (got, values.dtype, values.tobytes()) == (word, rows.dtype, rows.tobytes())
    assert read_textual_inversion(tmp_path, CONFIG, "other").keys() == {"other"}
    with pytest.raises(ValueError, match="the file's name is the word"):
        save_textual_inversion("<my/cat>", rows, tmp_path, "a1111")


def test_words_in_files_of_torch(tmp_path):
    rows = tensor(storage(size=96), shape=(3, 32), strides=(32, 1))
    path = tmp_path / "stem.pt"
    for code, word in (
        (mapping({"string_to_param": mapping({"*": rows}), "name": text("cat")}), "cat"),
        (mapping({"string_to_param": mapping({"*": rows}), "step": text("5")}), "stem"),
        (mapping({"<dog>": rows}), "<dog>"),
        (rows, "stem"),
    ):
        path.write_bytes(torch_bytes(code, {"0": ROWS.tobytes()}))
        ((got, values),) = read_textual_inversion(path, CONFIG).items()
        assert got == word
        np.testing.assert_array_equal(values, ROWS)
    path.write_bytes(torch_bytes(mapping({"string_to_param": mapping({"*": text("x")})}), {}))
    with pytest.raises(CheckpointError, match="something else than a tensor"):
        read_textual_inversion(path, CONFIG)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"<x>": np.ones((2, 768), np.float32)}, ["(2, 768)", "(vectors, 32)", "Stable Diffusion 1"]),
        ({"<x>": np.ones((0, 32), np.float32)}, ["(0, 32)"]),
        ({"<x>": np.float32(1)}, ["shape ()"]),
        ({"<x>": np.ones((2, 32), np.int64)}, ["int64"]),
        ({"a word": ROWS}, ["'a word'", "token"]),
        ({"w" * 1000: ROWS}, ["token"]),
        ({"clip_l": ROWS, "clip_g": ROWS}, ["two text encoders"]),
        ({"<a>": ROWS, "<b>": ROWS}, ["not a textual inversion"]),
    ],
)
def test_words_that_do_not_fit(tmp_path, tensors, words):
    path = tmp_path / "a.safetensors"
    save_file({name: np.asarray(value) for name, value in tensors.items()}, path)
    with pytest.raises(CheckpointError) as caught:
        read_textual_inversion(path, CONFIG)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 400
    assert not [word for word in words if word not in message], message
