"""Uploads to a small hub on loopback, and what is read back from there."""

import dataclasses
import re

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

import unclip_jax
from convert.__main__ import main
from convert.architecture.presets import PRESETS
from convert.export.card import model_card
from tests import small_models
from tests.convert.adapter_files import random_lora
from tests.hub_server import Hub
from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.config import (
    AnyConfig,
    ControlNetCheckpointConfig,
    TinyVAECheckpointConfig,
)
from unclip_jax.checkpoints.places import HubPlace, cached_place
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.checkpoints.upload import push
from unclip_jax.demo import demo_model
from unclip_jax.models.configs import AutoencoderTinyConfig, ControlNetConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_models.write(small_models.SMALL, tmp_path_factory.mktemp("made") / "small")


@pytest.fixture
def server(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    return hub_server


@pytest.fixture(scope="module")
def pipe(folder):
    return unclip_jax.from_pretrained(folder)


def front(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: np.array(parameter.read()) for name, parameter in checkpoint.params.items()}


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """But for the text tower's projection, which no pipeline reads and diffusers' class of it does not have."""
    assert ours.keys() - theirs.keys() <= {"text_encoder.projection.kernel", "projection.kernel"}
    for name, value in theirs.items():
        assert value.dtype == ours[name].dtype, name
        np.testing.assert_array_equal(value, ours[name], err_msg=name)


def test_a_pipeline_is_read_back_bit_for_bit(server, pipe, folder):
    address = pipe.push_to_hub("me/small", private=True, commit_message="Add the model")
    assert address.startswith(f"{server.endpoint}/me/small/commit/")
    assert server.private == {"me/small"}
    assert server.commits == ["Add the model"]
    assert server.tokens == {"Bearer hf_writes", None}  # the store of large files is asked without
    assert {"model_index.json", "README.md", "unet/config.json"} <= set(server.repos["me/small"]["main"])
    with open_checkpoint(folder) as first, open_checkpoint("me/small") as back:
        assert_equal(weights(first), weights(back))
    again = unclip_jax.from_pretrained("me/small")
    assert type(again) is type(pipe)
    for name, network in pipe.networks.items():
        assert_equal(*({n: np.asarray(v) for n, v in one.params.items()} for one in (network, again.networks[name])))


def test_networks_that_are_not_kept_are_pushed_from_the_checkpoint(server, folder):
    memory = unclip_jax.Memory(free_networks=True)
    unclip_jax.from_pretrained(folder, memory=memory).push_to_hub("me/small")
    with open_checkpoint(folder) as first, open_checkpoint("me/small") as back:
        assert_equal(weights(first), weights(back))


def test_what_was_trained_since_is_what_is_pushed(server, folder):
    pipe = unclip_jax.from_pretrained(folder)
    unet = pipe.networks["unet"]
    pipe.networks["unet"] = dataclasses.replace(unet, params={n: v + 1 for n, v in unet.params.items()})
    pipe.push_to_hub("me/small")
    with open_checkpoint("me/small") as back:
        for name, value in unet.params.items():
            np.testing.assert_array_equal(back.params[f"unet.{name}"].read(), np.asarray(value + 1))


def test_the_dtype_is_the_pipelines(server, folder):
    unclip_jax.from_pretrained(folder, dtype="bfloat16").push_to_hub("me/half")
    with open_checkpoint("me/half") as back:
        assert {p.dtype.name for n, p in back.params.items() if not n.startswith("image_normalizer")} == {"bfloat16"}


def test_a_second_push_keeps_the_card_that_was_edited(server, pipe):
    pipe.push_to_hub("me/small")
    files = server.repos["me/small"]["main"]
    files["README.md"] = b"# Mine\n"
    pipe.push_to_hub("me/small")
    assert files["README.md"] == b"# Mine\n"
    assert len(server.commits) == 2
    assert all(message.startswith("Upload by unclip_jax ") for message in server.commits)


def test_a_revision_is_a_branch(server, pipe):
    pipe.push_to_hub("me/small", revision="next")
    pipe.push_to_hub("me/small", revision="next")
    assert server.repos["me/small"]["main"] == {}
    assert unclip_jax.open_checkpoint("me/small", revision="next").config.unet == pipe.config.unet


def test_the_command_pushes_and_names_what_the_source_was(server, folder, capsys):
    assert main([str(folder), "--push", "me/small", "--dtype", "float16", "--private"]) == 0
    assert f"uploaded {server.endpoint}/me/small/commit/" in capsys.readouterr().out
    with open_checkpoint("me/small") as checkpoint:
        assert {parameter.dtype.name for parameter in checkpoint.params.values()} == {"float16"}
    assert main(["me/small", "--push", "me/smaller"]) == 0
    card = server.repos["me/smaller"]["main"]["README.md"]
    assert front(card)["base_model"] == ["me/small"]
    assert re.search(rb"\[me/small\]\(https://huggingface.co/me/small\), commit \w{40}\n", card)
    assert b'unclip_jax.from_pretrained("me/smaller")' in card


def test_a_merge_is_pushed_with_its_three_sources(server, folder):
    assert main([str(folder), "--push", "me/small"]) == 0
    assert main(["add-difference", "me/small", str(folder), str(folder), "--scale", "0.5", "--push", "me/merged"]) == 0
    card = server.repos["me/merged"]["main"]["README.md"]
    assert b"A + 0.5 (B - C)" in card
    assert card.count(b"- `small`") == 2
    assert front(card)["base_model"] == ["me/small"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--push", "me/a", "here"], "give a destination, or --push and none, or --check and none"),
        (["--push", "me/a", "--check"], "give a destination, or --push and none, or --check and none"),
        (["there", "--private"], "--private is for --push"),
        (["--push", "me/a", "--to", "original"], "--push uploads a diffusers folder, and --to is original"),
        (["--push", "small"], "repo_id is 'small'; want the form 'owner/name'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, says, server, folder, capsys):
    assert main([str(folder), *arguments]) == 2
    assert capsys.readouterr().err.endswith(f"convert: {says}\n")
    assert server.asked == []


@pytest.mark.parametrize("repo_id", ["small", "", "a/b/c", "a--b/c", "https://huggingface.co/a/b", "a/b\n"])
def test_a_malformed_id_is_refused_before_anything_is_asked(repo_id, server, pipe):
    with pytest.raises(ValueError, match=r"^repo_id is .*; want the form 'owner/name'$"):
        pipe.push_to_hub(repo_id)
    assert server.asked == []


def test_arguments_are_checked_before_anything_is_asked(server, pipe, monkeypatch):
    with pytest.raises(ValueError, match=r"^commit_message is ' '; want a text, or None$"):
        pipe.push_to_hub("me/small", commit_message=" ")
    with pytest.raises(ValueError, match=r"^token has no token's form") as caught:
        pipe.push_to_hub("me/small", token="hf_secret\n")
    assert "secret" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=r"^me/small: there is no token to write with; log in .* HF_TOKEN$"):
        pipe.push_to_hub("me/small")
    assert server.asked == []


def test_adapters_are_refused_by_name(server, folder):
    pipe = unclip_jax.from_pretrained(folder)
    pipe.adapters = pipe.adapters.with_lora("ink", random_lora(0, config=pipe.config), 1.0, {}, "a file")
    with pytest.raises(ValueError, match=r"^adapters are loaded \('ink'\).*unload_lora_weights"):
        pipe.push_to_hub("me/small")
    pipe.unload_lora_weights()
    pipe.push_to_hub("me/small")


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (401, PermissionError, r"the hub refuses the token \(401: .*\); log in .* with a valid one"),
        (403, PermissionError, r"the token may not write here \(403: .*\); use one with write access to me's rep"),
        (500, OSError, r"the hub answers 500 \(.*\); nothing was committed"),
    ],
)
@pytest.mark.parametrize("paths", [".*", ".*/commit/.*"])
def test_a_refusal_is_told_in_one_line(status, kind, says, paths, server, pipe):
    server.refuse(status, paths)
    with pytest.raises(kind, match=rf"^me/small: {says}") as caught:
        pipe.push_to_hub("me/small", token="hf_other")
    assert "\n" not in str(caught.value)
    assert server.tokens <= {"Bearer hf_other", None}
    assert server.commits == []


