"""Recognising an architecture by the original's yaml, a diffusers folder's JSON, the tensors alone; refusing others."""

import copy
import dataclasses
import time

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.architecture.diffusers import from_folder
from convert.architecture.original import from_yaml
from convert.architecture.presets import COSINE, PRESETS
from convert.architecture.recognise import recognise
from convert.random import TINY, original_yaml
from convert.readers import CheckpointError, TensorInfo
from convert.rules import ldm
from tests.convert.diffusers_folder import CONFIG, FILES, write_configs, write_json
from tests.golden_weights import GOLDEN, inventory
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.models.configs import TextConfig, UNetConfig, VAEConfig, VisionConfig

PARAMS = "model.params"
YAML = yaml.safe_load((GOLDEN / "models" / "unclip_h" / "config.yaml").read_text("utf-8"))


def refused(call, *words):
    """`call` refuses in one line that holds these words."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def golden(name):
    model = GOLDEN / "models" / name
    return from_yaml(model / "config.yaml", inventory(model / "keys.tsv.gz"))


def write_yaml(folder, data):
    path = folder / "model.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), "utf-8")
    return path


def edited(data, path, value):
    """A copy with the value at a dotted path replaced, or removed where it is `...`."""
    data = copy.deepcopy(data)
    *outer, last = path.split(".")
    node = data
    for key in outer:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return data


# --- the original's yaml -------------------------------------------------------------------------------------------


def test_the_reduced_models():
    config = golden("unclip_h")
    assert config.unet == UNetConfig(
        block_out_channels=(32, 64, 128, 128),
        num_heads=(2, 4, 8, 8),
        cross_attention_dim=64,
        class_embedding="projection",
        class_embedding_size=96,
        sample_size=16,
    )
    assert config.vae == VAEConfig(block_out_channels=(32, 64, 128, 128))
    assert config.text_encoder == TextConfig(width=64, layers=2, heads=4, mlp_width=256)
    assert config.image_encoder == VisionConfig(width=80, layers=3, heads=4, mlp_width=320, projection_dim=48)
    assert config.image_noising == COSINE
    assert (config.reference, config.preprocess, config.scheduler) == ("original", "original", "ldm-ddim")
    chosen = {key: config.scheduler_config[key] for key in ("beta_start", "beta_end", "prediction_type")}
    assert chosen == {"beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"}


def test_the_openai_encoder_is_read_from_the_tensors():
    vision = VisionConfig(width=128, layers=3, heads=2, mlp_width=512, activation="quick_gelu", projection_dim=40)
    assert golden("unclip_l").image_encoder == vision


def test_what_the_random_checkpoints_say_of_themselves(tmp_path):
    assert from_yaml(write_yaml(tmp_path, original_yaml(TINY)), {}) == TINY


def test_published_names_and_the_text_to_image_model(tmp_path):
    """Towers by open_clip's name, epsilon prediction, the last layer, and no image encoder."""
    data = edited(YAML, "model.target", "ldm.models.diffusion.ddpm.LatentDiffusion")
    data = edited(data, f"{PARAMS}.parameterization", "eps")
    for key in ("arch", "model_cfg", "layer"):
        data = edited(data, f"{PARAMS}.cond_stage_config.params.{key}", ...)
    unet = f"{PARAMS}.unet_config.params"
    for key, value in (("context_dim", 1024), ("num_classes", None), ("adm_in_channels", ...)):
        data = edited(data, f"{unet}.{key}", value)
    config = from_yaml(write_yaml(tmp_path, data), {})
    assert config.text_encoder == TextConfig(layers=24)
    assert config.image_encoder is None
    assert config.image_noising is None
    assert config.unet.class_embedding is None
    assert config.scheduler_config["prediction_type"] == "epsilon"


