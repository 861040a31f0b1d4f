"""Every kind of change by its definition, in float64, of linear layers, convolutions, fused and stacked kernels."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.adapters import parameter, read_adapter, read_lora, read_textual_inversion
from convert.engine import LAYOUTS, foreign_shape
from convert.readers import CheckpointError
from convert.rules import lora as names
from tests.convert.adapter_files import CONFIG, GOOD, OURS, TO_K, pair
from tests.convert.torch_files import mapping, storage, tensor, text, torch_bytes
from unclip_jax.adapters.lora import with_lora
from unclip_jax.checkpoints.networks import abstract_params

PARAMS = abstract_params(CONFIG)
MODULES = names.read(CONFIG)
LAYERS = {
    "linear": "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "convolution": "unet.down_blocks.1.resnets.0.conv1",
    "of one": "unet.up_blocks.0.resnets.0.conv_shortcut",
    "stacked": "text_encoder.text_model.encoder.layers.1.mlp.fc1",
    "fused": "cond_stage_model.model.transformer.resblocks.1.attn.in_proj",
}


def draw(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def low_rank(rng, shape, rank=3):
    down, up = draw(rng, rank, *shape[1:]), draw(rng, shape[0], rank)
    return {"lora_down.weight": down, "lora_up.weight": up}, np.einsum("or,r...->o...", up, down.astype(float)) / rank


def lora(rng, shape):
    tensors, delta = low_rank(rng, shape)
    return tensors | {"alpha": np.float32(2)}, lambda base: 2 * delta


def scaled(rng, shape):
    tensors, delta = low_rank(rng, shape)
    return tensors | {"alpha": np.float16(2), "scalar": np.float32(-0.5)}, lambda base: -delta


def tucker(rng, shape):
    down, up, core = draw(rng, 2, shape[1]), draw(rng, shape[0], 2), draw(rng, 2, 2, *shape[2:])
    delta = np.einsum("pq...,op,qi->oi...", core.astype(float), up, down)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": core, "alpha": np.float32(3)}
    return tensors, lambda base: 1.5 * delta


def dora(rng, shape):
    tensors, delta = low_rank(rng, shape)
    magnitude = draw(rng, shape[0], *(1 for _ in shape[1:]))

    def change(base):
        whole = base + 3 * delta
        length = np.sqrt((whole**2).sum(tuple(range(1, whole.ndim)), keepdims=True))
        return magnitude * whole / length - base

    return tensors | {"dora_scale": magnitude}, change


def dora_by_inputs(rng, shape):
    tensors, delta = low_rank(rng, shape)
    magnitude = draw(rng, 1, shape[1], *(1 for _ in shape[2:]))

    def change(base):
        whole = base + 3 * delta
        length = np.sqrt((whole**2).sum((0, *range(2, whole.ndim)), keepdims=True))
        return magnitude * whole / length - base

    return tensors | {"dora_scale": magnitude}, change


def loha(rng, shape):
    inner = int(np.prod(shape[1:]))
    tensors = {f"hada_w{n}_{e}": draw(rng, *((shape[0], 2) if e == "a" else (2, inner))) for n in "12" for e in "ab"}
    a, b, c, d = (value.astype(float) for value in tensors.values())
    return tensors | {"alpha": np.float32(3)}, lambda base: 1.5 * ((a @ b) * (c @ d)).reshape(shape)


def loha_tucker(rng, shape):
    tensors = {f"hada_w{n}_{e}": draw(rng, 2, shape["ab".index(e)]) for n in "12" for e in "ab"}
    tensors |= {f"hada_t{n}": draw(rng, 2, 2, *shape[2:]) for n in "12"}

    def half(n):
        return np.einsum("ij...,jr,ip->pr...", tensors[f"hada_t{n}"].astype(float), tensors[f"hada_w{n}_b"],
                         tensors[f"hada_w{n}_a"])  # fmt: skip

    return dict(tensors), lambda base: half(1) * half(2)


def lokr(rng, shape):
    left, right = draw(rng, 4, 2), draw(rng, shape[0] // 4, shape[1] // 2, *shape[2:])
    # Of two whole factors no alpha counts.
    tensors = {"lokr_w1": left, "lokr_w2": right, "alpha": np.float32(1000)}
    delta = np.stack([np.kron(left, part) for part in np.moveaxis(right.reshape(*right.shape[:2], -1), 2, 0)], -1)
    return tensors, lambda base: delta.reshape(shape)


def lokr_factored(rng, shape):
    a, b = draw(rng, 4, 3), draw(rng, 3, 2)
    c, d = draw(rng, shape[0] // 4, 3), draw(rng, 3, shape[1] // 2 * int(np.prod(shape[2:])))
    right = (c.astype(float) @ d).reshape(shape[0] // 4, shape[1] // 2, -1)
    delta = np.stack([np.kron(a @ b, right[..., index]) for index in range(right.shape[2])], -1).reshape(shape)
    tensors = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d, "alpha": np.float32(6)}
    return tensors, lambda base: 2 * delta


def lokr_tucker(rng, shape):
    left, core = draw(rng, 4, 2), draw(rng, 3, 3, *shape[2:])
    a, b = draw(rng, 3, shape[0] // 4), draw(rng, 3, shape[1] // 2)
    right = np.einsum("ij...,jr,ip->pr...", core.astype(float), b, a).reshape(shape[0] // 4, shape[1] // 2, -1)
    delta = np.stack([np.kron(left, right[..., index]) for index in range(right.shape[2])], -1).reshape(shape)
    return {"lokr_w1": left, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core, "scalar": np.float32(2)}, (
        lambda base: 2 * delta
    )


def ia3(rng, shape):
    vector = draw(rng, shape[0])
    return {"weight": vector, "on_input": np.int64(0)}, lambda base: base * vector.reshape(-1, *(1 for _ in shape[1:]))


def ia3_on_input(rng, shape):
    vector = draw(rng, 1, shape[1], *(1 for _ in shape[2:]))
    return {"weight": vector, "on_input": np.int64(1)}, lambda base: base * vector


def difference(rng, shape):
    value = draw(rng, *shape)
    return {"diff": value}, lambda base: value


def replacement(rng, shape):
    value = draw(rng, *shape)
    return {"set_weight": value}, lambda base: value - base


KINDS = [lora, scaled, tucker, dora, dora_by_inputs, loha, loha_tucker, lokr, lokr_factored, lokr_tucker, ia3,
         ia3_on_input, difference, replacement]  # fmt: skip


def read(path, tensors, metadata=None):
    save_file({name: np.asarray(value) for name, value in tensors.items()}, path / "a.safetensors", metadata)
    return read_lora(path / "a.safetensors", CONFIG)


def ours(rules, whole):
    """A foreign array, or its parts, in our layout, by our names."""
    parts = np.split(whole, rules[0].parts)
    return {parameter(rule): LAYOUTS[rule.layout].ours(parts[rule.part]) for rule in rules}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_a_kind_changes(tmp_path, kind, layer):
    rng = np.random.default_rng(0)
    rules = MODULES[names.find(LAYERS[layer], MODULES)].weight
    shape = foreign_shape(rules[0], PARAMS)
    tensors, change = kind(rng, shape)
    file = {f"{LAYERS[layer]}.{end}": value for end, value in tensors.items()}
    if kind is dora_by_inputs and layer == "fused":
        with pytest.raises(CheckpointError, match="of a fused layer"):
            read(tmp_path, file)
        return
    base = draw(rng, *shape)
    want, start = ours(rules, change(base.astype(float))), ours(rules, base)
    found = read(tmp_path, file)
    assert found.keys() == want.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value.delta(start[name]), want[name], rtol=1e-4, atol=1e-4)
    if layer not in ("linear", "stacked"):
        return
    # A scale multiplies all that is added, of every kind; within a stacked parameter as without.
    for name, value in found.items():
        plain = name.replace(".layers.1.", ".layers.")
        stacked = np.stack([0 * start[name], start[name]]) if plain != name else start[name]
        got = with_lora({plain: stacked}, [{name: value}], [-0.5])[plain]
        got = got[1] if plain != name else got
        np.testing.assert_allclose(got, start[name] - 0.5 * want[name], rtol=1e-4, atol=1e-4)


def test_biases_and_norms(tmp_path):
    rng = np.random.default_rng(0)
    bias, norm, shift, part = (draw(rng, 32) for _ in range(4))
    file = {"lora_unet_conv_in.diff_b": bias, "lora_unet_conv_norm_out.w_norm": norm}
    file |= {"lora_unet_conv_norm_out.b_norm": shift}
    file |= pair("unet.mid_block.resnets.0.time_emb_proj", 128, 32)
    file |= {"unet.mid_block.resnets.0.time_emb_proj.lora_B.bias": part}
    file |= {"unet.mid_block.resnets.0.time_emb_proj.alpha": np.float32(6)}
    file |= {"cond_stage_model.model.transformer.resblocks.0.attn.diff_b": np.arange(96, dtype=np.float32)}
    found = read(tmp_path, file)
    zeros = np.zeros(32)
    for name, want in {
        "unet.conv_in.bias": bias,
        "unet.conv_norm_out.scale": norm,
        "unet.conv_norm_out.bias": shift,
        "unet.mid_block.resnets.0.time_emb_proj.bias": 3 * part,  # alpha is 6, the rank 2
        "text_encoder.layers.0.k_proj.bias": np.arange(32, 64),
    }.items():
        np.testing.assert_allclose(found[name].delta(zeros), want, rtol=1e-6)
    assert len(found) == 8


def test_embeddings(tmp_path):
    """LoRA of the token table, and a whole difference of the positions."""
    rng = np.random.default_rng(0)
    vocabulary = PARAMS["text_encoder.token_embedding.embedding"].shape[0]
    down, up = draw(rng, 2, vocabulary), draw(rng, 32, 2)
    file = {f"text_encoder.text_model.embeddings.token_embedding.lora_embedding_{end}": value
            for end, value in (("A", down), ("B", up))}  # fmt: skip
    positions = draw(rng, *PARAMS["text_encoder.position_embedding.embedding"].shape)
    file |= {"clip_h.transformer.text_model.embeddings.position_embedding.diff": positions}
    found = read(tmp_path, file)
    got = found["text_encoder.token_embedding.embedding"].delta(np.zeros((vocabulary, 32)))
    np.testing.assert_allclose(got, (up @ down).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["text_encoder.position_embedding.embedding"].delta(positions), positions)


Q = "text_encoder.layers.1.q_proj.kernel"
TEXT_PREFIXES = ("text_encoder.text_model.", "text_encoder.", "text_encoders.clip_h.transformer.text_model.",
                 "clip_h.transformer.text_model.", "clip_h.text_model.", "clip_l.text_model.", "lora_te.text_model.",
                 "lora_te1.text_model.", "lora_clip_l.text_model.", "cond_stage_model.transformer.text_model.",
                 "base_model.model.text_model.", "base_model.model.", "text_model.", "module.text_model.",
                 "_orig_mod.text_model.", "text_encoder.base_model.model.text_model.")  # fmt: skip
UNET_PREFIXES = ("unet.", "", "lora_unet.", "diffusion_model.", "model.diffusion_model.", "base_model.model.",
                 "unet.base_model.model.", "unet._orig_mod.", "module.")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "want"),
    [
        *((f"{prefix}encoder.layers.1.self_attn.q_proj", Q) for prefix in TEXT_PREFIXES),
        *((f"{prefix}_text_model_encoder_layers_1_self_attn_q_proj", Q)
          for prefix in ("lora_te", "lora_te1", "lycoris")),
        *((f"{prefix}.transformer.resblocks.1.attn.q_proj", Q)
          for prefix in ("cond_stage_model.model", "conditioner.embedders.0.model")),
        *((f"{prefix}{TO_K}", OURS) for prefix in UNET_PREFIXES),
        *((f"{prefix}input_blocks.3.1.transformer_blocks.0.attn2.to_k", OURS) for prefix in UNET_PREFIXES),
        *((f"{prefix}_{TO_K.replace('.', '_')}", OURS) for prefix in ("lora_unet", "lycoris", "unet")),
    ],
)  # fmt: skip
def test_prefixes(name, want):
    (rule,) = MODULES[names.find(name, MODULES)].weight
    assert parameter(rule) == want


@pytest.mark.parametrize(
    "ends",
    [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"), ("lora_A", "lora_B"),
     ("lora_A.default.weight", "lora_B.default.weight"), ("lora.down.weight", "lora.up.weight")],
)  # fmt: skip
def test_ends(tmp_path, ends):
    assert read(tmp_path, pair(f"unet.base_model.model.{TO_K}", ends=ends)).keys() == {OURS}


def test_words_come_with_a_lora(tmp_path):
    rows = np.arange(64, dtype=np.float32).reshape(2, 32)
    file = GOOD | {"bundle_emb.a.cat.string_to_param.*": rows, "bundle_emb.dog.clip_h": rows[:1].astype(np.float16)}
    assert read(tmp_path, file).keys() == {OURS}
    lora, words = read_adapter(tmp_path / "a.safetensors", CONFIG)
    assert lora.keys() == {OURS}
    assert words.keys() == {"a.cat", "dog"}
    np.testing.assert_array_equal(words["a.cat"], rows)
    assert words["dog"].dtype == np.float16


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_numbered_files(tmp_path, network):
    """In the order of the releases of diffusers in which they were made: the feed-forward between the attentions."""
    order = {
        "unet": [
            f"{block}.attentions.{i}.transformer_blocks.0.{part}"
            for block, count in (("down_blocks.0", 1), ("down_blocks.1", 1), ("up_blocks.0", 2), ("up_blocks.1", 2),
                                 ("mid_block", 1))
            for i in range(count)
            for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "attn2.to_q",
                         "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
        ],
        "text_encoder": [f"encoder.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in ("k", "v", "q", "out")],
    }[network]  # fmt: skip
    known = [names.find(f"{network}.{name}", MODULES) for name in order]
    order = [canonical for canonical in known if canonical is not None]
    tensors = {}
    for index, canonical in enumerate(order):
        out, *inner = foreign_shape(MODULES[canonical].weight[0], PARAMS)
        tensors[f"{network}:{index}:up"] = np.full((out, 2), index, np.float32)
        tensors[f"{network}:{index}:down"] = np.ones((2, *inner), np.float32)
    classes = ["CrossAttention", "Attention", "GEGLU"] if network == "unet" else ["CLIPAttention"]
    for metadata in ({network: json.dumps(classes)}, None):
        found = read(tmp_path, tensors, metadata)
        assert [change.up[0, 0] for change in found.values()] == list(range(len(order)))
        assert list(found) == [parameter(MODULES[name].weight[0]) for name in order]
    with pytest.raises(CheckpointError, match="do not fit"):
        read(tmp_path, {k: v for k, v in tensors.items() if not k.startswith(f"{network}:{len(order) - 1}:")})
    with pytest.raises(CheckpointError, match="its metadata says"):
        read(tmp_path, tensors, {network: "CrossAttention"})


def peft_folder(path, tensors, **settings):
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, path / "adapter_model.safetensors"
    )
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2} | settings))
    return path


def test_pefts_folders(tmp_path):
    peft_folder(tmp_path / "unet", pair(TO_K), lora_alpha=6, alpha_pattern={"attn2.to_k": 3})
    peft_folder(tmp_path / "text_encoder", pair("text_model.encoder.layers.1.self_attn.q_proj"), use_rslora=True)
    both = read_lora(tmp_path, CONFIG)
    assert {name: change.alpha for name, change in both.items()} == {OURS: 3, Q: np.float32(8 * 2**0.5)}
    assert read_lora(tmp_path / "unet", CONFIG).keys() == {OURS}
    assert read_lora(tmp_path / "unet" / "adapter_model.safetensors", CONFIG)[OURS].alpha == 3
    assert read_lora(tmp_path, CONFIG, "unet/adapter_model.safetensors").keys() == {OURS}
    # The transformers of today names no "text_model", and a folder of its own no network.
    alone = peft_folder(tmp_path / "alone", pair("encoder.layers.1.self_attn.q_proj"))
    assert read_lora(alone, CONFIG).keys() == {Q}
    whole = {"conv_in.weight": np.ones((32, 4, 3, 3), np.float32), "conv_in.bias": np.ones(32, np.float32)}
    saved = peft_folder(tmp_path / "saved", pair(TO_K) | whole, modules_to_save=["conv_in"])
    assert read_lora(saved, CONFIG).keys() == {OURS, "unet.conv_in.kernel", "unet.conv_in.bias"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "VERA"}, ["peft_type is 'VERA'", "LORA, LOHA, LOKR, IA3"]),
        ({"peft_type": 3}, ["peft_type is of type int"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights is 'pissa_niter_4'", "plain LoRA"]),
        ({"use_qalora": True}, ["use_qalora is set"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices is set"]),
        ({"alpha_pattern": {"(a+)+$": 1}}, ["alpha_pattern", "names of modules"]),
        ({"lora_alpha": None}, ["lora_alpha", "want a number"]),
        ({"feedforward_modules": ".*"}, ["feedforward_modules"]),
        ({"use_dora": True}, ["use_dora is set", "no magnitude"]),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, words):
    folder = peft_folder(tmp_path, pair(TO_K), **settings)
    with pytest.raises(CheckpointError) as caught:
        read_lora(folder, CONFIG)
    message = str(caught.value)
    assert message.startswith(str(tmp_path))
    assert not [word for word in words if word not in message], message


def test_settings_that_are_missing(tmp_path):
    folder = peft_folder(tmp_path, pair(TO_K))
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: want a JSON object"):
        read_lora(folder, CONFIG)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json beside this file"):
        read_lora(folder, CONFIG)


class Array:
    """Whatever becomes an array, as PyTorch's tensors do."""

    def __init__(self, value):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        return self.value


