"""CLIP models on their own, written by open_clip and by transformers, against those libraries."""

import json

import jax
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from convert.__main__ import main
from convert.export.tokenizer import tokenizer_files
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import abstract_networks
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.conditioning.tokenizer import Tokenizer, clip_tokenizer_json
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.models.clip import similarity

pytestmark = pytest.mark.parity

PROMPTS = ["a photo of a cat", "two dogs on a mat", ""]
DESCRIPTION = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 56, "layers": 3, "width": 64, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
}
TOLERANCE = 1e-5  # of logits of about 10; measured: 2e-6


def pixels():
    return np.random.default_rng(0).standard_normal((2, 3, 56, 56), np.float32)


def disturbed(model):
    """The model with every parameter moved, so that none is 0 or 1 by its initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def our_logits(source, **options):
    with open_checkpoint(source, **options) as checkpoint:
        networks = load_networks(checkpoint, abstract_networks(checkpoint.config), local_mesh(jax.local_devices()[:1]))
        tokens = checkpoint.tokenizer(PROMPTS)
        scale = checkpoint.params["similarity.logit_scale"].read()
    images = networks["image_encoder"].merge()(np.moveaxis(pixels(), 1, -1))
    return np.asarray(similarity(images, networks["text_encoder"].merge().embed(tokens), scale))


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def tower_file(request, tmp_path_factory):
    """open_clip's weights, its description of them, and the logits of PROMPTS for `pixels`."""
    description = {**DESCRIPTION, **({"quick_gelu": True} if request.param == "quick_gelu" else {})}
    name = f"tests-{request.param}"
    open_clip.factory._MODEL_CONFIGS[name] = description
    model = disturbed(open_clip.create_model(name))
    folder = tmp_path_factory.mktemp(request.param)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": description, "preprocess_cfg": {}}))
    with torch.no_grad():
        images = model.encode_image(torch.from_numpy(pixels()), normalize=True)
        texts = model.encode_text(open_clip.tokenize(PROMPTS), normalize=True)
        logits = (model.logit_scale.exp() * images @ texts.T).numpy()
    return folder / "open_clip_pytorch_model.bin", name, description, logits


def test_open_clip_file(tower_file, tmp_path, capsys):
    file, name, description, logits = tower_file
    assert np.abs(our_logits(file) - logits).max() < TOLERANCE * np.abs(logits).max()
    assert np.abs(our_logits(f"open_clip:{name}/{file}") - logits).max() < TOLERANCE * np.abs(logits).max()
    lonely, settings = tmp_path / "model.safetensors", tmp_path / "model.json"
    save_file(torch.load(file), lonely)
    settings.write_text(json.dumps(description))
    np.testing.assert_array_equal(our_logits(lonely, config=settings), our_logits(file))
    for target in ("jax", "orbax"):
        assert main([str(file), str(tmp_path / target), "--to", target]) == 0
        np.testing.assert_array_equal(our_logits(tmp_path / target), our_logits(file))
    assert main([str(file), "--check"]) == 0
    assert "complete" in capsys.readouterr().out


def test_a_trainers_checkpoint(tower_file, tmp_path):
    """open_clip's trainer keeps the weights under `state_dict`, with the name of what it wrapped them in."""
    file, _, description, logits = tower_file
    state = {f"module.{name}": tensor for name, tensor in torch.load(file).items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {}}, tmp_path / "epoch_1.pt")
    settings = tmp_path / "model.json"
    settings.write_text(json.dumps(description))
    assert (
        np.abs(our_logits(tmp_path / "epoch_1.pt", config=settings) - logits).max() < TOLERANCE * np.abs(logits).max()
    )


def test_refusals(tower_file, tmp_path, capsys):
    file, _, description, _ = tower_file
    state = torch.load(file)
    del state["visual.proj"]
    torch.save(state, tmp_path / "incomplete.bin")
    settings = tmp_path / "model.json"
    settings.write_text(json.dumps(description))
    cases = [
        ([str(tmp_path / "incomplete.bin"), "--check", "--config", str(settings)], "visual.proj"),
        ([str(file), str(tmp_path / "x"), "--to", "diffusers"], "CLIP model on its own"),
        ([str(file), str(tmp_path / "x"), "--ema"], "ema"),
        (["open_clip:no-such-model/x", str(tmp_path / "x")], "no-such-model"),
        (["open_clip:ViT-H-14/no-such-tag", str(tmp_path / "x")], "laion2b_s32b_b79k"),
    ]
    for arguments, words in cases:
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_transformers_folder(tmp_path, activation):
    towers = {"hidden_act": activation, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**towers, "hidden_size": 32, "eos_token_id": 2, "vocab_size": 49408},
        vision_config={**towers, "hidden_size": 64, "image_size": 56, "patch_size": 14},
        projection_dim=48,
    )
    model = disturbed(CLIPModel(config))
    model.save_pretrained(tmp_path)
    for name, text in tokenizer_files(Tokenizer.from_json(clip_tokenizer_json(), "open_clip")).items():
        (tmp_path / name).write_text(text, "utf-8")
    with open_checkpoint(tmp_path) as checkpoint:
        tokens = torch.from_numpy(checkpoint.tokenizer(PROMPTS)).long()
    with torch.no_grad():
        logits = model(input_ids=tokens, pixel_values=torch.from_numpy(pixels())).logits_per_image.numpy()
    assert np.abs(our_logits(tmp_path) - logits).max() < TOLERANCE * np.abs(logits).max()