UNET, VAE, TEXT = (f"{PARAMS}.{part}_config.params" for part in ("unet", "first_stage", "cond_stage"))
VISION, AUGMENTATION = f"{PARAMS}.embedder_config.params", f"{PARAMS}.noise_aug_config.params"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model", ..., ["model is missing or not a mapping"]),
        ("model", [1], ["model is missing or not a mapping"]),
        ("model.target", "os.system", ["model.target is 'os.system'", "LatentDiffusion"]),
        ("model.target", ["x"], ["model.target is ['x']"]),
        (PARAMS, ..., ["model.params is missing"]),
        (f"{PARAMS}.timesteps", 500, ["timesteps is 500", "want 1000"]),
        (f"{PARAMS}.parameterization", "x0", ["parameterization is 'x0'"]),
        (f"{PARAMS}.parameterization", ["v"], ["parameterization is ['v']"]),
        (f"{PARAMS}.linear_start", "low", ["linear_start is 'low'", "want float"]),
        (f"{PARAMS}.linear_start", 2.0, ["beta_start is 2.0"]),
        (f"{PARAMS}.scale_factor", True, ["scale_factor is True"]),
        (f"{PARAMS}.image_size", 1 << 30, ["image_size"]),
        (f"{PARAMS}.unet_config", ..., ["unet_config is missing"]),
        (f"{PARAMS}.unet_config.target", "subprocess.call", ["unet_config.target is 'subprocess.call'", "UNetModel"]),
        (f"{PARAMS}.unet_config.target", ["a"], ["unet_config.target is ['a']"]),
        (UNET, [1], ["unet_config.params is missing or not a mapping"]),
        (f"{UNET}.model_channels", ..., ["unet_config.model_channels is missing"]),
        (f"{UNET}.model_channels", "32", ["model_channels is '32'", "want int"]),
        (f"{UNET}.model_channels", 0, ["model_channels is 0"]),
        (f"{UNET}.model_channels", 33, ["33"]),
        (f"{UNET}.channel_mult", [1, -2, 4, 4], ["channel_mult", "positive integers"]),
        (f"{UNET}.channel_mult", [], ["block_out_channels ()"]),
        (f"{UNET}.num_res_blocks", [1, 2, 2, 2], ["num_res_blocks"]),
        (f"{UNET}.num_heads", 8, ["want one of num_heads and num_head_channels"]),
        (f"{UNET}.num_head_channels", "16", ["num_head_channels", "'16'"]),
        (f"{UNET}.num_head_channels", 24, ["num_head_channels is 24"]),
        (f"{UNET}.disable_self_attentions", [True], ["disable_self_attentions is [True]", "4"]),
        (f"{UNET}.num_classes", "continuous", ["num_classes is 'continuous'"]),
        (f"{UNET}.adm_in_channels", 90, ["adm_in_channels is 90", "96"]),
        (f"{UNET}.context_dim", 128, ["context_dim is 128", "64"]),
        (f"{UNET}.transformer_depth", 2, ["transformer_depth is 2", "accepted: 1"]),
        (f"{UNET}.use_scale_shift_norm", True, ["use_scale_shift_norm is True"]),
        (f"{UNET}.flash", True, ["options these networks do not know: flash"]),
        (f"{VAE}.embed_dim", 3, ["embed_dim is 3", "z_channels, 4"]),
        (f"{VAE}.ddconfig", ..., ["ddconfig is missing"]),
        (f"{VAE}.ddconfig.attn_resolutions", [16], ["attn_resolutions is [16]"]),
        (f"{VAE}.ddconfig.out_ch", 4, ["out_ch is 4"]),
        (f"{VAE}.ddconfig.tanh_out", True, ["options these networks do not know: tanh_out"]),
        (f"{TEXT}.layer", "hidden", ["layer is 'hidden'", "penultimate"]),
        (f"{TEXT}.model_cfg", ..., ["arch is 'ldm-tiny-H'", "ViT-H-14", "model_cfg"]),
        (f"{TEXT}.model_cfg.text_cfg", ..., ["text_cfg is missing"]),
        (f"{TEXT}.model_cfg.text_cfg.layers", 1, ["layers"]),
        (f"{TEXT}.model_cfg.text_cfg.heads", 5, ["heads"]),
        (f"{TEXT}.model_cfg.custom_text", True, ["custom_text"]),
        (f"{TEXT}.model_cfg.text_cfg.hf_model_name", "x", ["hf_model_name"]),
        (f"{VISION}.model_cfg", ..., ["embedder_config.arch is 'ldm-tiny-H'", "ViT-H-14", "model_cfg"]),
        (f"{VISION}.model_cfg.embed_dim", ..., ["embed_dim is missing"]),
        (f"{VISION}.model_cfg.vision_cfg.head_width", 21, ["80", "21"]),
        (f"{VISION}.model_cfg.vision_cfg.patch_size", 500, ["patch_size"]),
        (f"{VISION}.model_cfg.vision_cfg.timm_model_name", "x", ["timm_model_name"]),
        (f"{VISION}.projector", 1, ["projector"]),
        (f"{AUGMENTATION}.timestep_dim", 40, ["timestep_dim is 40", "48"]),
        (f"{AUGMENTATION}.noise_schedule_config.beta_schedule", "linear", ["beta_schedule is 'linear'"]),
        (f"{AUGMENTATION}.noise_schedule_config", ..., ["noise_schedule_config is missing"]),
        (f"{AUGMENTATION}.scale", 1, ["scale"]),
    ],
)  # fmt: skip
def test_yaml_that_describes_something_else(tmp_path, path, value, words):
    refused(lambda: from_yaml(write_yaml(tmp_path, edited(YAML, path, value)), {}), "model.yaml: ", *words)


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, ["aliases are not accepted"]),
        ("model: &m {target: *m}", ["aliases are not accepted"]),
        ("model: !!python/object/apply:os.system ['true']", ["not a yaml of plain data", "python/object"]),
        ("model: !!python/name:os.system", ["not a yaml of plain data"]),
        ("model: {target: [}", ["not a yaml of plain data"]),
        ("a: b: c", ["not a yaml of plain data"]),
        ("model: \x07", ["not a yaml of plain data"]),
        ("", ["the file is missing or not a mapping"]),
        ("- a\n- b", ["the file is missing or not a mapping"]),
        ("just text", ["the file is missing or not a mapping"]),
        ("{? [1, 2] : 3}", ["model.yaml"]),
        ("[" * 2000 + "]" * 2000, ["model.yaml"]),
        ("a: 2020-13-45", ["model.yaml"]),
        ("x" * ((1 << 20) + 1), ["1048577 bytes"]),
    ],
    ids=range(14),
)
def test_yaml_that_is_not_plain_data(tmp_path, text, words):
    start = time.process_time()
    refused(lambda: from_yaml(write_yaml(tmp_path, text), {}), "model.yaml", *words)
    assert time.process_time() - start < 5


