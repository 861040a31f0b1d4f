"""Text-to-image priors in Karlo's layout and in diffusers', both ways, and what is refused."""

import dataclasses
import json
import shutil
import zipfile

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from convert.architecture.prior import karlo_yaml
from convert.engine import export_tensors, prove
from convert.export.diffusers import save_diffusers
from convert.export.original import save_original
from convert.prior import KARLO_FILE, open_karlo_prior
from convert.rules import prior as rules
from tests import small_prior
from tests.convert.published_prior import PUBLISHED
from tests.golden_weights import GOLDEN, inventory
from tests.small_prior import CONFIG
from unclip_jax.checkpoints.checkpoint import Parameter
from unclip_jax.checkpoints.config import PriorCheckpointConfig, read_config
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.checkpoints.source import open_checkpoint, open_prior
from unclip_jax.pipelines.prior import TextToEmbeddingPrior
from unclip_jax.pipelines.unclip import UnCLIPPipeline


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small prior in both layouts; not to be written to."""
    folder = tmp_path_factory.mktemp("prior")
    with small_prior.checkpoint() as checkpoint:
        save_original(checkpoint, folder / "karlo.safetensors")
        save_diffusers(checkpoint, folder / "diffusers")
    return folder


@pytest.fixture
def karlo(written, tmp_path):
    for path in written.glob("karlo.*"):
        shutil.copy(path, tmp_path)
    return tmp_path / "karlo.safetensors"


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written / "diffusers", tmp_path / "diffusers")


def assert_same(source, **options):
    with open_prior(source, **options) as checkpoint, small_prior.checkpoint() as want:
        assert checkpoint.params.keys() == want.params.keys()
        for name, parameter in want.params.items():
            np.testing.assert_array_equal(checkpoint.params[name].read(), parameter.read())
        return checkpoint.config


def test_every_tensor_is_mapped_once_in_both_layouts():
    params = abstract_params(PUBLISHED)
    prove(rules.diffusers(PUBLISHED, params, "text_encoder").rules, params)
    params = {name: spec for name, spec in params.items() if not name.startswith("image_normalizer.")}
    table = rules.karlo(PUBLISHED.prior, PUBLISHED.text_encoder, params).rules
    prove(table, params)
    standins = {name: Parameter(spec.shape, np.dtype(np.float32), ()) for name, spec in params.items()}
    exported = {name: p.shape for name, p in export_tensors(table, standins).items() if not name.startswith("text_enc")}
    published = inventory(GOLDEN / "inventory" / "karlo_prior.tsv.gz")
    assert exported == {name: info.shape for name, info in published.items()}


def test_round_trips_are_bit_equal(written, tmp_path, capsys):
    """Through each layout into each other one, on the command line."""
    assert assert_same(written / "karlo.safetensors") == CONFIG
    assert assert_same(written / "diffusers").reference == "diffusers"
    assert main([str(written / "karlo.safetensors"), "--check"]) == 0
    assert main([str(written / "diffusers"), "--check"]) == 0
    assert main([str(written / "karlo.safetensors"), str(tmp_path / "ours")]) == 0
    assert assert_same(tmp_path / "ours") == CONFIG
    assert main([str(tmp_path / "ours"), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    assert main([str(tmp_path / "folder"), str(tmp_path / "back.safetensors"), "--to", "original"]) == 0
    assert_same(tmp_path / "back.safetensors")
    for name, tensor in load_file(written / "karlo.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "back.safetensors")[name], tensor)
    assert main([str(tmp_path / "ours"), "--check"]) == 0
    assert "complete" in capsys.readouterr().out
    assert read_config(json.loads((tmp_path / "ours" / "config.json").read_text())) == CONFIG


def test_heads_have_their_own_queries_keys_and_values(written):
    """Karlo's packing: of each head its query, key and value rows, then those of the next head."""
    packed = load_file(written / "karlo.safetensors")["model.transformer.resblocks.1.attn.c_qkv.weight"]
    heads = packed.reshape(CONFIG.prior.heads, 3, -1, CONFIG.prior.width)
    with small_prior.checkpoint() as checkpoint:
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            ours = checkpoint.params[f"prior.layers.{name}.kernel"].read()[1].T
            np.testing.assert_array_equal(heads[:, part].reshape(ours.shape), ours)


