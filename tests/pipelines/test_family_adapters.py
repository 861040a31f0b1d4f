"""Adapters, learnt words, marks and the safety check on a pipeline: what they change, and that they go exactly."""

import argparse
import dataclasses
import pickle
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import unclip_jax.pipelines.finish as finish_module
from convert.export.lora import save_lora
from convert.export.textual_inversion import save_textual_inversion
from tests import small_models
from tests.pipelines.small_family import HEIGHT, WIDTH, Compilations, arguments, open_pipeline, random_lora
from tests.watermarked import natural
from unclip_jax import Memory
from unclip_jax.adapters.textual_inversion import EMBEDDING
from unclip_jax.cli_generate import _adapt as adapt
from unclip_jax.models.freeu import FreeU
from unclip_jax.safety import Concepts, SafetyChecker
from unclip_jax.watermark import MARK, read_watermark

NAME = "text to image"


@pytest.fixture
def pipe(family):
    yield family(NAME)
    family(NAME).unload_lora_weights()


def run(pipe, **changes):
    return pipe(**arguments(NAME, **changes)).latents


@pytest.fixture
def files(pipe, tmp_path):
    return [
        save_lora(pipe.config, random_lora(pipe.config, seed), tmp_path / f"lora{seed}.safetensors") for seed in (0, 1)
    ]


def test_loras_change_the_image_and_go_again(pipe, files):
    plain = run(pipe)
    pipe.load_lora_weights(files[0])
    one = run(pipe)
    pipe.load_lora_weights(files[1], "second", 0.5)
    both = run(pipe)
    for a, b in ((plain, one), (one, both), (plain, both)):
        assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(a)
    with Compilations() as compiled:
        pipe.set_adapters(["second", "lora0"], [0.25, -0.5])
        changed = run(pipe)
    assert compiled.count == 0
    assert np.linalg.norm(changed - both) > 1e-3 * np.linalg.norm(both)
    pipe.set_adapters("lora0")
    np.testing.assert_array_equal(run(pipe), one)
    pipe.set_adapters(["lora0", "second"], [0, 0])
    np.testing.assert_array_equal(run(pipe), plain)
    pipe.set_adapters(["lora0", "second"])
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(run(pipe), plain)


def test_a_word_is_learnt(pipe, family_folder, tmp_path):
    rows = np.random.default_rng(0).standard_normal((2, pipe.config.text_encoder.width), np.float32)
    save_textual_inversion("<thing>", rows, tmp_path)
    plain = pipe.networks["text_encoder"].params
    try:
        states = pipe.encode_prompts(["a cat", "a <thing>"])
        pipe.load_textual_inversion(tmp_path)
        learnt = pipe.encode_prompts(["a cat", "a <thing>", "a thing"])
        np.testing.assert_allclose(learnt[0], states[0], rtol=0, atol=1e-5)
        assert np.abs(learnt[1] - states[1]).max() > 1e-2
        assert np.abs(learnt[1] - learnt[2]).max() > 1e-2
        with pytest.raises(ValueError, match=r"the word '<thing>' is not new.*token="):
            pipe.load_textual_inversion(tmp_path)
        pipe.load_textual_inversion(tmp_path, "<other>")
        np.testing.assert_allclose(pipe.encode_prompts(["a <other>"])[0], learnt[1], rtol=0, atol=1e-5)
    finally:
        pipe.unload_textual_inversion()
    assert pipe.networks["text_encoder"].params is plain
    with pytest.raises(ValueError, match="tokens has '<thing>'; loaded: none"):
        pipe.unload_textual_inversion("<thing>")


def test_adapters_are_taken_away_one_by_one(pipe, files):
    plain = pipe.networks
    pipe.load_lora_weights(load_file(files[0]))  # a state dict, as diffusers takes it
    one = pipe.networks
    pipe.load_lora_weights(files[1], "second", 0.5)
    pipe.load_lora_weights({name: np.asarray(value) for name, value in load_file(files[0]).items()})
    with pytest.raises(ValueError, match=r"lora1\.safetensors: the adapter 'second'.*adapter_name=.*delete_adapters"):
        pipe.load_lora_weights(files[1], "second")
    pipe.delete_adapters(["second", "default_2"])
    for network in ("unet", "text_encoder"):
        for name, value in pipe.networks[network].params.items():
            np.testing.assert_array_equal(value, one[network].params[name])
    with pytest.raises(ValueError, match="adapter_names has 'second'; loaded: 'default_0'"):
        pipe.delete_adapters("second")
    pipe.delete_adapters("default_0")
    assert pipe.networks["unet"] is plain["unet"]