def test_yaml_that_is_no_text(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\xff\xfe\x00model")
    refused(lambda: from_yaml(path, {}), "model.yaml: not a yaml of plain data")
    with pytest.raises(FileNotFoundError):
        from_yaml(tmp_path / "none.yaml", {})


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("conv1.weight", None, ["holds no OpenAI image encoder"]),
        ("conv1.weight", (128,), ["holds no OpenAI image encoder"]),
        ("conv1.weight", (100, 3, 14, 14), ["width 100"]),
        ("positional_embedding", (250, 128), ["250 positions"]),
        ("positional_embedding", (0, 128), ["0 positions"]),
        ("positional_embedding", (), ["holds no OpenAI image encoder"]),
        ("proj", None, ["holds no OpenAI image encoder"]),
    ],
)
def test_an_openai_encoder_that_is_none(name, shape, words):
    model = GOLDEN / "models" / "unclip_l"
    tensors = inventory(model / "keys.tsv.gz")
    key = f"embedder.model.visual.{name}"
    del tensors[key]
    if shape is not None:
        tensors[key] = TensorInfo(shape, np.dtype(np.float32))
    refused(lambda: from_yaml(model / "config.yaml", tensors), "config.yaml", *words)


ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        3,
        1 << 40,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "v",
        "x" * 50,
        [],
        [1],
        [[1]],
        ["a"],
        {},
        {"a": 1},
    ]
)


def leaves(node, path=""):
    """The dotted path of every value, mappings included."""
    for key, value in node.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")


