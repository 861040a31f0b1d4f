"""Foreign checkpoints end to end: every form of one checkpoint opens as the same parameters, or is refused by name."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.random import write_random_checkpoint
from convert.source import check_source
from tests.convert.diffusers_folder import random_tensors, weights_name, write_folder
from unclip_jax.checkpoints.source import open_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A file in the original's layout, its yaml, and its tensors."""
    file, config = write_random_checkpoint(tmp_path_factory.mktemp("original") / "tiny.safetensors")
    return file, config, load_file(file)


@pytest.fixture(scope="module")
def components():
    return random_tensors()


@pytest.fixture
def folder(components, tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    write_folder(path, components)
    return path


def parameters(source, **options):
    with open_checkpoint(source, **options) as checkpoint:
        return {name: np.array(parameter.read()) for name, parameter in checkpoint.params.items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], strict=True)


def refused(source, word, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(word)) as caught:
        open_checkpoint(source, **options).__exit__()
    assert "\n" not in str(caught.value)


# --- the original's file ---------------------------------------------------------------------------------------------


def test_moving_averages(original, tmp_path):
    """With `ema` the UNet is the averages and all else the weights; the averages alone change nothing."""
    file, config, tensors = original
    prefix = "model.diffusion_model."
    twins = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): array + 1
        for name, array in tensors.items()
        if name.startswith(prefix)
    }
    save_file(tensors | twins, tmp_path / "both.safetensors")
    plain = parameters(file, config=config)
    assert_same(parameters(tmp_path / "both.safetensors", config=config), plain)
    averaged = parameters(tmp_path / "both.safetensors", config=config, ema=True)
    assert_same(averaged, {n: a + np.float32(1) if n.startswith("unet.") else a for n, a in plain.items()})
    refused(file, "model_ema", config=config, ema=True)
    del twins["model_ema.diffusion_modelout2bias"]
    save_file(tensors | twins, tmp_path / "gap.safetensors")
    refused(tmp_path / "gap.safetensors", "model.diffusion_model.out.2.bias", config=config, ema=True)


def test_half_precision_is_kept(original, tmp_path):
    file, config, tensors = original
    save_file({name: array.astype(np.float16) for name, array in tensors.items()}, tmp_path / "half.safetensors")
    half = parameters(tmp_path / "half.safetensors", config=config)
    want = {
        name: array if name.startswith("image_normalizer.") else array.astype(np.float16)
        for name, array in parameters(file, config=config).items()
    }
    assert_same(half, want)


def test_shards_with_an_index(original, tmp_path):
    file, config, tensors = original
    names = sorted(tensors)
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(parameters(index, config=config), parameters(file, config=config))


def test_incomplete_and_foreign_tensors_are_named(original, tmp_path):
    _, config, tensors = original
    name = "first_stage_model.decoder.conv_in.weight"
    cases = {
        "missing": ({key: array for key, array in tensors.items() if key != name}, name),
        "misshapen": (tensors | {name: tensors[name][:, :3]}, name),
        "unknown": (tensors | {"control_model.zero": np.zeros(3, np.float32)}, "control_model.zero"),
        "integer": (tensors | {name: tensors[name].astype(np.int32)}, "int32"),
    }
    for what, (changed, word) in cases.items():
        path = tmp_path / f"{what}.safetensors"
        save_file({key: np.ascontiguousarray(array) for key, array in changed.items()}, path)
        refused(path, word, config=config)
        with pytest.raises(ValueError, match=re.escape(word)):
            check_source(path, config=config)


def test_known_unused_tensors_may_be_there(original, tmp_path):
    file, config, tensors = original
    unused = {
        "betas": np.zeros(1000, np.float32),
        "noise_augmentor.alphas_cumprod": np.zeros(1000, np.float32),
        "cond_stage_model.model.logit_scale": np.zeros((), np.float32),
        "cond_stage_model.model.transformer.resblocks.2.ln_1.weight": np.zeros(64, np.float32),
        "embedder.model.token_embedding.weight": np.zeros((3, 4), np.float32),
    }
    save_file(tensors | unused, tmp_path / "more.safetensors")
    assert_same(parameters(tmp_path / "more.safetensors", config=config), parameters(file, config=config))
    assert check_source(tmp_path / "more.safetensors", config=config).unused.keys() == unused.keys()


def test_without_a_configuration_only_published_tensors_are_known(original, tmp_path):
    shutil.copy(original[0], tmp_path / "alone.safetensors")
    refused(tmp_path / "alone.safetensors", "config=")
    refused(original[0], "no/such.yaml", config="no/such.yaml")
    refused(original[0], "missing", config="512-base")  # a published checkpoint's name, whose tensors these are not


# --- diffusers folders -----------------------------------------------------------------------------------------------


def test_older_names_are_the_same_tensors(folder, components, tmp_path):
    """The attention of VAEs before diffusers 0.18, position_ids of older transformers, no prefix in newer ones."""
    want = parameters(folder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = {}
    for name, array in components["vae"].items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        vae[name] = array
    assert vae.keys() != components["vae"].keys()
    text = components["text_encoder"] | {"text_model.embeddings.position_ids": np.arange(77)[None]}
    newer = {name.removeprefix("text_model."): array for name, array in components["text_encoder"].items()}
    save_file(vae, folder / "vae" / weights_name("vae"))
    for tensors in (text, newer):
        save_file(tensors, folder / "text_encoder" / weights_name("text_encoder"))
        assert_same(parameters(folder), want)
    save_file(components["text_encoder"] | newer, folder / "text_encoder" / weights_name("text_encoder"))
    refused(folder, "twice, in two dialects")


def test_variants(folder, components):
    """Files of the variant are taken where they are; the others' plain ones stand in."""
    half = {name: array.astype(np.float16) for name, array in components["unet"].items()}
    save_file(half, folder / "unet" / weights_name("unet", "fp16"))
    assert parameters(folder)["unet.conv_in.kernel"].dtype == np.float32
    mixed = parameters(folder, variant="fp16")
    assert mixed["unet.conv_in.kernel"].dtype == np.float16
    assert mixed["vae.encoder.conv_in.kernel"].dtype == np.float32
    refused(folder, "bf16", variant="bf16")
    refused(folder, "variant", variant="../x")


def test_a_folder_that_lacks_something(folder):
    for part, word in (("tokenizer", "tokenizer"), ("vae", "vae"), ("scheduler", "scheduler")):
        (folder / part).rename(folder / "away")
        refused(folder, word)
        (folder / "away").rename(folder / part)
    weights = folder / "unet" / weights_name("unet")
    weights.rename(folder / "unet" / "other.safetensors")
    refused(folder, "other.safetensors")
    shutil.rmtree(folder / "unet")
    refused(folder, "unet")


def test_options_of_other_sources_are_refused(folder, original):
    file, config, _ = original
    refused(folder, "config", config=config)
    refused(folder, "ema", ema=True)
    refused(file, "variant", config=config, variant="fp16")
    refused(file, "revision", config=config, revision="main")
    refused(file, "preprocess", config=config, preprocess="none")
    refused("./no/such/folder/at/all", "no such file or folder")