def test_without_a_network_one_line_says_so(server, pipe, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"^me/small: the hub at http://127.0.0.1:9 cannot be reached \(.*\)"):
        pipe.push_to_hub("me/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"^me/small: HF_HUB_OFFLINE is set; unset it to upload$"):
        pipe.push_to_hub("me/small")


# -- the card ----------------------------------------------------------------------------------------------------------


def card_of(config: AnyConfig, source: str = "/home/somebody/a.safetensors") -> str:
    return model_card(Checkpoint(config, None, {}, source), "me/model")


@pytest.mark.parametrize("name", PRESETS)
def test_what_has_stable_diffusions_sizes_has_its_licence(name):
    card = card_of(PRESETS[name])
    described = front(card.encode())
    assert described["license"] == "openrail++"
    assert "base_model" not in described
    assert described["pipeline_tag"] == ("text-to-image" if name in ("768-v", "512-base") else "image-to-image")
    assert "[CreativeML Open RAIL++-M licence](https://" in card
    assert "`a.safetensors`" in card
    assert "somebody" not in card


def test_no_licence_is_made_up():
    estimator = dataclasses.replace(PRESETS["512-base"], trained_for="depth")
    estimator = dataclasses.replace(estimator, unet=dataclasses.replace(estimator.unet, in_channels=8))
    turbo = dataclasses.replace(PRESETS["512-base"], distilled=True)
    for config in (small_models.SMALL, turbo, estimator):
        card = card_of(config)
        assert "license" not in front(card.encode())
        assert "not recorded here" in card
    assert front(card_of(estimator).encode())["pipeline_tag"] == "depth-estimation"


@pytest.mark.parametrize(
    ("config", "opens"),
    [
        (TinyVAECheckpointConfig(AutoencoderTinyConfig()), "TinyVAE.from_pretrained"),
        (ControlNetCheckpointConfig(ControlNetConfig()), "ControlNet.from_pretrained"),
    ],
)
def test_what_goes_with_a_checkpoint_says_how_it_is_opened(config, opens):
    assert f'unclip_jax.{opens}("me/model")' in card_of(config)


def test_the_demo_models_card_says_what_it_is():
    with open_checkpoint() as checkpoint:
        card = model_card(checkpoint, "me/demo")
    assert front(card.encode())["license"] == "mit"
    assert "the demo model of unclip_jax" in card
    assert "drawings of emoji" in card
    assert str(demo_model()) not in card


def test_a_path_in_the_hubs_cache_is_its_place(tmp_path):
    snapshot = tmp_path / "models--an-owner--a.name" / "snapshots" / "0123"
    assert cached_place(snapshot) == HubPlace("an-owner/a.name", "", "0123")
    assert cached_place(snapshot / "a" / "b.ckpt") == HubPlace("an-owner/a.name", "a/b.ckpt", "0123")
    for other in (tmp_path, tmp_path / "models--a--b", tmp_path / "models--a" / "snapshots" / "0"):
        assert cached_place(other) is None


def test_another_part_is_among_the_sources(server, folder, tmp_path):
    other = small_models.write(small_models.SMALL, tmp_path / "other", seed=1)
    with open_checkpoint(folder, vae=other) as checkpoint:
        push(checkpoint, "me/mixed")
    card = server.repos["me/mixed"]["main"]["README.md"]
    assert b"- `small`" in card
    assert b"- `other`" in card