def test_files_under_karlos_names(karlo, tmp_path):
    models, whole = tmp_path / "karlo_models", load_file(f"{karlo}.text_encoder.safetensors")
    models.mkdir()
    shutil.copy(karlo, models / KARLO_FILE)
    # A whole CLIP model: its image tower and its scale are left out.
    whole |= {"visual.proj": np.zeros((4, 64), np.float32), "logit_scale": np.array(4, np.float32)}
    save_file(whole, models / "ViT-L-14.pt")
    shutil.copy(f"{karlo}.yaml", models / f"{KARLO_FILE}.yaml")
    statistics = karlo.with_name(f"{karlo.name}.stats.npz")
    assert assert_same(models, clip_stats=statistics) == CONFIG
    assert main([str(models), "--check"]) == 0
    with pytest.raises(ValueError, match=r"a prior of Karlo, whose .* none are published .*Karlo's ViT-L-14_stats\.th"):
        open_prior(models)


def test_parts_of_larger_folders(folder):
    """As in Karlo's own repository, and as in one of StableUnCLIPPipeline's."""
    classes = {"prior": ["diffusers", "PriorTransformer"]}
    tower = ["transformers", "CLIPTextModelWithProjection"]
    index = {"_class_name": "StableUnCLIPPipeline", **classes, "prior_text_encoder": tower}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet").mkdir()
    assert_same(folder)
    with pytest.raises(ValueError, match=r"model_index\.json: unet"):  # a pipeline, and not whole
        open_checkpoint(folder)
    (folder / "unet").rmdir()
    for part in ("text_encoder", "tokenizer"):
        (folder / f"prior_{part}").rename(folder / part)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "KarloPrior", **classes, "text_encoder": tower})
    )
    assert_same(folder)
    with open_checkpoint(folder) as checkpoint:
        assert isinstance(checkpoint.config, PriorCheckpointConfig)
    index = {"_class_name": "StableUnCLIPPipeline", "prior": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="want a PriorTransformer"):
        open_prior(folder)


def edit(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("prior/config.json", {"added_emb_type": None}, "added_emb_type is None"),
        ("prior/config.json", {"norm_in_type": "layer"}, "norm_in_type is 'layer'"),
        ("prior/config.json", {"embedding_proj_dim": 32}, "embedding_proj_dim is 32"),
        ("prior/config.json", {"num_layers": "many"}, "num_layers is 'many'"),
        ("prior/config.json", {"num_layers": 4}, "missing: prior/transformer_blocks.3"),
        ("prior/config.json", {"num_layers": 99999}, "PriorConfig.layers is 99999"),
        ("prior/config.json", {"num_embeddings": 76}, "text_encoder.context_length is 77"),
        ("prior_text_encoder/config.json", {"projection_dim": 32}, "projection_dim 32"),
        ("prior_scheduler/scheduler_config.json", {"_class_name": "UniScheduler"}, "_class_name 'UniScheduler'"),
        ("prior_scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "variance_type is 'learned"),
    ],
)
def test_folders_that_are_refused(folder, file, changes, words):
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        open_prior(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_are_refused(karlo, folder):
    tensors = load_file(karlo)
    name = "model.transformer.resblocks.2.attn.c_qkv.weight"
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != name}, f"1 missing: {name}"),
        ({**tensors, name: tensors[name][1:]}, f"1 misshapen: {name}"),
        ({**tensors, "model.extra": tensors[name]}, "1 unknown: model.extra"),
        ({**tensors, name: tensors[name].astype(np.int32)}, f"{name} has dtype int32"),
    ):
        save_file(changed, karlo)
        with pytest.raises(ValueError, match=words):
            open_prior(karlo)
    save_file(tensors, karlo)
    tower = karlo.with_name(f"{karlo.name}.text_encoder.safetensors")
    whole = load_file(tower)
    save_file({k: v for k, v in whole.items() if k != "text_projection"}, tower)
    with pytest.raises(ValueError, match="no text_projection of 2 axes"):
        open_prior(karlo)
    tower.unlink()
    with pytest.raises(ValueError, match="give OpenAI's ViT-L-14"):
        open_prior(karlo)
    assert main([str(karlo), "--check"]) == 0  # the file itself is whole
    with pytest.raises(FileNotFoundError, match="text_encoder: no such file"):
        open_prior(karlo, text_encoder=tower)
    weights = folder / "prior" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="diffusion_pytorch_model"):
        open_prior(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"type": "decoder"}}, "want model.type 'prior'"),
        ({"model": 3}, "want model.type 'prior'"),
        ({"diffusion": {"noise_schedule": "linear"}}, "diffusion.noise_schedule is 'linear'"),
        ({"diffusion": 3}, "diffusion.steps is None"),
        ({"model": {"type": "prior", "hparams": {"xf_width": -1}}}, "xf_width is -1"),
        ({"model": {"type": "prior", "hparams": {"xf_heads": 3, "xf_width": 64}}}, "want a multiple of heads, 3"),
        ({"model": {"type": "prior", "hparams": {"xf_final_ln": False}}}, "xf_final_ln"),
    ],
)
def test_yaml_that_is_refused(karlo, tmp_path, changes, words):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**karlo_yaml(CONFIG.prior), **changes}))
    with pytest.raises(ValueError, match=words):
        open_karlo_prior(karlo, config=tmp_path / "x.yaml")