def read_or_refused(call):
    """Either a configuration whose fields are all of their types (its JSON form reads back), or one line."""
    message = ""
    try:
        config = call()
    except CheckpointError as error:
        message = str(error)
    else:
        assert CheckpointConfig.from_json(config.to_json()) == config
    assert "\n" not in message


@settings(max_examples=300)
@given(path=st.sampled_from(list(leaves(YAML))), value=ODD)
def test_any_change_of_a_yaml_is_read_or_refused(tmp_path_factory, path, value):
    file = write_yaml(tmp_path_factory.getbasetemp(), edited(YAML, path, value))
    read_or_refused(lambda: from_yaml(file, {}))


# --- diffusers' JSON files -----------------------------------------------------------------------------------------


def test_a_folder(tmp_path):
    assert from_folder(write_configs(tmp_path)) == CONFIG


def test_other_ways_to_say_the_same(tmp_path):
    """Old preprocessing files, defaults written out, one value for each level."""
    changes = {
        ("feature_extractor/preprocessor_config.json", "size"): 56,
        ("feature_extractor/preprocessor_config.json", "crop_size"): 56,
        ("unet/config.json", "layers_per_block"): [1, 1],
        ("unet/config.json", "num_attention_heads"): [2, 4],
        ("unet/config.json", "attention_head_dim"): 7,
        ("unet/config.json", "only_cross_attention"): [False, False],
        ("unet/config.json", "cross_attention_dim"): [16, 16],
        ("unet/config.json", "sample_size"): [8, 8],
        ("unet/config.json", "transformer_layers_per_block"): [1, 1],
        ("vae/config.json", "scaling_factor"): 0.18215,
        ("vae/config.json", "layers_per_block"): 1,
    }
    assert from_folder(write_configs(tmp_path, changes)) == CONFIG


def test_a_text_to_image_folder(tmp_path):
    changes = {
        ("model_index.json", "_class_name"): "StableDiffusionPipeline",
        **{
            ("model_index.json", name): ... for name in ("image_encoder", "image_normalizer", "image_noising_scheduler")
        },
        **{("unet/config.json", key): None for key in ("class_embed_type", "projection_class_embeddings_input_dim")},
        ("model_index.json", "scheduler"): ["diffusers", "DDIMScheduler"],
    }
    unet = dataclasses.replace(CONFIG.unet, class_embedding=None, class_embedding_size=None)
    config = from_folder(write_configs(tmp_path, changes))
    scheduler = {**CONFIG.scheduler_config, "_class_name": "DDIMScheduler"}
    assert config == dataclasses.replace(
        CONFIG, unet=unet, image_encoder=None, image_noising=None, scheduler="ddim", scheduler_config=scheduler
    )


@pytest.mark.parametrize("said", ["EulerDiscreteScheduler", "RePaintScheduler", ["DDIMScheduler"], ...])
def test_the_index_says_which_class_the_schedulers_settings_are_of(tmp_path, said):
    """Whatever the settings say, as in diffusers; Flax pipelines have classes of their own for the same settings."""
    changes = {
        ("model_index.json", "scheduler"): ["diffusers", "FlaxDDIMScheduler"],
        ("scheduler/scheduler_config.json", "_class_name"): said,
        ("scheduler/scheduler_config.json", "steps_offset"): 3,
        ("scheduler/scheduler_config.json", "set_alpha_to_one"): True,
        ("scheduler/scheduler_config.json", "_use_default_values"): ["set_alpha_to_one"],  # of what diffusers saved
    }
    config = from_folder(write_configs(tmp_path, changes))
    kept = {key: value for key, value in CONFIG.scheduler_config.items() if key != "set_alpha_to_one"}
    assert config.scheduler == "ddim"
    assert config.scheduler_config == {**kept, "_class_name": "DDIMScheduler", "steps_offset": 3}