def test_words_are_taken_away_one_by_one(pipe, files, tmp_path):
    rows = np.random.default_rng(0).standard_normal((5, pipe.config.text_encoder.width), np.float32)
    files_of = [
        save_textual_inversion(word, rows[i : i + 1], tmp_path / f"{i}.safetensors") for i, word in enumerate("xy")
    ]
    prompts = ["a <one>", "a <two>", "a <three>"]
    tokenizer, plain = pipe.tokenizer, pipe.networks["text_encoder"].params
    before = pipe.encode_prompts(prompts)
    try:
        # A list of a file, a state dict and an array; a name for each.
        pipe.load_textual_inversion([files_of[0], {"z": rows[1:3]}, rows[3]], ["<one>", "<two>", "<three>"])
        learnt = pipe.encode_prompts(prompts)
        assert (np.abs(learnt - before).reshape(3, -1).max(axis=1) > 1e-2).all()
        known = re.escape(f"{files_of[0]}: the word '<two>' is not new")
        with pytest.raises(ValueError, match=rf"{known}.*\(token=\), or .*\(unload_textual_inversion\)"):
            pipe.load_textual_inversion([files_of[1], files_of[0]], ["<four>", "<two>"])
        assert "<four>" not in pipe.tokenizer.known_tokens  # all of a list, or nothing
        with pytest.raises(ValueError, match="token has 1 names for 2 sources"):
            pipe.load_textual_inversion(files_of, "<four>")
        pipe.unload_textual_inversion("<two>")
        rest = pipe.encode_prompts(prompts)
        np.testing.assert_allclose(rest, np.stack([learnt[0], before[1], learnt[2]]), rtol=0, atol=1e-5)
        pipe.load_textual_inversion(rows[:2], ["<two>", "<four>"])  # of one array, as diffusers has it
        pipe.unload_textual_inversion(["<one>", "<four>"])
        with pytest.raises(ValueError, match="tokens has '<one>'; loaded: '<three>', '<two>'"):
            pipe.unload_textual_inversion(["<one>"])
    finally:
        pipe.unload_textual_inversion()
    assert pipe.tokenizer is tokenizer or pipe.tokenizer.known_tokens == tokenizer.known_tokens
    assert pipe.networks["text_encoder"].params is plain


def test_words_that_come_with_a_lora_go_with_it(pipe, files, tmp_path):
    rows = np.random.default_rng(0).standard_normal((2, pipe.config.text_encoder.width), np.float32)
    state = load_file(files[0]) | {"bundle_emb.<both>.string_to_param.*": rows}
    save_file(state, tmp_path / "both.safetensors")
    plain = pipe.encode_prompts(["a <both>"])
    pipe.load_lora_weights(tmp_path / "both.safetensors", weight=0)
    assert np.abs(pipe.encode_prompts(["a <both>"]) - plain).max() > 1e-2
    pipe.unload_textual_inversion()  # of words of their own, of which there are none
    assert "<both>_1" in pipe.tokenizer.known_tokens
    with pytest.raises(
        ValueError, match="tokens has '<both>', which came with the adapter 'both'; use delete_adapters"
    ):
        pipe.unload_textual_inversion("<both>")
    with pytest.raises(ValueError, match=r"again: the word '<both>' is not new.*delete_adapters\('both'\)"):
        pipe.load_lora_weights(shutil.copy(tmp_path / "both.safetensors", tmp_path / "again"))
    pipe.delete_adapters("both")
    np.testing.assert_array_equal(pipe.encode_prompts(["a <both>"]), plain)


def test_a_lora_of_the_token_table_beside_words(pipe):
    """The rows of words come after those that it changes."""
    table = pipe.networks["text_encoder"].params[EMBEDDING]
    name = "text_encoder.text_model.embeddings.token_embedding.diff"
    try:
        pipe.load_textual_inversion(np.full(table.shape[1], 7, np.float32), "<seven>")
        pipe.load_lora_weights({name: np.ones(table.shape, np.float32)})
        changed = np.asarray(pipe.networks["text_encoder"].params[EMBEDDING])
        first = changed.shape[0] - 1
        np.testing.assert_allclose(changed[:first], np.asarray(table)[:first] + 1, rtol=1e-6)
        np.testing.assert_array_equal(changed[first], 7)
    finally:
        pipe.unload_textual_inversion()


def test_the_command_line_names_words(pipe, tmp_path):
    rows = np.ones((1, pipe.config.text_encoder.width), np.float32)
    odd = save_textual_inversion("<odd>", rows, tmp_path / "a=b.safetensors")
    file = save_textual_inversion("<own>", rows, tmp_path / "a.safetensors")
    none = {"lora": [], "freeu": None, "watermark": False, "safety_checker": None}
    try:
        adapt(pipe, argparse.Namespace(textual_inversion=[str(odd), f"{file}=<given>"], **none))
        assert {"<odd>", "<given>"} <= pipe.tokenizer.known_tokens
    finally:
        pipe.unload_textual_inversion()


