"""ControlNets in the original's layout and in diffusers', both ways, and what is refused."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from convert import engine, layouts
from convert.__main__ import main
from convert.export.controlnet import controlnet_json
from convert.export.diffusers import save_diffusers
from convert.export.original import save_original
from holes import write_holes
from tests.convert.controlnet_files import DESCRIBED, SHOWN, checkpoint, original_shapes
from tests.convert.diffusers_folder import write_json
from tests.convert.lossless import assert_lossless, foreign_arrays, unets
from tests.convert.published_files import shapes
from unclip_jax.checkpoints.config import CheckpointConfig, ControlNetCheckpointConfig, read_config
from unclip_jax.checkpoints.networks import abstract_params
from unclip_jax.checkpoints.source import open_checkpoint, open_controlnet
from unclip_jax.models.configs import ControlNetConfig

ROOT = "control_model."
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIGS = {"shown": SHOWN, "described": DESCRIBED}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Both small ControlNets in both layouts; not to be written to."""
    folder = tmp_path_factory.mktemp("controlnet")
    for name, config in CONFIGS.items():
        save_original(checkpoint(config), folder / f"{name}.safetensors")
        save_diffusers(checkpoint(config), folder / name)
    return folder


@pytest.fixture
def file(written, tmp_path):
    return Path(shutil.copy(written / "shown.safetensors", tmp_path))


@pytest.fixture
def model(written, tmp_path):
    return Path(shutil.copytree(written / "shown", tmp_path / "model"))


def assert_same(source, want, **options):
    with open_controlnet(source, **options) as opened:
        assert opened.config == ControlNetCheckpointConfig(want)
        params = checkpoint(want).params
        assert opened.params.keys() == params.keys()
        for name, parameter in params.items():
            np.testing.assert_array_equal(opened.params[name].read(), parameter.read(), strict=True)


# --- names ---------------------------------------------------------------------------------------------------------


@st.composite
def controlnets(draw):
    return ControlNetConfig(
        draw(unets()),
        conditioning_channels=draw(st.integers(1, 4)),
        conditioning_embedding_out_channels=tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))),
    )


def table(config, dialect, prefix=""):
    params = abstract_params(ControlNetCheckpointConfig(config))
    layouts.PARTS["controlnet"][dialect].table(t := engine.Table(params), prefix, config)
    return t.rules, params


@settings(max_examples=9)
@given(config=controlnets(), dialect=st.sampled_from(["ldm", "diffusers", "flax"]))
def test_tables_fit_any_controlnet(config, dialect):
    rules, params = table(config, dialect)
    engine.prove(rules, params)
    assert_lossless(rules, params, foreign_arrays(rules, params))


def test_names_of_each_kind():
    theirs = {
        dialect: {rule.ours.removeprefix("controlnet."): rule.foreign for rule in table(ControlNetConfig(), dialect)[0]}
        for dialect in ("ldm", "diffusers", "flax")
    }
    for ours, *want in (
        (
            "hint_embedding.blocks.4.kernel",
            "input_hint_block.10.weight",
            "controlnet_cond_embedding.blocks.4.weight",
            "controlnet_cond_embedding.blocks_4.kernel",
        ),
        (
            "hint_embedding.conv_out.bias",
            "input_hint_block.14.bias",
            "controlnet_cond_embedding.conv_out.bias",
            "controlnet_cond_embedding.conv_out.bias",
        ),
        (
            "zero_convs.11.kernel",
            "zero_convs.11.0.weight",
            "controlnet_down_blocks.11.weight",
            "controlnet_down_blocks_11.kernel",
        ),
        ("mid_zero_conv.bias", "middle_block_out.0.bias", "controlnet_mid_block.bias", "controlnet_mid_block.bias"),
        (
            "down_blocks.2.resample.kernel",
            "input_blocks.9.0.op.weight",
            "down_blocks.2.downsamplers.0.conv.weight",
            "down_blocks_2.downsamplers_0.conv.kernel",
        ),
    ):
        assert [theirs[dialect][ours] for dialect in theirs] == want


@pytest.mark.parametrize("root", ["", ROOT, "module.control_model.", "controlnet."])
@pytest.mark.parametrize("dialect", ["ldm", "diffusers"])
def test_published_tensors_under_every_root(dialect, root, tmp_path, capsys):
    """With names and shapes from elsewhere: diffusers' class, and the original's UNet with what cldm adds to it."""
    bare = shapes("controlnet-sd21") if dialect == "diffusers" else original_shapes()
    tensors = {f"{root}{name.removeprefix(ROOT)}": (shape, np.dtype(np.float16)) for name, (shape, _) in bare.items()}
    write_holes(tmp_path / "x.safetensors", tensors)
    assert main([str(tmp_path / "x.safetensors"), "--check"]) == 0
    assert capsys.readouterr().out.startswith(f"complete: {len(bare)} tensors are used")
    for opened in (open_controlnet, open_checkpoint):
        with opened(tmp_path / "x.safetensors") as found:
            assert found.config == ControlNetCheckpointConfig(ControlNetConfig())


