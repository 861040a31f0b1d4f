"""Files without a description: which architecture they are of, what their UNet predicts, and what else they may be."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from convert import layouts
from convert.__main__ import main
from convert.adapters import read_lora, read_textual_inversion
from convert.architecture.presets import PRESETS, look_alikes
from convert.architecture.recognise import TELLTALE, V_FROM, recognise, said_prediction
from convert.engine import foreign_shape
from convert.export.original_yaml import original_yaml
from convert.kinds import kind_of
from convert.layouts import Place
from convert.readers import TensorInfo
from convert.rules import ldm
from convert.source import open_original
from holes import write_holes
from tests.convert import other_writers
from tests.convert.other_writers import TEXT_TO_IMAGE, Writer
from tests.convert.published_files import HALF, file_params, published
from unclip_jax.checkpoints.source import open_checkpoint


@pytest.fixture(scope="module")
def ambiguous():
    """Those of 512-base, and of 768-v."""
    return published("768-v")


def recognised(tensors, **options):
    places, names = layouts.locate(tensors, ldm.PLACES)
    assert names == {name: name for name in tensors}
    return recognise(tensors, places, "x.safetensors", **{"metadata": {}, **options})


# --- epsilon or v ----------------------------------------------------------------------------------------------------


def of_spread(spread):
    """A reader of the tensor that the guess is by, with values of this standard deviation."""
    name = layouts.foreign_names("unet", ldm.PLACES, {TELLTALE: 1})[TELLTALE]
    assert name == "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"

    def read(asked):
        assert asked == name, "nothing else is read"
        return np.tile([spread, -spread], 160).astype(np.float16)

    return read


@pytest.mark.parametrize(("spread", "preset"), [(0.2, "768-v"), (0.12, "768-v"), (0.05, "512-base"), (0.0, "512-base")])
def test_the_guess_says_that_it_is_one(ambiguous, spread, preset):
    config, note = recognised(ambiguous, read=of_spread(spread))
    assert config == PRESETS[preset]
    other = "epsilon" if preset == "768-v" else "v_prediction"
    assert "guess" in note
    assert f"prediction_type={other!r}" in note


def test_the_threshold_of_the_guess(ambiguous):
    assert recognised(ambiguous, read=of_spread(V_FROM + 1e-3))[0] == PRESETS["768-v"]
    assert recognised(ambiguous, read=of_spread(V_FROM - 1e-3))[0] == PRESETS["512-base"]


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-v2-768-v"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v1"}, None),
        ({"modelspec.architecture": "stable-diffusion-v2-1"}, None),
        ({"format": "pt"}, None),
    ],
)
def test_metadata_is_believed(ambiguous, metadata, prediction):
    assert said_prediction(ambiguous, metadata) == prediction
    config, note = recognised(ambiguous, metadata=metadata, read=of_spread(0.2 if prediction == "epsilon" else 0.01))
    assert config.scheduler_config["prediction_type"] == (prediction or "epsilon")
    assert bool(note) == (prediction is None)


@pytest.mark.parametrize(
    ("resolution", "size"), [("768x768", 96), ("512x512", 64), ("640", 80), ("512x768", 96), ("500x500", 96), ("", 96)]
)
def test_the_size_of_images_is_read_from_metadata(ambiguous, resolution, size):
    metadata = {"modelspec.prediction_type": "v", "modelspec.resolution": resolution}
    assert recognised(ambiguous, metadata=metadata)[0].unet.sample_size == size


def test_marks_are_believed(ambiguous):
    mark = {"v_pred": TensorInfo((0,), np.dtype(np.float32))}
    assert recognised(ambiguous | mark, read=of_spread(0.01)) == (PRESETS["768-v"], "")


def test_a_given_prediction_overrules_all(ambiguous):
    metadata, mark = {"modelspec.prediction_type": "v"}, {"v_pred": TensorInfo((0,), HALF)}
    given = recognised(ambiguous | mark, metadata=metadata, prediction="epsilon", read=of_spread(0.2))
    assert given == (PRESETS["512-base"], "")
    other, note = recognised(published("512-inpainting"), prediction="v_prediction")
    assert other.scheduler_config["prediction_type"] == "v_prediction"
    assert other.task == "inpaint"
    assert note == ""


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"512-base", "768-v"}))
def test_others_are_known_by_their_tensors_alone(name):
    assert recognised(published(name)) == (PRESETS[name], "")


@pytest.mark.parametrize("name", ["sd21-unclip-l", "768-v"])
def test_other_dialects_are_recognised(name):
    """As ComfyUI, sgm and converters write them."""
    places = {
        "unet": Place("model.diffusion_model.", "diffusers"),
        "vae": Place("first_stage_model.", "diffusers"),
        "text_encoder": Place("conditioner.embedders.0.transformer.", "transformers"),
        "image_encoder": Place("embedder.model.visual.", "transformers"),
    }
    tensors = published(name, places)
    found, _ = layouts.locate(tensors, ldm.PLACES)
    reports = look_alikes(tensors, found)
    assert name in [preset for preset, report in reports.items() if report.complete]
    config, _ = recognise(tensors, found, "x", metadata={}, prediction=None)
    assert config.image_encoder == PRESETS[name].image_encoder


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small text-to-image file, its yaml, and a folder to write beside."""
    folder = tmp_path_factory.mktemp("small")
    return other_writers.write(folder, TEXT_TO_IMAGE, Writer()), yaml.safe_dump(original_yaml(TEXT_TO_IMAGE))