def test_an_upscaler_unet(tmp_path):
    """A table of class embeddings, and levels that only look at the text."""
    changes = {
        ("model_index.json", "_class_name"): "StableDiffusionPipeline",
        ("unet/config.json", "class_embed_type"): None,
        ("unet/config.json", "num_class_embeds"): 1000,
        ("unet/config.json", "only_cross_attention"): [True, False],
        ("unet/config.json", "in_channels"): 7,
    }
    unet = from_folder(write_configs(tmp_path, changes)).unet
    assert (unet.class_embedding, unet.class_embedding_size) == ("table", 1000)
    assert (unet.only_cross_attention, unet.in_channels) == ((True, False), 7)


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("model_index.json", "_class_name", "SanaPipeline", ["'SanaPipeline'", "StableUnCLIPImg2ImgPipeline"]),
        ("model_index.json", "_class_name", ["a"], ["_class_name is ['a']"]),
        ("model_index.json", "vae", ..., ["vae is None", "needs it"]),
        ("model_index.json", "image_encoder", [None, None], ["image_encoder is [None, None]"]),
        ("unet/config.json", "act_fn", "gelu", ["act_fn is 'gelu'"]),
        ("unet/config.json", "addition_embed_type", "text", ["addition_embed_type is 'text'"]),
        ("unet/config.json", "block_out_channels", [32, "64"], ["block_out_channels is [32, '64']"]),
        ("unet/config.json", "block_out_channels", [30, 60], ["30 is not divisible"]),
        ("unet/config.json", "block_out_channels", [-32, 64], ["block_out_channels"]),
        ("unet/config.json", "class_embed_type", "timestep", ["class_embed_type is 'timestep'"]),
        ("unet/config.json", "projection_class_embeddings_input_dim", 20, ["is 20", "asks for 16"]),
        ("unet/config.json", "projection_class_embeddings_input_dim", ..., ["projection_class_embeddings_input_dim"]),
        ("unet/config.json", "cross_attention_dim", 32, ["cross_attention_dim is 32", "hidden_size 16"]),
        ("unet/config.json", "cross_attention_dim", "16", ["cross_attention_dim"]),
        ("unet/config.json", "cross_attention_dim", [16, 24], ["cross_attention_dim"]),
        ("unet/config.json", "down_block_types", ["DownBlock2D"], ["down_block_types"]),
        ("unet/config.json", "up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"], ["up_block_types"]),
        ("unet/config.json", "attention_head_dim", [2], ["attention_head_dim is [2]", "2"]),
        ("unet/config.json", "attention_head_dim", 5, ["not divisible by num_heads=5"]),
        ("unet/config.json", "attention_head_dim", "2", ["attention_head_dim"]),
        ("unet/config.json", "layers_per_block", [1, 2], ["layers_per_block"]),
        ("unet/config.json", "layers_per_block", "1", ["layers_per_block"]),
        ("unet/config.json", "layers_per_block", 0, ["layers_per_block"]),
        ("unet/config.json", "norm_num_groups", 0, ["norm_num_groups is 0"]),
        ("unet/config.json", "transformer_layers_per_block", 2, ["transformer_layers_per_block is 2"]),
        ("unet/config.json", "transformer_layers_per_block", [[1], [2]], ["transformer_layers_per_block"]),
        ("unet/config.json", "sample_size", "8", ["sample_size is '8'"]),
        ("unet/config.json", "sample_size", [8, 9], ["sample_size is [8, 9]"]),
        ("vae/config.json", "down_block_types", ["DownEncoderBlock2D"], ["down_block_types"]),
        ("vae/config.json", "scaling_factor", "0.18", ["scaling_factor is '0.18'"]),
        ("vae/config.json", "scaling_factor", 0, ["scaling_factor is 0"]),
        ("vae/config.json", "shift_factor", 0.1, ["shift_factor is 0.1"]),
        ("vae/config.json", "use_quant_conv", False, ["use_quant_conv is False"]),
        ("vae/config.json", "block_out_channels", [15, 30], ["block_out_channels"]),
        ("vae/config.json", "out_channels", 4, ["out_channels is 4"]),
        ("text_encoder/config.json", "hidden_act", "relu", ["hidden_act is 'relu'", "quick_gelu"]),
        ("text_encoder/config.json", "hidden_act", ["gelu"], ["hidden_act is ['gelu']"]),
        ("text_encoder/config.json", "num_hidden_layers", 2.0, ["num_hidden_layers is 2.0"]),
        ("text_encoder/config.json", "num_attention_heads", 3, ["width is 16; want a multiple of heads, 3"]),
        ("text_encoder/config.json", "use_attention_mask", True, ["use_attention_mask is True"]),
        ("image_encoder/config.json", "num_channels", 4, ["num_channels is 4"]),
        ("image_encoder/config.json", "num_attention_heads", 3, ["width is 16; want a multiple of heads, 3"]),
        ("image_encoder/config.json", "patch_size", 100, ["patch_size"]),
        ("image_noising_scheduler/scheduler_config.json", "beta_schedule", "sigmoid", ["'sigmoid'"]),
        ("image_noising_scheduler/scheduler_config.json", "num_train_timesteps", 500, ["num_train_timesteps is 500"]),
        ("image_noising_scheduler/scheduler_config.json", "beta_start", "x", ["beta_start is 'x'"]),
        ("feature_extractor/preprocessor_config.json", "size", {"shortest_edge": 224}, ["size is", "56 pixels"]),
        ("feature_extractor/preprocessor_config.json", "crop_size", {"height": 56, "width": 60}, ["crop_size"]),
        ("feature_extractor/preprocessor_config.json", "resample", 2, ["resample is 2"]),
        ("feature_extractor/preprocessor_config.json", "do_normalize", False, ["do_normalize is False"]),
        ("feature_extractor/preprocessor_config.json", "image_mean", [0.5, 0.5, 0.5], ["image_mean"]),
        ("model_index.json", "scheduler", ["diffusers", "RePaintScheduler"], ["EulerDiscreteScheduler"]),
    ],
)  # fmt: skip
def test_folders_that_describe_something_else(tmp_path, file, key, value, words):
    refused(lambda: from_folder(write_configs(tmp_path, {(file, key): value})), file, *words)