def test_a_controlnet_beside_the_checkpoint_of_its_training(tmp_path, capsys):
    tensors = original_shapes() | shapes("v2-inference")
    write_holes(tmp_path / "x.safetensors", tensors)
    assert main([str(tmp_path / "x.safetensors"), "--check"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("complete: 340 tensors are used")
    assert 340 + sum(int(line.split()[0]) for line in others) == len(tensors)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_are_bit_equal(name, written, tmp_path, capsys):
    """Through each layout into each other one, on the command line."""
    config = CONFIGS[name]
    assert (written / f"{name}.safetensors.config.json").is_file() == (name == "described")
    assert_same(written / f"{name}.safetensors", config)
    assert_same(written / name, config)
    ours, orbax, there, back = (tmp_path / place for place in ("ours", "orbax", "there", "back.safetensors"))
    assert main([str(written / f"{name}.safetensors"), str(ours)]) == 0
    assert main([str(ours), str(orbax), "--to", "orbax"]) == 0
    assert main([str(orbax), str(there), "--to", "diffusers"]) == 0
    assert main([str(there), str(back), "--to", "original"]) == 0
    for path in (ours, orbax, there, back):
        assert_same(path, config)
        assert main([str(path), "--check"]) == 0
    assert "complete" in capsys.readouterr().out
    assert read_config(json.loads((ours / "config.json").read_text())) == ControlNetCheckpointConfig(config)
    for left, right in ((back, written / f"{name}.safetensors"), (there / WEIGHTS, written / name / WEIGHTS)):
        assert left.read_bytes() == right.read_bytes()


def test_a_dtype_is_written(file, tmp_path):
    assert main([str(file), str(tmp_path / "x"), "--to", "diffusers", "--dtype", "bfloat16"]) == 0
    assert {array.dtype for array in load_file(tmp_path / "x" / WEIGHTS).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_where_the_architecture_of_a_file_is_found(written, file, tmp_path):
    small = tmp_path / "a" / "b.safetensors"
    small.parent.mkdir()
    shutil.copy(written / "described.safetensors", small)
    with pytest.raises(ValueError, match=r"heads are 64 wide .* has 16 channels: give diffusers' config.json"):
        open_controlnet(small)
    config = written / "described" / "config.json"
    assert_same(small, DESCRIBED, config=config)
    with open_checkpoint(small, config=config) as opened:
        assert opened.config == ControlNetCheckpointConfig(DESCRIBED)
    assert main([str(small), "--check", "--config", str(config)]) == 0
    write_json(small.parent / "config.json", {"_class_name": "UNet2DConditionModel"})  # of something else
    with pytest.raises(ValueError, match="heads are 64 wide"):
        open_controlnet(small)
    shutil.copy(config, small.parent)
    assert_same(small, DESCRIBED)
    shutil.copy(written / "shown" / "config.json", f"{small}.config.json")  # its own comes first
    with pytest.raises(ValueError, match=r"^b\.safetensors: 4 missing: control_model\.input_hint_block\.4"):
        open_controlnet(small)


def test_folders(model, tmp_path):
    (model / WEIGHTS).rename(model / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ValueError, match=r"no weights; the folder holds config\.json"):
        open_controlnet(model)
    assert_same(model, SHOWN, variant="fp16")
    (model / "diffusion_pytorch_model.fp16.safetensors").rename(model / WEIGHTS)
    with pytest.raises(ValueError, match="model: no weights of variant 'fp16'"):
        open_controlnet(model, variant="fp16")
    pipe = tmp_path / "pipe"
    shutil.copytree(model, pipe / "controlnet")
    shutil.copytree(model, pipe / "controlnet_1")
    write_json(pipe / "model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]})
    assert_same(pipe, SHOWN)
    assert_same(pipe, SHOWN, subfolder="controlnet_1")
    write_json(pipe / "model_index.json", {"controlnet": ["diffusers", "MultiControlNetModel"]})
    with pytest.raises(ValueError, match=r"want a ControlNetModel; of several, name one's folder as subfolder="):
        open_controlnet(pipe)
    write_json(pipe / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    with pytest.raises(ValueError, match=r"pipe: model_index\.json: controlnet is None; want a ControlNetModel$"):
        open_controlnet(pipe)


@pytest.fixture(scope="module")
def pipeline(family_folder, tmp_path_factory):
    """A diffusers folder for text to image; not to be written to."""
    folder = tmp_path_factory.mktemp("pipeline") / "pipe"
    with open_checkpoint(family_folder("TEXT_TO_IMAGE")) as opened:
        save_diffusers(opened, folder)
    return folder


@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
def test_the_rest_of_a_pipeline_is_a_checkpoint(kind, pipeline, tmp_path):
    pipe = Path(shutil.copytree(pipeline, tmp_path / "pipe"))
    index = json.loads((pipe / "model_index.json").read_text())
    write_json(pipe / "model_index.json", {**index, "_class_name": f"StableDiffusionControlNet{kind}Pipeline"})
    with open_checkpoint(pipe) as opened, open_checkpoint(pipeline) as want:
        assert isinstance(opened.config, CheckpointConfig)
        assert opened.config == want.config
        assert opened.params.keys() == want.params.keys()


def test_flaxs_files(model):
    """As FlaxControlNetModel saved them: a map of maps, kernels in our layout."""
    tree = {}
    tensors = engine.export_tensors(table(SHOWN, "flax")[0], checkpoint(SHOWN).params)
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = np.array(tensor.read())
    (model / WEIGHTS).unlink()
    (model / "diffusion_flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    config = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", {**config, "_class_name": "FlaxControlNetModel"})
    assert_same(model, SHOWN)


def test_on_the_hub(hub_server, written, tmp_path):
    """Of a pipeline only the ControlNet is downloaded; beside a file comes what describes it."""
    model = {path.name: path.read_bytes() for path in (written / "described").iterdir()}
    inside = {f"controlnet/{name}": content for name, content in model.items()}
    index = json.dumps({"controlnet": ["diffusers", "ControlNetModel"]}).encode()
    single = {path.name: path.read_bytes() for path in written.glob("described.safetensors*")}
    hub_server.repos |= {
        "a/model": {"main": model},
        "a/pipe": {"main": {**inside, "model_index.json": index, f"unet/{WEIGHTS}": b"not asked for"}},
        "a/plain": {"main": {"model_index.json": index, f"unet/{WEIGHTS}": b"not asked for"}},
        "a/file": {"main": single},
    }
    for source in ("a/model", "a/pipe", "a/file/described.safetensors"):
        assert_same(source, DESCRIBED)
    with pytest.raises(ValueError, match=r"a/plain has no file or folder 'controlnet'; it has model_index\.json, unet"):
        open_controlnet("a/plain")
    assert f"unet/{WEIGHTS}" not in hub_server.bodies()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "_class_name is 'ControlNetUnionModel'"),
        ({"cross_attention_dim": 768}, "cross_attention_dim is 768, as in Stable Diffusion 1: these networks are"),
        ({"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "as in Stable Diffusion XL"),
        ({"addition_embed_type": "text"}, "addition_embed_type is 'text', which these networks do not have"),
        ({"encoder_hid_dim": 4}, "encoder_hid_dim is 4"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type is 'text_proj'"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        ({"transformer_layers_per_block": [1, 2]}, r"transformer_layers_per_block is \[1, 2\]; want the same"),
        ({"transformer_layers_per_block": 2}, "transformer_layers_per_block is 2"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is 'scale_shift'"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "accepted are 2 of CrossAttnDownBlock2D"),
        ({"controlnet_conditioning_channel_order": "grb"}, "controlnet_conditioning_channel_order is 'grb'"),
        ({"conditioning_embedding_out_channels": []}, "conditioning_embedding_out_channels is "),
        ({"conditioning_embedding_out_channels": [1 << 40]}, "conditioning_embedding_out_channels is "),
        ({"conditioning_embedding_out_channels": [1] * 9}, "want 1 to 8 widths"),
        ({"conditioning_channels": 0}, "conditioning_channels is 0"),
        ({"global_pool_conditions": "no"}, "global_pool_conditions is 'no'; want true or false"),
        ({"block_out_channels": [64, 96]}, "misshapen"),
        ({"layers_per_block": 2}, "missing: controlnet/down_blocks.0.resnets.1"),
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4}, "missing: .*class_embedding"),
    ],
)
def test_settings_that_are_refused(model, changes, words):
    config = controlnet_json(SHOWN)
    write_json(model / "config.json", {**config, **changes})
    for opened in (open_controlnet, open_checkpoint):
        with pytest.raises(ValueError, match=words) as caught:
            opened(model)
        assert "\n" not in str(caught.value)


def test_one_wrong_tensor_is_named(file):
    tensors = load_file(file)
    name = f"{ROOT}zero_convs.2.0.weight"
    for changed, words in (
        (
            {k: v for k, v in tensors.items() if k != name},
            rf"^shown.safetensors: 1 missing: {name} \(64, 64, 1, 1\)$",
        ),
        ({**tensors, name: tensors[name][1:]}, f"1 misshapen: {name} has shape"),
        ({**tensors, name: tensors[name].astype(np.int32)}, f"{name} has dtype int32"),
        ({**tensors, f"{ROOT}extra": tensors[name]}, f"1 unknown: {ROOT}extra"),
        ({**tensors, f"module.{name}": tensors[name]}, "one tensor is there twice"),
    ):
        save_file(changed, file)
        for opened in (open_controlnet, open_checkpoint):
            with pytest.raises(ValueError, match=words) as caught:
                opened(file)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("input_blocks.0.0.weight", "not a ControlNet: no input_blocks.0.0.weight of 4 axes"),
        ("input_blocks.1.0.in_layers.2.weight", "its tensors do not show its levels"),
        ("input_hint_block.0.weight", "no input_hint_block.0.weight of 4 axes"),
        ("middle_block.1.transformer_blocks.0.attn2.to_k.weight", "no middle_block.1.transformer_blocks.0.attn2.to_k"),
    ],
)
def test_shapes_that_show_no_architecture(gone, words, file, tmp_path):
    tensors = load_file(file)
    whole = tensors.pop(ROOT + gone)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=words):
        open_controlnet(file)
    save_file({**tensors, ROOT + gone: whole.reshape(-1)}, file)
    with pytest.raises(ValueError, match=words):
        open_controlnet(file)


def test_broken_files(file, model):
    for path in (file, model / WEIGHTS):
        path.write_bytes(path.read_bytes()[:-9])
    for source in (file, model):
        with pytest.raises(ValueError, match="safetensors") as caught:
            open_controlnet(source)
        assert "\n" not in str(caught.value)
    (model / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model/config\.json: "):
        open_controlnet(model)


def test_other_families_are_named(tmp_path):
    wide = {
        name: ((shape[0], 768) if ".attn2.to_k." in name or ".attn2.to_v." in name else shape, dtype)
        for name, (shape, dtype) in original_shapes().items()
    }
    write_holes(tmp_path / "x.safetensors", wide)
    with pytest.raises(ValueError, match=r"^x.safetensors: is of Stable Diffusion 1: these networks are Stable"):
        open_controlnet(tmp_path / "x.safetensors")


def test_kinds_are_told_apart(file, model, folder, original, small_clip, small_model, tmp_path):
    whole, config = original
    with pytest.raises(ValueError, match=r"is a whole checkpoint: give it as the source$"):
        open_controlnet(whole)
    bare = {
        name.removeprefix("model.diffusion_model."): value
        for name, value in shapes("v2-inference").items()
        if name.startswith("model.diffusion_model.")
    }
    write_holes(tmp_path / "unet.safetensors", bare)
    with pytest.raises(ValueError, match="is a UNet on its own: give the checkpoint that it belongs to as the source"):
        open_controlnet(tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"is a UNet on its own"):
        open_controlnet(folder / "unet")
    with pytest.raises(ValueError, match="is a CLIP model on its own, not a ControlNet"):
        open_controlnet(small_clip)
    with pytest.raises(ValueError, match=r"not a ControlNet: want the config\.json of diffusers' ControlNetModel"):
        open_controlnet(tmp_path)
    with pytest.raises(ValueError, match="is a Stable Diffusion checkpoint, not a ControlNet"):
        open_controlnet(small_model)
    with pytest.raises(ValueError, match=r"is a ControlNet, not a Stable Diffusion checkpoint"):
        open_checkpoint(file, vae=whole)
    with pytest.raises(ValueError, match=r"ema: only for other checkpoints, and .* is a ControlNet"):
        open_checkpoint(file, ema=True)
    for source in (model, small_model):
        with pytest.raises(ValueError, match="config: only for single files"):
            open_controlnet(source, config=config)
    with pytest.raises(ValueError, match="only diffusers folders have variants"):
        open_controlnet(file, variant="fp16")
    with pytest.raises(FileNotFoundError, match="config: no such file"):
        open_controlnet(file, config=tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"tiny.*\.yaml: "):
        open_controlnet(file, config=config)
    with pytest.raises(FileNotFoundError, match="source: no such file"):
        open_controlnet(tmp_path / "none")
