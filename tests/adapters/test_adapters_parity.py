"""Adapters beside diffusers and peft: the same files and settings, the same predictions. Tolerances: relative (L2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.adapters import read_lora, read_textual_inversion
from convert.export.lora import save_lora
from convert.export.textual_inversion import save_textual_inversion
from tests.adapters.live import CONFIG, TIMES, TOKENS, TOLERANCE, X, check, predicted, wanted
from unclip_jax.adapters.changes import Decomposed
from unclip_jax.adapters.lora import merge_loras
from unclip_jax.adapters.textual_inversion import add_words, expand_words
from unclip_jax.models.freeu import FreeU

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("any_release_of_peft")]

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
CONVOLUTIONS = ["conv1", "conv_shortcut", "downsamplers.0.conv", "conv_in", "time_embedding.linear_1"]
TEXT_TARGETS = ["q_proj", "v_proj", "out_proj", "fc1"]


def add_adapter(pipe, name, seed, rank, alpha, alphas=None, ranks=None, **settings):
    """Random adapters in both networks of diffusers' pipeline, by peft."""
    import torch
    from peft import LoraConfig

    def config(targets):
        own = [{k: v for k, v in (given or {}).items() if k.endswith(tuple(targets))} for given in (alphas, ranks)]
        return LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=targets, alpha_pattern=own[0], rank_pattern=own[1], **settings
        )

    generator = torch.Generator().manual_seed(seed)
    for model, targets in ((pipe.unet, UNET_TARGETS + CONVOLUTIONS), (pipe.text_encoder, TEXT_TARGETS)):
        model.add_adapter(config(targets), adapter_name=name)
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipe


def save(pipe, name, folder, *, metadata):
    """By diffusers' own means, as its training scripts do it."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    states = {
        "unet": get_peft_model_state_dict(pipe.unet, adapter_name=name),
        "text_encoder": get_peft_model_state_dict(pipe.text_encoder, adapter_name=name),
    }
    if not metadata:
        states = {key: convert_state_dict_to_diffusers(state) for key, state in states.items()}
    notes = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder}) if metadata else {}
    pipe.save_lora_weights(folder, *states.values(), **notes)


@pytest.mark.parametrize("metadata", [True, False])
def test_a_file_of_peft(both, tmp_path, metadata):
    """Of layers and convolutions of every kind in both networks, with ranks and alphas of their own in the metadata."""
    networks, _, open_theirs = both
    pipe = open_theirs()
    base = wanted(pipe)
    own = {"alphas": {"attn2.to_k": 3, "conv1": 1, "fc1": 2}, "ranks": {"attn2.to_k": 2, "conv1": 5, "fc1": 3}}
    add_adapter(pipe, "default", 0, 4, 6 if metadata else 4, **(own if metadata else {}))
    save(pipe, "default", tmp_path, metadata=metadata)
    lora = read_lora(tmp_path, CONFIG)
    assert len({change.rank for change in lora.values()}) == (4 if metadata else 1)
    check(predicted(merge_loras(networks, [lora], [1.0])), wanted(pipe), base)


def test_a_file_of_dora(both, tmp_path):
    """By diffusers' own means, with the magnitudes of the base, which the factors then change."""
    networks, _, open_theirs = both
    pipe = open_theirs()
    base = wanted(pipe)
    add_adapter(pipe, "default", 0, 4, 6, use_dora=True)
    save(pipe, "default", tmp_path, metadata=True)
    lora = read_lora(tmp_path, CONFIG)
    assert {type(change) for change in lora.values()} == {Decomposed}
    check(predicted(merge_loras(networks, [lora], [1.0])), wanted(pipe), base)


@pytest.fixture(scope="module")
def loras(both, tmp_path_factory):
    """Two adapters: one of one alpha, one of several."""
    _, _, open_theirs = both
    folder, found = tmp_path_factory.mktemp("loras"), {}
    for name, arguments in {"first": (1, 4, 6), "second": (2, 3, 2, {"conv1": 1, "to_q": 5})}.items():
        pipe = add_adapter(open_theirs(), "default", *arguments)
        save(pipe, "default", folder / name, metadata=True)
        found[name] = read_lora(folder / name, CONFIG)
    return found