class Hostile:
    def __reduce__(self):
        return (print, ("run",))


def test_adapters_that_are_refused(pipe, files, family_folder, tmp_path, capfd):
    other = dataclasses.replace(
        small_models.TEXT_TO_IMAGE, text_encoder=dataclasses.replace(small_models.TEXT, width=64, heads=2)
    )
    foreign = save_lora(
        other,
        {"text_encoder.layers.0.q_proj.kernel": random_lora(other, 0)["text_encoder.layers.0.q_proj.kernel"]},
        tmp_path / "foreign.safetensors",
    )
    (tmp_path / "hostile.bin").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "broken.safetensors").write_bytes(files[0].read_bytes()[:-5])
    save_file({"weird": np.zeros(3, np.float32)}, tmp_path / "weird.safetensors")
    pipe.load_lora_weights(files[0])
    before = pipe.networks
    cases = [(foreign, "of another base model"), (tmp_path / "hostile.bin", "hostile.bin")]
    cases += [(tmp_path / "broken.safetensors", "broken"), (tmp_path / "weird.safetensors", "weird")]
    cases += [(files[0], "lora0.*'lora0' is loaded already")]
    for file, words in cases:
        with pytest.raises(ValueError, match=words) as caught:
            pipe.load_lora_weights(file)
        assert "\n" not in str(caught.value)
    for weight in ("1", float("nan"), None, True):
        with pytest.raises(ValueError, match=r"^weight is "):
            pipe.load_lora_weights(files[1], weight=weight)
        with pytest.raises(ValueError, match=r"^adapter_weights is "):
            pipe.set_adapters("lora0", [weight])
    with pytest.raises(ValueError, match="adapter_names has 'mine'; loaded: 'lora0'"):
        pipe.set_adapters(["lora0", "mine"])
    with pytest.raises(ValueError, match="adapter_weights has 2 numbers for 1 names"):
        pipe.set_adapters(["lora0"], [1, 2])
    for call in (pipe.load_lora_weights, pipe.load_textual_inversion):
        with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
            call(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="hostile"):
        pipe.load_textual_inversion(tmp_path / "hostile.bin")
    wide = save_textual_inversion("<wide>", np.zeros((1, 768), np.float32), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="Stable Diffusion 1"):
        pipe.load_textual_inversion(wide)
    assert pipe.networks is before
    assert "run" not in capfd.readouterr().out
    lean = open_pipeline(family_folder("TEXT_TO_IMAGE"), "TextToImagePipeline", memory=Memory(free_networks=True))
    with pytest.raises(ValueError, match="without free_networks"):
        lean.load_lora_weights(files[0])


def test_freeu(pipe, family_folder, tmp_path):
    """Ones change nothing up to rounding; other numbers compile nothing new."""
    plain = run(pipe)
    try:
        pipe.freeu = FreeU(1, 1, 1, 1)
        np.testing.assert_allclose(run(pipe), plain, rtol=0, atol=1e-4)
        with Compilations() as compiled:
            pipe.freeu = FreeU(0.5, 0.2, 1.4, 1.6)
            run(pipe)
        assert compiled.count == 0
    finally:
        pipe.freeu = None
    np.testing.assert_array_equal(run(pipe), plain)


def test_marks_and_the_safety_check(family, monkeypatch):
    """On images that are large enough, since only a small part of them is painted."""
    pipe = family("inpainting")
    large = natural(256, 256, 0)
    mask = np.zeros((256, 256), np.uint8)
    mask[120:136, 100:116] = 255
    settings = {"image": large, "mask_image": mask, "padding_mask_crop": 2}
    settings |= {"height": HEIGHT, "width": WIDTH, "num_images_per_prompt": 2, "output_type": "pil", "batch_size": 1}
    plain = np.asarray(pipe(**arguments("inpainting", **settings)).images[0])
    nothing = Concepts(np.ones((1, 2), np.float32), np.ones(1, np.float32))
    monkeypatch.setattr(pipe, "watermark", MARK)
    monkeypatch.setattr(pipe, "safety_checker", SafetyChecker(None, 8, nothing, nothing))
    monkeypatch.setattr(finish_module, "check_safety", lambda checker, images: [False, True])
    out = pipe(**arguments("inpainting", **settings))
    assert out.nsfw_content_detected == [False, True]
    marked, black = map(np.asarray, out.images)
    assert read_watermark(marked) == MARK
    assert 0 < np.abs(marked.astype(int) - plain).mean() < 16
    assert black.max() < 40  # black, and marked
    del settings["output_type"], settings["batch_size"]
    *_, last = pipe.stream(**arguments("inpainting", **settings) | {"output_type": "pil"})
    marked, black = map(np.asarray, last.decode())
    assert read_watermark(marked) == MARK
    assert black.max() < 40