def prediction(source, **options):
    with open_checkpoint(source, **options) as checkpoint:
        return checkpoint.config.scheduler_config["prediction_type"]


@pytest.mark.parametrize("beside", ["model.yaml", "model.safetensors.yaml"])
def test_a_yaml_of_the_same_name_is_read(small, tmp_path, beside):
    file, text = small
    shutil.copy(file, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="config="):
        open_checkpoint(tmp_path / "model.safetensors")
    v = yaml.safe_load(text)
    v["model"]["params"]["parameterization"] = "v"
    (tmp_path / beside).write_text(yaml.safe_dump(v))
    (tmp_path / "other.yaml").write_text(text)
    assert prediction(tmp_path / "model.safetensors") == "v_prediction"
    assert prediction(tmp_path / "model.safetensors", prediction_type="epsilon") == "epsilon"
    assert prediction(tmp_path / "model.safetensors", config=tmp_path / "other.yaml") == "epsilon"
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert tmp_path / beside in checkpoint.files  # for provenance


def test_a_broken_yaml_beside_is_named(small, tmp_path):
    shutil.copy(small[0], tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_text("model: [")
    with pytest.raises(ValueError, match=r"model\.yaml: not a yaml"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_schedule_that_ends_without_signal(small, tmp_path):
    """ztsnr, as ComfyUI and trainers mark it: believed, and run by diffusers' DDIM with trailing timesteps."""
    _, text = small
    (tmp_path / "x.yaml").write_text(text.replace("parameterization: eps", "parameterization: v"))
    tensors = other_writers.tensors(TEXT_TO_IMAGE, Writer())
    save_file(tensors | {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        config = checkpoint.config
    assert config.scheduler == "ddim"
    assert config.scheduler_config["rescale_betas_zero_snr"] is True
    assert config.scheduler_config["timestep_spacing"] == "trailing"
    assert config.scheduler_config["_class_name"] == "DDIMScheduler"


def test_folders_take_a_prediction_type(folder):
    assert prediction(folder) == "v_prediction"
    assert prediction(folder, prediction_type="epsilon") == "epsilon"
    with pytest.raises(ValueError, match="prediction_type is 'v'; accepted: epsilon, v_prediction, sample"):
        open_checkpoint(folder, prediction_type="v")


def test_a_full_size_file_is_guessed_with_a_warning(ambiguous, tmp_path):
    """Of zeros, which is epsilon by the guess; whoever knows better says so."""
    path = tmp_path / "community.safetensors"
    write_holes(path, {name: (info.shape, info.dtype) for name, info in ambiguous.items()})
    with pytest.warns(UserWarning, match=re.escape("prediction_type='v_prediction'")):
        assert prediction(path) == "epsilon"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_original(path, prediction_type="v_prediction") as checkpoint:
            assert checkpoint.config == PRESETS["768-v"]
    (tmp_path / "community.yaml").write_text(yaml.safe_dump(original_yaml(PRESETS["768-v"])))
    assert prediction(path) == "v_prediction"


def test_check_reads_no_data_and_says_so(ambiguous, tmp_path, capsys):
    path = tmp_path / "community.safetensors"
    write_holes(path, {name: (info.shape, info.dtype) for name, info in ambiguous.items()})
    assert main([str(path), "--check"]) == 0
    said = capsys.readouterr().out
    assert "the same in 768-v and 512-base" in said
    assert "not read" in said
    assert main([str(path), "--check", "--prediction-type", "v_prediction"]) == 0
    assert "not read" not in capsys.readouterr().out


# --- files of another kind -------------------------------------------------------------------------------------------


def infos(**shapes):
    return {name: TensorInfo(shape, HALF) for name, shape in shapes.items()}


def bare(name, prefix):
    """A part's tensors on their own."""
    return {key.removeprefix(prefix): info for key, info in published(name).items() if key.startswith(prefix)}


def without(tensors, *prefixes):
    return {name: info for name, info in tensors.items() if not name.startswith(prefixes)}


def in_dialect(component, dialect, prefix=""):
    params = file_params("sd21-unclip-l")
    rules = layouts.table(PRESETS["sd21-unclip-l"], params, {component: Place(prefix, dialect)}).rules
    return {rule.foreign: TensorInfo(foreign_shape(rule, params), HALF) for rule in rules}


def stable_diffusion_1():
    text = {f"cond_stage_model.transformer.text_model.encoder.layers.{i}.layer_norm1.weight": (768,) for i in range(12)}
    unet = without(published("512-base"), "cond_stage_model.")
    narrow = {
        n: TensorInfo((i.shape[0], 768), HALF) if "attn2.to_" in n and "to_q" not in n else i for n, i in unet.items()
    }
    return {n: i for n, i in narrow.items() if "attn2.to_out" not in n} | infos(**text)


# A function that makes a file's tensors, and what the file is said to be.
KINDS = {
    "a LoRA of kohya": (lambda: infos(lora_unet_mid_block_attentions_0_proj_in__x=(4, 4)), "is a LoRA"),
    "a LoRA of diffusers": (
        lambda: {"unet.mid_block.attn1.to_q.lora_A.weight": TensorInfo((4, 320), HALF)},
        "is a LoRA",
    ),
    "a LoRA of peft": (lambda: {"base_model.model.x.lora_B.weight": TensorInfo((4, 4), HALF)}, "is a LoRA"),
    "an older LoRA": (lambda: {"x.processor.to_q_lora.down.weight": TensorInfo((4, 4), HALF)}, "is a LoRA"),
    "a LoHa": (lambda: {"x.hada_w1_a": TensorInfo((4, 4), HALF)}, "is a LoRA or another adapter"),
    "a learnt word": (lambda: infos(emb_params=(2, 1024)), "is a textual inversion"),
    "a learnt word of diffusers": (lambda: {"<cat-toy>": TensorInfo((1024,), HALF)}, "as a textual inversion does"),
    "a ControlNet": (
        lambda: {"controlnet_cond_embedding.conv_in.weight": TensorInfo((16, 3, 3, 3), HALF)},
        "is a ControlNet",
    ),
    "an original ControlNet": (
        lambda: {"control_model.zero_convs.0.0.weight": TensorInfo((4, 4, 1, 1), HALF)},
        "is a ControlNet",
    ),
    "a VAE": (lambda: bare("768-v", "first_stage_model."), "is a VAE on its own"),
    "a VAE with its root": (
        lambda: {n: i for n, i in published("768-v").items() if n.startswith("first_stage_model.")},
        "is a VAE on its own",
    ),
    "a VAE of diffusers": (lambda: in_dialect("vae", "diffusers"), "is a VAE on its own"),
    "a UNet": (lambda: bare("768-v", "model.diffusion_model."), "is a UNet on its own"),
    "a UNet of diffusers": (lambda: in_dialect("unet", "diffusers"), "is a UNet on its own"),
    "a text encoder": (lambda: bare("768-v", "cond_stage_model.model."), "is a text encoder on its own"),
    "a text encoder of transformers": (
        lambda: in_dialect("text_encoder", "transformers"),
        "is a text encoder on its own",
    ),
    "an image encoder": (lambda: in_dialect("image_encoder", "transformers"), "is an image encoder on its own"),
    "without the VAE": (lambda: without(published("768-v"), "first_stage_model."), "without its VAE: give vae="),
    "without the UNet": (lambda: without(published("768-v"), "model."), "without its UNet: give unet="),
    "without UNet and VAE": (
        lambda: without(published("sd21-unclip-l"), "model.", "first_"),
        "without its UNet and VAE",
    ),
    "without the text encoder": (lambda: without(published("768-v"), "cond_"), "without its text encoder"),
    "Stable Diffusion 1": (stable_diffusion_1, "is of Stable Diffusion 1:"),
    "Stable Diffusion XL": (
        lambda: {"conditioner.embedders.1.model.ln_final.weight": TensorInfo((1280,), HALF)},
        "is Stable Diffusion XL",
    ),
    "a UNet of Stable Diffusion XL": (
        lambda: {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": TensorInfo((640, 2048), HALF)},
        "is of Stable Diffusion XL",
    ),
    "Stable Diffusion 3": (
        lambda: {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": TensorInfo((4, 4), HALF)},
        "is Stable Diffusion 3",
    ),
    "the upscaler by two": (
        lambda: {"down_blocks.0.resnets.0.norm1.linear.weight": TensorInfo((4, 4), HALF)},
        "upscaler by two",
    ),
    "a safety checker": (lambda: {"concept_embeds": TensorInfo((17, 768), HALF)}, "is a safety checker"),
    "Karlo's prior": (lambda: {"model.prd_emb": TensorInfo((1, 1, 2048), HALF)}, "is a text-to-image prior"),
}


@pytest.mark.parametrize("name", KINDS)
def test_files_of_another_kind_are_named(name, tmp_path):
    make, words = KINDS[name]
    tensors = make()
    assert words in kind_of(tensors)
    if name in ("Karlo's prior", "a ControlNet", "an original ControlNet"):
        return  # has a reader of its own
    path = tmp_path / "file.safetensors"
    write_holes(path, {key: (info.shape, info.dtype) for key, info in tensors.items()})
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_whole_checkpoints_are_of_no_other_kind(name):
    assert kind_of(published(name)) == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a learnt word", "is a textual inversion"),
        (
            "a ControlNet",
            "is a ControlNet: give the checkpoint that it controls as the source, and this as controlnet=",
        ),
        ("a UNet", "is a UNet on its own"),
        ("a VAE of diffusers", "is a VAE on its own"),
        ("Stable Diffusion 1", "is of Stable Diffusion 1"),
        ("whole", "is a whole checkpoint: give it as the source"),
    ],
)
def test_what_is_no_lora_is_named(name, words, ambiguous, tmp_path):
    tensors = ambiguous if name == "whole" else KINDS[name][0]()
    write_holes(tmp_path / "x.safetensors", {key: (info.shape, info.dtype) for key, info in tensors.items()})
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_lora(tmp_path / "x.safetensors", PRESETS["768-v"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "words"), [("a LoRA of diffusers", "is a LoRA"), ("a VAE", "is a VAE on its own")])
def test_what_is_no_word_is_named(name, words, tmp_path):
    tensors = KINDS[name][0]()
    write_holes(tmp_path / "x.safetensors", {key: (info.shape, info.dtype) for key, info in tensors.items()})
    with pytest.raises(ValueError, match=re.escape(words)):
        read_textual_inversion(tmp_path / "x.safetensors", PRESETS["768-v"])


FOLDERS = {
    "is Stable Diffusion XL": {"model_index.json": {"_class_name": "StableDiffusionXLPipeline"}},
    "upscaler by two": {"model_index.json": {"_class_name": "StableDiffusionLatentUpscalePipeline"}},
    "is a ControlNet": {"model_index.json": {"_class_name": "StableDiffusionControlNetXSPipeline"}},
    "is Flux": {"model_index.json": {"_class_name": "FluxControlNetPipeline"}},
    "is a UNet on its own": {"config.json": {"_class_name": "UNet2DConditionModel"}},
    "is a VAE on its own": {"config.json": {"_class_name": "AutoencoderKL"}},
    "is a text encoder on its own": {"config.json": {"architectures": ["CLIPTextModel"]}},
    "is an image encoder on its own": {"config.json": {"model_type": "clip_vision_model"}},
    "is a safety checker": {"config.json": {"architectures": ["StableDiffusionSafetyChecker"], "model_type": "clip_"}},
    "is a LoRA": {"adapter_config.json": {"peft_type": "LORA"}},
    "is a textual inversion": {"learned_embeds.bin": {}},
    "is an estimator of intrinsic images": {"model_index.json": {"_class_name": "MarigoldIntrinsicsPipeline"}},
    "_class_name is 'SomePipeline'; accepted:": {"model_index.json": {"_class_name": "SomePipeline"}},
    "neither a converted checkpoint": {"config.json": {"model_type": 3, "architectures": "x"}, "readme.txt": {}},
}


@pytest.mark.parametrize("words", FOLDERS)
def test_folders_of_another_kind_are_named(words, tmp_path):
    for name, content in FOLDERS[words].items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


# --- parts from elsewhere --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(small, tmp_path_factory):
    """The small checkpoint without its VAE, and VAE and UNet of other numbers on their own, by what holds them."""
    folder = tmp_path_factory.mktemp("parts")
    tensors = other_writers.tensors(TEXT_TO_IMAGE, Writer())
    made = {"yaml": folder / "x.yaml", "whole": small[0]}
    made["yaml"].write_text(small[1])
    save_file(
        {n: a for n, a in tensors.items() if not n.startswith("first_stage_model.")}, folder / "no-vae.safetensors"
    )
    made["no vae"] = folder / "no-vae.safetensors"
    other = {name: array + np.float32(0.5) for name, array in tensors.items()}
    save_file(other, folder / "other.safetensors")
    made["other"] = folder / "other.safetensors"
    for part, prefix in (("vae", "first_stage_model."), ("unet", "model.diffusion_model.")):
        held = {n: a for n, a in other.items() if n.startswith(prefix)}
        save_file(held, folder / f"{part}-rooted.safetensors")
        save_file({n.removeprefix(prefix): a for n, a in held.items()}, folder / f"{part}-bare.safetensors")
        made[part] = [folder / f"{part}-rooted.safetensors", folder / f"{part}-bare.safetensors", made["other"]]
    run = [str(made["other"]), "--config", str(made["yaml"])]
    assert main([run[0], str(folder / "converted"), *run[1:]]) == 0
    assert main([run[0], str(folder / "diffusers"), *run[1:], "--to", "diffusers"]) == 0
    for part in ("vae", "unet"):
        made[part] += [folder / "converted", folder / "diffusers", folder / "diffusers" / part]
    return made


def read(source, **options):
    with open_checkpoint(source, **options) as checkpoint:
        return {name: np.array(parameter.read()) for name, parameter in checkpoint.params.items()}


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_part_from_elsewhere(parts, part):
    own, other = (read(parts[which], config=parts["yaml"]) for which in ("whole", "other"))
    want = {name: (other if name.startswith(f"{part}.") else own)[name] for name in own}
    for source in parts[part]:
        got = read(parts["whole"], config=parts["yaml"], **{part: source})
        assert got.keys() == want.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, strict=True)


def test_a_checkpoint_without_its_vae_takes_another(parts):
    with pytest.raises(ValueError, match="without its VAE: give vae="):
        open_checkpoint(parts["no vae"], config=parts["yaml"])
    got, other = (
        read(parts["no vae"], config=parts["yaml"], vae=parts["vae"][0]),
        read(parts["other"], config=parts["yaml"]),
    )
    np.testing.assert_array_equal(got["vae.decoder.conv_in.kernel"], other["vae.decoder.conv_in.kernel"])


def test_parts_that_do_not_fit_are_refused(parts, folder, tmp_path):
    for part, source, words in (
        ("vae", parts["unet"][0], "is a UNet on its own"),
        ("unet", parts["vae"][1], "is a VAE on its own"),
        ("vae", parts["no vae"], "vae: no-vae.safetensors"),
        ("unet", folder, "has a text width of 16; this checkpoint needs 64"),
        ("vae", folder / "unet", "_class_name is 'UNet2DConditionModel'"),
        ("vae", tmp_path / "none", "no such file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)) as caught:
            open_checkpoint(parts["whole"], config=parts["yaml"], **{part: source})
        assert "\n" not in str(caught.value)


def test_converting_with_another_vae(parts, tmp_path, capsys):
    """The command line says options where Python says arguments."""
    arguments = [str(parts["no vae"]), str(tmp_path / "out"), "--config", str(parts["yaml"])]
    assert main(arguments) == 2
    assert capsys.readouterr().err == "convert: no-vae.safetensors: is a checkpoint without its VAE: give --vae\n"
    assert main([*arguments, "--vae", str(parts["vae"][1])]) == 0
    assert main([arguments[0], "--check", *arguments[2:]]) == 2
    assert main([arguments[0], "--check", *arguments[2:], "--vae", str(parts["vae"][1])]) == 0
    digests = json.loads((tmp_path / "out" / "provenance.json").read_text())["sha256"]
    assert any("vae-bare.safetensors" in name for name in digests)
