"""Folders that diffusers' Flax pipelines saved: every tensor finds its place, and the networks compute what Flax's did.

tests/golden/flax.json says how the folders and the recordings were made.
"""

import functools
import json
import re
import tarfile

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize

from convert import engine, layouts
from convert.architecture.diffusers import from_folder
from convert.architecture.presets import PRESETS
from convert.readers import CheckpointError, TensorInfo, open_tensors
from convert.rules import diffusers
from convert.rules.flax import flax_rules, is_flax
from convert.safety import open_safety_checker
from convert.source import check_source, open_diffusers
from tests.convert.lossless import ARCHITECTURES, assert_lossless, foreign_arrays
from tests.golden_weights import GOLDEN, inventory
from unclip_jax import TextToImagePipeline
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import abstract_networks, abstract_params, part
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.safety import is_flagged

FOLDERS = ("text-to-image", "inpainting", "bf16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flax")
    with tarfile.open(GOLDEN / "flax.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN / "flax.npz") as file:
        return dict(file)


def tree(path):
    """A file by Flax's own reader."""
    return msgpack_restore(path.read_bytes())


# --- names ---------------------------------------------------------------------------------------------------------

# Ours <- Flax's, written out: one of each kind.
UNET = {
    "conv_in.kernel": "conv_in kernel",
    "time_embedding.linear_2.bias": "time_embedding linear_2 bias",
    "down_blocks.0.resnets.0.norm1.scale": "down_blocks_0 resnets_0 norm1 scale",
    "down_blocks.0.resample.kernel": "down_blocks_0 downsamplers_0 conv kernel",
    "down_blocks.0.attentions.0.attn1.to_out.kernel": (
        "down_blocks_0 attentions_0 transformer_blocks_0 attn1 to_out_0 kernel"
    ),
    "mid_block.attentions.0.attn2.to_k.kernel": "mid_block attentions_0 transformer_blocks_0 attn2 to_k kernel",
    "mid_block.resnets.1.time_emb_proj.kernel": "mid_block resnets_1 time_emb_proj kernel",
    "up_blocks.1.attentions.1.ff.proj_in.bias": "up_blocks_1 attentions_1 transformer_blocks_0 ff net_0 proj bias",
    "up_blocks.1.attentions.1.ff.proj_out.kernel": "up_blocks_1 attentions_1 transformer_blocks_0 ff net_2 kernel",
    "up_blocks.0.resnets.1.conv_shortcut.kernel": "up_blocks_0 resnets_1 conv_shortcut kernel",
    "up_blocks.0.resample.bias": "up_blocks_0 upsamplers_0 conv bias",
    "conv_norm_out.scale": "conv_norm_out scale",
}
VAE = {
    "quant_conv.kernel": "quant_conv kernel",
    "encoder.down_blocks.1.resnets.0.conv1.kernel": "encoder down_blocks_1 resnets_0 conv1 kernel",
    "decoder.up_blocks.0.resample.kernel": "decoder up_blocks_0 upsamplers_0 conv kernel",
    **{
        f"{half}.mid_block.attention.{ours}": f"{half} mid_block attentions_0 {theirs}"
        for half in ("encoder", "decoder")
        for ours, theirs in {
            "norm.scale": "group_norm scale",
            "to_q.kernel": "query kernel",
            "to_k.bias": "key bias",
            "to_v.kernel": "value kernel",
            "to_out.kernel": "proj_attn kernel",
        }.items()
    },
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tensor_is_used(folders, folder):
    report = check_source(folders / folder)
    assert len(report.used) == 206 + 124 + 36
    assert not report.unused


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_parameter_is_the_files(folders, folder):
    with open_diffusers(folders / folder) as checkpoint:
        dtype = ml_dtypes.bfloat16 if folder == "bf16" else np.float32
        assert {parameter.dtype for parameter in checkpoint.params.values()} == {np.dtype(dtype)}
        for component, names in (("unet", UNET), ("vae", VAE)):
            arrays = tree(folders / folder / component / "diffusion_flax_model.msgpack")
            for ours, theirs in names.items():
                want = functools.reduce(lambda node, key: node[key], theirs.split(), arrays)
                np.testing.assert_array_equal(checkpoint.params[f"{component}.{ours}"].read(), want, strict=True)


def test_the_text_encoder_in_every_container(folders):
    """One map, shards, and transformers' safetensors file hold the same numbers under the same names."""
    arrays = tree(folders / "text-to-image/text_encoder/flax_model.msgpack")["text_model"]
    for folder in FOLDERS:
        with open_diffusers(folders / folder) as checkpoint:
            params = {name: p.read() for name, p in part(checkpoint.params, "text_encoder").items()}
        for layer, block in arrays["encoder"]["layers"].items():
            q = block["self_attn"]["q_proj"]["kernel"]
            np.testing.assert_array_equal(params["layers.q_proj.kernel"][int(layer)], q)
            np.testing.assert_array_equal(params["layers.norm2.scale"][int(layer)], block["layer_norm2"]["scale"])
        for ours, theirs in (("token_embedding", "token_embedding"), ("position_embedding", "position_embedding")):
            want = arrays["embeddings"][theirs]["embedding"]
            np.testing.assert_array_equal(params[f"{ours}.embedding"], want)
        np.testing.assert_array_equal(params["final_norm.bias"], arrays["final_layer_norm"]["bias"])


@pytest.mark.parametrize("name", ["tiny", "text-to-image", "upscaler"])
def test_rules_for_any_architecture(name):
    config = ARCHITECTURES[name]
    params = abstract_params(config)
    torch_rules = diffusers.table(config, params).rules
    rules = flax_rules(torch_rules)
    engine.prove(rules, params)
    names = {rule.foreign for rule in rules}
    assert not any(name.endswith(".weight") for name in names)
    assert is_flax(names)
    assert not is_flax(rule.foreign for rule in torch_rules)
    assert_lossless(rules, params, foreign_arrays(rules, params))


def test_the_published_networks():
    """Stable Diffusion 2 in full size: every tensor of Flax's networks, and no other, has its rule and its shape."""
    config = PRESETS["768-v"]
    params = abstract_params(config)
    rules = flax_rules(diffusers.table(config, params).rules)
    tensors = inventory(GOLDEN / "inventory" / "flax.tsv.gz")
    assert len(tensors) == 1306
    assert {rule.foreign: engine.foreign_shape(rule, params) for rule in rules} == {
        name: info.shape for name, info in tensors.items()
    }


DERIVED = {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers", "image_encoder": "transformers"}


@pytest.mark.parametrize("preset", ["sd21-unclip-h", "512-inpainting"])
def test_the_dialect_is_told_from_pytorchs(preset):
    """Of a part in either all names are found, and no name of another part is taken for one of it."""
    config = PRESETS[preset]
    params = abstract_params(config)
    torch_names = {rule.foreign for rule in diffusers.table(config, params).rules}
    flax_names = {rule.foreign for rule in flax_rules(diffusers.table(config, params).rules)}
    for names, dialects in ((torch_names, DERIVED), (flax_names, dict.fromkeys(DERIVED, "flax"))):
        places, canonical = layouts.locate(names, diffusers.PLACES)
        there = [component for component in DERIVED if getattr(config, component)]
        assert [places[component].dialect for component in there] == [dialects[component] for component in there]
        assert canonical.keys() == names
        assert {rule.foreign for rule in layouts.table(config, params, places).rules} == names
    for component in DERIVED:
        flax = layouts.PARTS[component]["flax"]
        for name in flax_names | torch_names:
            folder, _, within = name.partition("/")
            assert folder == component or not re.fullmatch(flax.sign, within), name
    tower = layouts.Place("conditioner.embedders.3.model.", "flax")  # whose number is no part of a name
    names = {rule.foreign for rule in layouts.table(config, params, {"text_encoder": tower}).rules}
    assert f"{tower.prefix}text_model.encoder.layers.3.mlp.fc1.kernel" in names
    assert layouts.locate(names, {"text_encoder": diffusers.PLACES["text_encoder"]})[0] == {"text_encoder": tower}
    unused = [re.compile(item.pattern) for item in layouts.PARTS["text_encoder"]["flax"].unused]
    for name in ("text_projection.kernel", "logit_scale", "text_model.embeddings.position_ids"):
        assert any(pattern.fullmatch(name) for pattern in unused)


def test_a_projection_that_is_a_convolution(folders, tmp_path):
    """use_linear_projection is false in some configurations: a kernel (1, 1, in, out) instead of (in, out)."""
    config = from_folder(folders / "text-to-image")
    params = {k: spec for k, spec in abstract_params(config).items() if k.startswith("unet.")}
    rules = flax_rules(rule for rule in diffusers.table(config, params).rules)
    arrays = foreign_arrays(rules, params)
    as_convolutions = {
        name: array[None, None] if name.endswith(("proj_in.kernel", "proj_out.kernel")) else array
        for name, array in arrays.items()
    }
    assert as_convolutions["unet/mid_block.attentions_0.proj_in.kernel"].shape == (1, 1, 32, 32)
    tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in as_convolutions.items()}
    assert engine.check(rules, params, tensors, []).complete
    got = engine.import_params(rules, params, tensors, as_convolutions.__getitem__)
    ours = "unet.mid_block.attentions.0.proj_in.kernel"
    want = arrays["unet/mid_block.attentions_0.proj_in.kernel"]
    np.testing.assert_array_equal(got[ours].read(), want, strict=True)


def test_a_tensor_too_many_missing_or_misshapen(folders, tmp_path):
    arrays = tree(folders / "text-to-image/vae/diffusion_flax_model.msgpack")
    config = from_folder(folders / "text-to-image")
    params = {k: spec for k, spec in abstract_params(config).items() if k.startswith("vae.")}
    rules = flax_rules(rule for rule in diffusers.table(config, params).rules)

    def check(change):
        changed = jax.tree.map(lambda leaf: leaf, arrays)
        change(changed)
        (tmp_path / "a.msgpack").write_bytes(msgpack_serialize(changed))
        with open_tensors(tmp_path / "a.msgpack") as file:
            tensors = {f"vae/{name}": info for name, info in file.tensors.items()}
            return engine.check(rules, params, tensors, diffusers.unused(config))

    assert check(lambda tree: None).complete
    missing = check(lambda tree: tree["quant_conv"].pop("kernel"))
    assert missing.missing == ["vae/quant_conv.kernel (1, 1, 8, 8)"]
    unknown = check(lambda tree: tree["quant_conv"].update(scale=np.zeros(3, np.float32)))
    assert unknown.unknown == ["vae/quant_conv.scale (3,)"]
    misshapen = check(lambda tree: tree["encoder"]["conv_in"].update(kernel=np.zeros((8, 3, 3, 3), np.float32)))
    assert misshapen.misshapen == ["vae/encoder.conv_in.kernel has shape (8, 3, 3, 3), want (3, 3, 3, 8)"]


# --- what the files of a folder say --------------------------------------------------------------------------------


def test_flax_classes_stand_for_those_of_pytorch(folders):
    scheduler = {"text-to-image": "DDIMScheduler", "bf16": "PNDMScheduler", "inpainting": "DPMSolverMultistepScheduler"}
    for folder, kind in scheduler.items():
        assert from_folder(folders / folder).scheduler_config["_class_name"] == kind
    config = from_folder(folders / "inpainting")
    assert config.unet.in_channels == 9
    assert (config.scheduler, config.task) == ("dpm++2m", "inpaint")
    assert from_folder(folders / "text-to-image").unet.num_heads == (2, 4)


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("model_index.json", "_class_name", "FlaxStableDiffusionXLPipeline", "StableDiffusionXLPipeline"),
        ("model_index.json", "unet", ["diffusers", "FlaxUNet3DConditionModel"], "FlaxUNet3DConditionModel"),
        ("model_index.json", "scheduler", ["diffusers", "FlaxKarrasVeScheduler"], "KarrasVeScheduler"),
        ("unet/config.json", "_class_name", "FlaxUNet3DConditionModel", "FlaxUNet3DConditionModel"),
        ("vae/config.json", "_class_name", "FlaxVQModel", "FlaxVQModel"),
    ],
)
def test_other_flax_classes_are_refused(folders, tmp_path, file, key, value, words):
    for path in (folders / "text-to-image").rglob("*.json"):
        copy = tmp_path / path.relative_to(folders / "text-to-image")
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    data = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**data, key: value}))
    if key == "scheduler":
        (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": value[1]}))
    with pytest.raises(CheckpointError, match=words):
        from_folder(tmp_path)


# --- what the networks compute -------------------------------------------------------------------------------------


def networks(checkpoint):
    """The networks in float32."""
    mesh = local_mesh(jax.local_devices()[:1])
    loaded = load_networks(checkpoint, abstract_networks(checkpoint.config), mesh, progress=False)
    return {name: network.merge() for name, network in loaded.items()}


def last(array):
    """Recordings are (B, C, H, W)."""
    return array.transpose(0, 2, 3, 1)


def error(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def test_the_networks_compute_what_flax_and_pytorch_did(folders, recorded):
    with open_diffusers(folders / "text-to-image") as checkpoint:
        assert (checkpoint.tokenizer(["a cat"]) == recorded["ids"]).all()
        ours = networks(checkpoint)
    text = jax.jit(ours["text_encoder"])(recorded["ids"])
    mean = jax.jit(ours["vae"].encode)(last(recorded["image"])).mean
    decoded = jax.jit(ours["vae"].decode)(last(recorded["latents"]))
    unet = jax.jit(ours["unet"])(last(recorded["sample"]), recorded["timestep"], text)
    assert error(text, recorded["text_flax"]) < 1e-6  # 3e-7
    assert error(mean, last(recorded["mean_flax"])) < 3e-6  # 9e-7
    assert error(decoded, last(recorded["decoded_flax"])) < 3e-6  # 9e-7
    assert error(unet, last(recorded["unet_torch"])) < 3e-6  # 1e-6
    assert 1e-5 < error(unet, last(recorded["unet_flax"])) < 1e-3  # 1.6e-4: the approximate GELU


def test_the_inpainting_unet(folders, recorded):
    with open_diffusers(folders / "inpainting") as checkpoint:
        ours = networks(checkpoint)
    got = jax.jit(ours["unet"])(last(recorded["inpainting_sample"]), recorded["timestep"], recorded["text_flax"])
    assert error(got, last(recorded["inpainting_unet_torch"])) < 3e-6
    assert 1e-5 < error(got, last(recorded["inpainting_unet_flax"])) < 1e-3  # 1.8e-4
    text = jax.jit(ours["text_encoder"])(recorded["ids"])  # from shards
    assert error(text, recorded["text_flax"]) < 1e-6


@pytest.mark.parametrize(("folder", "scheduler"), [("text-to-image", "ddim"), ("bf16", "pndm")])
def test_a_folder_of_flax_makes_the_image_recorded_from_it(folders, recorded, folder, scheduler):
    pipe = TextToImagePipeline.from_pretrained(folders / folder, "float32", local_mesh(jax.local_devices()[:1]))
    latents = last(recorded["latents"])
    out = pipe(
        "a cat", num_inference_steps=4, guidance_scale=3.0, latents=latents, height=16, width=16, output_type="np"
    )
    assert pipe.config.scheduler == scheduler
    assert np.abs(out.images - recorded[f"picture_{scheduler}_torch"]).max() < 1e-4
    if scheduler == "ddim":
        assert np.abs(out.images - recorded["picture_ddim_flax"]).max() < 1e-3  # 1.6e-4: the approximate GELU


# --- CLIP's image tower --------------------------------------------------------------------------------------------


def test_the_safety_checker(folders, recorded):
    folder = folders / "inpainting/safety_checker"
    checker = open_safety_checker(folder)
    embeddings = np.asarray(checker.image_encoder.merge()(last(recorded["safety_input"])))
    assert error(embeddings, recorded["safety_embeds_flax"]) < 1e-6  # 4e-7
    assert [is_flagged(checker, embedding) for embedding in embeddings] == recorded["safety_flax"].tolist()
    assert set(recorded["safety_flax"]) == {True, False}