@pytest.mark.parametrize("file", [name for name in FILES if not name.startswith("image_normalizer")])
def test_folders_with_a_broken_file(tmp_path, file):
    write_configs(tmp_path)
    path = tmp_path / file
    where = file if "/" in file else "model_index.json"
    for content, words in (
        (b"{", "not valid JSON"),
        (b"[1]", "holds a list; want a JSON object"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ):
        path.write_bytes(content)
        refused(lambda: from_folder(tmp_path), where, words)
    path.unlink()
    refused(lambda: from_folder(tmp_path), where, "missing")


def test_a_configuration_of_many_bytes(tmp_path):
    write_configs(tmp_path)
    with open(tmp_path / "unet" / "config.json", "wb") as file:
        file.truncate((1 << 24) + 1)
    refused(lambda: from_folder(tmp_path), "unet/config.json", "more than 16777216 bytes")


@settings(max_examples=300)
@given(place=st.sampled_from([(file, key) for file, data in FILES.items() for key in data]), value=ODD)
def test_any_change_of_a_folder_is_read_or_refused(tmp_path_factory, place, value):
    file, key = place
    folder = tmp_path_factory.getbasetemp() / "folder"
    write_configs(folder)
    write_json(folder / file, {**FILES[file], key: value})
    read_or_refused(lambda: from_folder(folder))


# --- the tensors alone ---------------------------------------------------------------------------------------------


def recognised(tensors, **options):
    return recognise(tensors, ldm.PLACES, "x.ckpt", **{"metadata": {}, **options})


@pytest.mark.parametrize("which", ["h", "l"])
def test_published_tensors_are_recognised(which):
    tensors = inventory(GOLDEN / "inventory" / f"v2-1-stable-unclip-{which}.tsv.gz")
    assert recognised(tensors) == (PRESETS[f"sd21-unclip-{which}"], "")


def test_the_nearest_checkpoint_is_named():
    tensors = inventory(GOLDEN / "inventory" / "v2-1-stable-unclip-l.tsv.gz")
    del tensors["model.diffusion_model.out.2.bias"]
    refused(
        lambda: recognised(tensors),
        f"x.ckpt: its tensors are no published checkpoint's ({', '.join(PRESETS)}), and no config= was given",
        "against sd21-unclip-l: 1 missing: model.diffusion_model.out.2.bias (4,)",
    )
    refused(lambda: recognised({}), "missing")