def test_another_architecture_needs_its_yaml(karlo):
    karlo.with_name(f"{karlo.name}.yaml").unlink()
    with pytest.raises(ValueError, match="not the published prior, and no yaml of Karlo's as config="):
        open_prior(karlo)


def test_kinds_are_told_apart(karlo, folder, original, small_clip, small_model, tmp_path):
    file, config = original
    with pytest.raises(ValueError, match="not a text-to-image prior"):
        open_prior(file)
    for source in (small_clip, small_model):
        with pytest.raises(ValueError, match="not a text-to-image prior"):
            open_prior(source)
    with pytest.raises(ValueError, match="is a prior on its own, not a Stable Diffusion checkpoint"):
        UnCLIPPipeline.from_pretrained(karlo)
    with pytest.raises(ValueError, match="text_encoder is only for Karlo's prior"):
        open_checkpoint(file, config=config, text_encoder=karlo)
    with pytest.raises(ValueError, match="ema: only for Stable Diffusion"):
        open_checkpoint(karlo, ema=True)
    with pytest.raises(ValueError, match="config: only for Karlo's own files"):
        open_prior(folder, config=config)
    with pytest.raises(ValueError, match="only diffusers folders have variants"):
        open_prior(karlo, variant="fp16")
    with pytest.raises(ValueError, match="no component has weights of variant 'fp16'"):
        open_prior(folder, variant="fp16")
    with pytest.raises(ValueError, match="unknown overrides ema"):
        TextToEmbeddingPrior.from_pretrained(karlo, ema=True)
    exact = dataclasses.replace(CONFIG, text_encoder=dataclasses.replace(CONFIG.text_encoder, activation="gelu"))
    with small_prior.checkpoint(exact) as checkpoint, pytest.raises(ValueError, match="activation 'gelu'"):
        save_original(checkpoint, tmp_path / "x.safetensors")
    for part in ("context_length", "projection"):
        assert part in str(_refusal(part))


def _refusal(part):
    tower = CONFIG.text_encoder
    changed = {"context_length": 5} if part == "context_length" else {"projection_dim": 8}
    with pytest.raises(ValueError, match="PriorCheckpointConfig: text_encoder") as caught:
        dataclasses.replace(CONFIG, text_encoder=dataclasses.replace(tower, **changed))
    return caught.value


def test_openais_own_archive_is_refused_with_advice(karlo, tmp_path):
    """ViT-L-14.pt as OpenAI publishes it is a TorchScript program."""
    with zipfile.ZipFile(tmp_path / "ViT-L-14.pt", "w") as archive:
        for name in ("ViT-L-14/data.pkl", "ViT-L-14/constants.pkl"):
            archive.writestr(name, b"\x80\x02}q\x00.")
    karlo.with_name(f"{karlo.name}.text_encoder.safetensors").unlink()
    with pytest.raises(ValueError, match=r"ViT-L-14\.pt.*is a TorchScript program.*state_dict\(\)"):
        open_prior(karlo)