def test_state_dicts():
    import jax.numpy as jnp

    for wrap in (np.asarray, jnp.asarray, lambda a: jnp.asarray(a, jnp.bfloat16), Array):
        found = read_lora({name: wrap(value) for name, value in GOOD.items()}, CONFIG)
        np.testing.assert_array_equal(np.asarray(found[OURS].down, np.float32), 1)
        words = read_textual_inversion({"<cat>": wrap(np.ones((2, 32), np.float32))}, CONFIG)
        assert {word: rows.shape for word, rows in words.items()} == {"<cat>": (2, 32)}
    assert read_lora({k: np.asarray(v, ml_dtypes.bfloat16) for k, v in GOOD.items()}, CONFIG)[OURS].up.dtype.kind == "V"
    for state, words in (
        ({1: np.ones(3)}, "key of type int"),
        ({"unet.x.lora_A.weight": "text"}, "is no array"),
        ({"unet.x.lora_A.weight": object()}, "is no array"),
        ({"unet.x.lora_A.weight": [[1], [1, 2]]}, "is no array"),
        ({"unet.x.lora_A.weight": np.zeros((1, 1), ml_dtypes.float8_e4m3fn)}, "of dtype float8_e4m3fn"),
        ({"unet.a.lora_A.weight": np.zeros((1, 1))}, "'unet.a': LoRA, but its up factor is missing"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            read_lora(state, CONFIG)
        assert str(caught.value).startswith("the state dict: ")


ROWS = np.random.default_rng(0).standard_normal((2, 32), np.float32)


@pytest.mark.parametrize(
    ("params", "name", "want"),
    [
        (["<cat>"], "cat-style", {"cat-style"}),  # the file's name of it comes first, as diffusers has it
        (["<cat>"], None, {"<cat>"}),
        (["*"], None, {"stem"}),
        (["<cat>", "<dog>"], "both", {"<cat>", "<dog>"}),  # the original's trainer, of several placeholders
    ],
)
def test_words_under_any_key(tmp_path, params, name, want):
    rows = {key: tensor(storage(key=str(i), size=64), shape=(2, 32), strides=(32, 1)) for i, key in enumerate(params)}
    content = {"string_to_param": mapping(rows)} | ({"name": text(name)} if name else {})
    path = tmp_path / "stem.pt"
    path.write_bytes(torch_bytes(mapping(content), {str(i): ROWS.tobytes() for i in range(len(params))}))
    found = read_textual_inversion(path, CONFIG)
    assert found.keys() == want
    for value in found.values():
        np.testing.assert_array_equal(value, ROWS)
    if len(params) > 1:
        with pytest.raises(CheckpointError, match=r"holds 2 words, which token= cannot name"):
            read_textual_inversion(path, CONFIG, "x")
    else:
        assert read_textual_inversion(path, CONFIG, "x").keys() == {"x"}


def test_words_without_a_name(tmp_path):
    for name in ("emb_params", "clip_l", "clip_h", "*"):
        save_file({name: ROWS}, tmp_path / "stem.safetensors")
        assert read_textual_inversion(tmp_path / "stem.safetensors", CONFIG).keys() == {"stem"}
    with pytest.raises(CheckpointError, match=r"the state dict: its word is nowhere said.*token="):
        read_textual_inversion({"emb_params": ROWS}, CONFIG)
    assert read_textual_inversion(ROWS, CONFIG, "<a>").keys() == {"<a>"}