@pytest.mark.filterwarnings("ignore:Already found a .peft_config:UserWarning")
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_files_of_ours_and_two_at_once(both, loras, tmp_path, form):
    """diffusers loads what we write, and weighs two adapters as we do."""
    networks, _, open_theirs = both
    pipe = open_theirs()
    base = wanted(pipe)
    if form == "kohya":  # of which diffusers mixes up alphas where they differ
        six = np.float32(6)
        loras = {name: {k: c._replace(alpha=six) for k, c in lora.items()} for name, lora in loras.items()}
    for name, lora in loras.items():
        pipe.load_lora_weights(save_lora(CONFIG, lora, tmp_path / f"{name}.safetensors", form), adapter_name=name)
    for names, weights in ((["first"], [1.0]), (["second"], [0.5]), (["first", "second"], [0.7, -0.4])):
        pipe.set_adapters(names, weights)
        check(predicted(merge_loras(networks, [loras[name] for name in names], weights)), wanted(pipe), base)


def test_kohyas_names_are_those_that_diffusers_makes(both, loras, tmp_path):
    """Tensor for tensor, also of names made after the original's blocks."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from safetensors.torch import load_file, save_file

    _, _, open_theirs = both
    unet = open_theirs().unet
    lora = {name: change for name, change in loras["first"].items() if name.startswith("unet.")}
    original = load_file(save_lora(CONFIG, lora, tmp_path / "original.safetensors", "original"))
    flat = {}
    for key, value in original.items():
        module, role, end = key.removeprefix("model.diffusion_model.").rsplit(".", 2) if "lora" in key else (
            *key.removeprefix("model.diffusion_model.").rsplit(".", 1), "")  # fmt: skip
        role = {"lora_A": "lora_down", "lora_B": "lora_up"}.get(role, role)
        flat[".".join(filter(None, (f"lora_unet_{module.replace('.', '_')}", role, end)))] = value
    save_file(flat, tmp_path / "flat.safetensors")
    again = read_lora(tmp_path / "flat.safetensors", CONFIG)
    assert again.keys() == lora.keys()
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(dict(flat), unet.config))
    theirs = {key: value for key, value in theirs.items() if "time_embed" not in key}
    save_file(theirs, tmp_path / "theirs.safetensors")
    for name, change in read_lora(tmp_path / "theirs.safetensors", CONFIG).items():
        np.testing.assert_array_equal(change.down, lora[name].down)
        np.testing.assert_array_equal(change.up, lora[name].up)


WORD = "<thing>"
PROMPTS = ["a <thing>, red", "<thing><thing> a thing", "two <other> of <thing>_1", "An <OTHER> or <Thing>"]


def test_learnt_words_are_as_in_diffusers(both, tmp_path):
    """Of one vector and of several, in both programs' files; by prompts with the words among others."""
    import torch

    networks, tokenizer, open_theirs = both
    pipe = open_theirs()
    rng = np.random.default_rng(0)
    words = {WORD: rng.standard_normal((3, 32), np.float32), "<other>": rng.standard_normal((1, 32), np.float32)}
    save_textual_inversion(WORD, words[WORD], tmp_path)
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.tensor(words["<other>"])}, "step": 5}
    torch.save(a1111 | {"name": "<other>", "sd_checkpoint": None}, tmp_path / "other.pt")
    read = {}
    for name in (tmp_path, tmp_path / "other.pt"):
        read |= read_textual_inversion(name, CONFIG)
    for word, rows in words.items():
        np.testing.assert_array_equal(read[word], rows)
    pipe.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    pipe.load_textual_inversion(str(tmp_path), weight_name="other.pt")
    wider, text_encoder = add_words(tokenizer, networks["text_encoder"], read)
    for prompt in PROMPTS:
        want = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
        padded = pipe.tokenizer(want, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
        tokens = wider([expand_words(wider, prompt)])
        np.testing.assert_array_equal(tokens, padded.input_ids.numpy(), prompt)
        with torch.no_grad():
            states = pipe.text_encoder(padded.input_ids)[0].numpy()
        ours = np.asarray(text_encoder.merge()(tokens))
        assert np.linalg.norm(ours - states) < TOLERANCE * np.linalg.norm(states)


@pytest.mark.parametrize("factors", [(0.9, 0.2, 1.1, 1.2), (0.5, 1.5, 0.7, 1.4)])
def test_freeu_is_as_in_diffusers(both, factors):
    networks, _, open_theirs = both
    pipe = open_theirs()
    base = wanted(pipe)[1:]
    pipe.enable_freeu(*factors)
    check(jax.jit(lambda f: predicted_unet(networks, f))(FreeU(*factors)), wanted(pipe)[1:], base)


def predicted_unet(networks, freeu):
    context = networks["text_encoder"].merge()(jnp.asarray(TOKENS))
    unet = networks["unet"].merge()
    return (unet.denoise(X, unet.embed_time(jnp.asarray(TIMES)), unet.encode_context(context), freeu=freeu),)
