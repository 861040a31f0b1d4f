"""Tiny autoencoders in diffusers' layout and in TAESD's, both ways, as the VAE of a checkpoint, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from convert import engine, layouts
from convert.__main__ import main
from convert.export.diffusers import save_diffusers
from convert.export.original import save_original
from holes import write_holes
from tests import small_models
from tests.convert.diffusers_folder import write_json
from tests.convert.lossless import assert_lossless, foreign_arrays
from tests.convert.published_files import shapes
from tests.convert.tiny_vae_files import DECODER, ENCODER, SMALL, checkpoint, original_shapes
from unclip_jax.checkpoints import directory
from unclip_jax.checkpoints.config import TinyVAECheckpointConfig, read_config
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.checkpoints.source import open_checkpoint, open_controlnet, open_tiny_vae
from unclip_jax.models.configs import AutoencoderTinyConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCALED = dataclasses.replace(SMALL, scaling_factor=0.5, latent_magnitude=2.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small tiny autoencoder in every layout, and a checkpoint that it fits; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny")
    save_original(checkpoint(), folder / "taesd.safetensors")
    save_diffusers(checkpoint(), folder / "model")
    directory.save(checkpoint(), folder / "converted")
    small_models.write(small_models.TEXT_TO_IMAGE, folder / "base")
    return folder


def assert_same(opened, config=SMALL):
    assert opened.config == TinyVAECheckpointConfig(config)
    assert_parameters(opened, config)


def assert_parameters(opened, config=SMALL):
    params = checkpoint(config).params
    assert params.keys() == {name for name in opened.params if name.startswith("vae.")}
    for name, parameter in params.items():
        np.testing.assert_array_equal(opened.params[name].read(), parameter.read(), strict=True)


@st.composite
def configs(draw):
    levels, width = draw(st.integers(1, 4)), st.integers(1, 5)

    def counts():
        return tuple(draw(st.lists(st.integers(0, 3), min_size=levels, max_size=levels)))

    return AutoencoderTinyConfig(
        latent_channels=draw(st.integers(1, 5)),
        encoder_block_out_channels=(draw(width),) * levels,
        decoder_block_out_channels=(draw(width),) * levels,
        num_encoder_blocks=counts(),
        num_decoder_blocks=counts(),
    )


@settings(max_examples=20)
@given(config=configs(), dialect=st.sampled_from(["taesd", "tiny"]))
def test_tables_fit_any_tiny_autoencoder(config, dialect):
    params = abstract_params(TinyVAECheckpointConfig(config))
    layouts.PARTS["vae"][dialect].table(t := engine.Table(params), "", config)
    engine.prove(t.rules, params)
    assert_lossless(t.rules, params, foreign_arrays(t.rules, params))


@settings(max_examples=9)
@given(config=configs())
def test_tensors_show_any_architecture(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    save_original(checkpoint(config), folder / "x.safetensors")
    with open_tiny_vae(folder) as opened:
        assert_same(opened, config)


def test_published_tensors_of_diffusers(tmp_path, capsys):
    tensors = shapes("taesd")
    write_holes(tmp_path / "x.safetensors", tensors)
    assert main([str(tmp_path / "x.safetensors"), "--check"]) == 0
    assert capsys.readouterr().out.startswith(f"complete: {len(tensors)} tensors are used")
    for opened in (open_tiny_vae, open_checkpoint):
        with opened(tmp_path / "x.safetensors") as found:
            assert found.config == TinyVAECheckpointConfig(AutoencoderTinyConfig())


def test_published_tensors_of_taesd(tmp_path, capsys):
    """Which has the same tensors in two files."""
    halves = {"encoder": original_shapes(ENCODER, 3, 4), "decoder": original_shapes(DECODER, 4, 3)}
    for half, tensors in halves.items():
        write_holes(tmp_path / f"taesd_{half}.safetensors", tensors)
    assert sum(map(len, halves.values())) == len(shapes("taesd"))
    for path in (tmp_path, tmp_path / "taesd_decoder.safetensors"):
        assert main([str(path), "--check"]) == 0
        assert capsys.readouterr().out.startswith(f"complete: {len(shapes('taesd'))} tensors are used")
        with open_tiny_vae(path) as found:
            assert found.config == TinyVAECheckpointConfig(AutoencoderTinyConfig())


@pytest.mark.parametrize("source", ["model", "converted", "taesd_encoder.safetensors", "taesd_decoder.safetensors"])
def test_every_layout_opens(source, written):
    with open_tiny_vae(written / source) as opened:
        assert_same(opened)


def test_both_halves_in_one_file_of_taesd(written, tmp_path):
    halves = {half: load_file(written / f"taesd_{half}.safetensors") for half in ("encoder", "decoder")}
    save_file(
        {f"{half}.{name}": a for half, own in halves.items() for name, a in own.items()}, tmp_path / "x.safetensors"
    )
    with open_tiny_vae(tmp_path / "x.safetensors") as opened:
        assert_same(opened)


def test_there_and_back_is_bit_equal(written, tmp_path):
    for layout, name in (("diffusers", "model"), ("original", "taesd.safetensors"), ("jax", "converted")):
        assert main([str(written / "model"), str(tmp_path / name), "--to", layout]) == 0
    for path in (f"model/{WEIGHTS}", "model/config.json", "taesd_encoder.safetensors", "taesd_decoder.safetensors"):
        assert (tmp_path / path).read_bytes() == (written / path).read_bytes()
    with open_tiny_vae(tmp_path / "converted") as opened:
        assert_same(opened)
    assert read_config(TinyVAECheckpointConfig(SCALED).to_json()) == TinyVAECheckpointConfig(SCALED)


@pytest.mark.parametrize("source", ["model", "converted", "taesd_decoder.safetensors"])
def test_the_vae_of_a_checkpoint(source, written, tmp_path):
    """Opened, converted, exported and opened again."""
    with open_checkpoint(written / "base", vae=written / source) as opened:
        assert opened.config.vae == SMALL
        assert opened.config.unet == small_models.TEXT_TO_IMAGE.unet
        assert_parameters(opened)
        directory.save(opened, tmp_path / "converted")
        save_diffusers(opened, tmp_path / "folder")
        with pytest.raises(ValueError, match="its VAE is an AutoencoderTiny; the original's layout has none"):
            save_original(opened, tmp_path / "x.safetensors")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderTiny"]
    for options in ({}, {"vae": tmp_path / "folder"}, {"vae": tmp_path / "folder" / "vae"}):
        with open_checkpoint(tmp_path / "folder" if not options else written / "base", **options) as opened:
            assert opened.config.vae == SMALL
            assert_parameters(opened)
    with open_tiny_vae(tmp_path / "folder") as opened:
        assert_same(opened)
    with open_checkpoint(tmp_path / "converted") as opened:
        assert_parameters(opened)


@pytest.mark.parametrize("place", ["", "/taesd_decoder.safetensors"])
def test_from_the_hub(place, written, hub_server):
    """From a repository with both layouts, as that of TAESD: the folder, or one half with the other."""
    files = {path.name: path.read_bytes() for path in (written / "model").iterdir()}
    for half in ("encoder", "decoder"):
        files[f"taesd_{half}.safetensors"] = (written / f"taesd_{half}.safetensors").read_bytes()
    hub_server.repos["madebyollin/taesd"] = {"main": files}
    with open_checkpoint(written / "base", vae=f"madebyollin/taesd{place}") as opened:
        assert opened.config.vae == SMALL
        assert_parameters(opened)
    with open_tiny_vae(f"madebyollin/taesd{place}") as opened:
        assert_same(opened)


def test_an_autoencoder_in_the_place_of_a_tiny_one(written, tmp_path):
    with open_checkpoint(written / "base", vae=written / "model") as opened:
        directory.save(opened, tmp_path / "tiny")
    with open_checkpoint(tmp_path / "tiny", vae=written / "base") as opened:
        assert opened.config == small_models.TEXT_TO_IMAGE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act_fn": "silu"}, "act_fn is 'silu'"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor is 4"),
        ({"encoder_block_out_channels": [8, 16]}, "encoder_block_out_channels is .8, 16.; want one width"),
        ({"num_encoder_blocks": [1]}, "num_encoder_blocks is .1,.; want 0 to 16 for each of 2"),
        ({"num_encoder_blocks": [1, 99]}, "num_encoder_blocks is .1, 99."),
        ({"decoder_block_out_channels": [12, 12, 12]}, "as many levels in the encoder as in the decoder"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": "1"}, "scaling_factor is '1'"),
        ({"num_decoder_blocks": [1, 1]}, "misshapen|missing"),
        ({"latent_channels": 3}, "misshapen"),
    ],
)
def test_other_architectures_are_refused(change, words, written, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(written / "model", folder)
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), **change})
    with pytest.raises(ValueError, match=words):
        open_tiny_vae(folder)
    with pytest.raises(ValueError, match=words), open_checkpoint(written / "base", vae=folder):
        pass


def test_what_is_something_else_is_named(written, tmp_path):
    with pytest.raises(ValueError, match="is a Stable Diffusion checkpoint, not a tiny autoencoder"):
        open_tiny_vae(written / "base")
    with pytest.raises(ValueError, match="a VAE on its own"):
        open_controlnet(written / "model")
    with pytest.raises(ValueError, match="is a tiny autoencoder, not a Stable Diffusion checkpoint"):
        open_checkpoint(written / "converted", vae=written / "model")
    shutil.copy(written / "taesd_encoder.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"the other, taesd_decoder[.]safetensors, is not beside it"):
        open_tiny_vae(tmp_path / "taesd_encoder.safetensors")
    shutil.copy(written / "taesd_encoder.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="want 'encoder' or 'decoder' in its name"):
        open_tiny_vae(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="config: only for other checkpoints"):
        open_checkpoint(written / "taesd_encoder.safetensors", config=written / "model" / "config.json")
    with pytest.raises(ValueError, match="write a diffusers folder"):
        save_original(checkpoint(SCALED), tmp_path / "y.safetensors")


def test_sources_without_one_are_named(written, tmp_path):
    with open_checkpoint(written / "base") as opened:
        save_diffusers(opened, tmp_path / "pipeline")
    (tmp_path / "empty").mkdir()
    save_file({"encoder.0.weight": np.zeros((2, 3, 3, 3), np.float32)}, tmp_path / "one.safetensors")
    for path, words in (
        ("pipeline", "vae is .*AutoencoderKL.*; want an AutoencoderTiny"),
        ("pipeline/vae", "is a VAE on its own"),
        (f"pipeline/vae/{WEIGHTS}", "is a VAE on its own"),
        (f"pipeline/unet/{WEIGHTS}", "is a UNet on its own"),
        ("empty", "want the config.json of diffusers' AutoencoderTiny"),
        ("one.safetensors", "its encoder has 1 convolutions; want two"),
    ):
        with pytest.raises(ValueError, match=words):
            open_tiny_vae(tmp_path / path)
    with pytest.raises(ValueError, match="no weights of variant 'fp16'"):
        open_tiny_vae(written / "model", variant="fp16")
    with pytest.raises(ValueError, match="is one file: only diffusers folders have variants"):
        open_tiny_vae(tmp_path / "one.safetensors", variant="fp16")


def test_weights_of_the_other_kind_are_refused(written, tmp_path):
    """A folder whose description and weights are of different autoencoders."""
    with open_checkpoint(written / "base", vae=written / "model") as opened:
        save_diffusers(opened, tmp_path / "tiny")
    with open_checkpoint(written / "base") as opened:
        save_diffusers(opened, tmp_path / "whole")
    shutil.copy(tmp_path / "tiny" / "vae" / WEIGHTS, tmp_path / "whole" / "vae" / WEIGHTS)
    with pytest.raises(ValueError, match="the weights are an AutoencoderTiny's; want those of an AutoencoderKL"):
        open_checkpoint(tmp_path / "whole")


def test_latents_of_other_channels_are_refused(written, tmp_path):
    save_diffusers(checkpoint(dataclasses.replace(SMALL, latent_channels=5)), tmp_path / "model")
    with pytest.raises(ValueError, match="has latent channels 5; this checkpoint needs 4"):
        open_checkpoint(written / "base", vae=tmp_path / "model")
