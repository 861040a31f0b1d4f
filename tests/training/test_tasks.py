"""Every task by its settings: it learns, it goes on where it was, and what it writes is a checkpoint like any other."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import unclip_jax
from convert.export.diffusers import save_diffusers
from tests import small_models
from unclip_jax.checkpoints import directory
from unclip_jax.checkpoints.config import ControlNetCheckpointConfig
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.training import diffusion_objective
from unclip_jax.training.controlnet import fitting_config
from unclip_jax.training.data import stacked
from unclip_jax.training.diffusion_trainer import DiffusionTrainer
from unclip_jax.training.settings import DataSettings, SampleSettings, TrainSettings, read_settings
from unclip_jax.training.setup import examples_of, training_records
from unclip_jax.training.tasks import run_training
from unclip_jax.training.tiny_vae import fitting_config as fitting_tiny_vae


@pytest.fixture(scope="module")
def small_model(family_folder):
    """Of one level: a step of training is compiled in half of the time."""
    return family_folder("SMALL")


@pytest.fixture
def small_text_model(family_folder):
    return family_folder("TEXT_TO_IMAGE")


def short_run(folder, pictures, task, model, *overrides) -> TrainSettings:
    """Settings of a run in a folder, with changes of the form "key=value"."""
    base = {
        "task": task,
        "model": str(model),
        "out": str(folder / "run"),
        "data": {"image_folder": str(pictures), "threads": 1},
        "batch_size": 4,
        "devices": 1,
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 0},
        "run": {"total_steps": 12, "save_every": 6, "report_every": 1, "ema_decay": 0.5},
    }
    path = folder / "settings.yaml"
    path.write_text(json.dumps(base))
    return read_settings(path, overrides)


@pytest.fixture
def make(tmp_path, pictures):
    """make(task, model, "key=value", ...): settings of a short run."""
    return functools.partial(short_run, tmp_path, pictures)


@pytest.fixture(scope="module")
def plain(small_model, pictures, tmp_path_factory):
    """Settings of a run that is over; it shows what it learns and changes nothing else."""
    changes = (f"data.validation_folder={pictures}", "run.sample_every=12", "run.total_steps=24")
    settings = short_run(tmp_path_factory.mktemp("plain"), pictures, "denoise", small_model, *changes)
    run_training(settings, progress=False)
    return settings


@pytest.fixture(scope="module")
def autoencoded(small_model, pictures, tmp_path_factory):
    """Settings of a run of the autoencoder, which is over."""
    changes = (f"data.validation_folder={pictures}", "run.total_steps=40")
    settings = short_run(tmp_path_factory.mktemp("autoencoder"), pictures, "autoencoder", small_model, *changes)
    run_training(settings, progress=False)
    return settings


def metrics(settings):
    return [json.loads(line) for line in (Path(settings.out) / "metrics.jsonl").read_text().splitlines()]


def losses(settings):
    return [line["loss"] for line in metrics(settings)]


def weights(source):
    with open_checkpoint(source) as checkpoint:
        return {name: np.asarray(param.read()) for name, param in checkpoint.params.items()}, checkpoint.config


def trainer(settings):
    with open_checkpoint(settings.model) as checkpoint:
        return DiffusionTrainer(settings, checkpoint, progress=False)


def first_losses(settings):
    """Of four images, before anything is learnt."""
    ready = trainer(settings)
    batch = stacked(examples_of(training_records(settings.data)[:4], ready.load, settings.seed))

    @jax.jit
    def each(frozen, params):
        encoded = diffusion_objective.encode(ready.networks, frozen, batch)
        return diffusion_objective.losses(ready.options, ready.unet, 0, frozen, params, encoded, jnp.int32(0))[0]

    return np.asarray(each(ready.frozen, ready.unet.params))


def changed(before, after):
    return {name for name in before if before[name].shape != after[name].shape or (before[name] != after[name]).any()}


def test_a_unet_learns_and_nothing_else_changes(plain, small_model):
    folder = Path(plain.out)
    before, was = weights(small_model)
    after, config = weights(folder / "model")
    assert {name.split(".")[0] for name in changed(before, after)} == {"unet"}
    assert config.unet == was.unet
    checked = [line["validation_loss"] for line in metrics(plain) if "validation_loss" in line]
    assert len(checked) == 4
    assert checked[-1] < 0.9 * checked[0]
    grid = Image.open(folder / "samples/00000024.png")
    assert grid.size == (4 * 16, 2 * 16)
    assert np.asarray(grid).std() > 5
    provenance = json.loads((folder / "model" / "provenance.json").read_text())
    assert provenance["trained_from"] == "SMALL"
    assert run_training(plain, progress=False) == folder / "model"  # through already


@pytest.fixture(scope="module")
def staged(small_model, pictures, tmp_path_factory):
    """The folder of a run of two stages: a part of the UNet, then all of it on larger images."""
    folder = tmp_path_factory.mktemp("staged")
    settings = short_run(folder, pictures, "denoise", small_model)
    part = {"run": {"total_steps": 2}, "objective": {"trainable": r".*attn2\.to_[kv]\.kernel"}}
    stages = (part, {"data": {"resolution": 32}, "run": {"total_steps": 3}})
    made = run_training(dataclasses.replace(settings, stages=stages), progress=False)
    assert made == folder / "run/stage-2/model"
    return folder / "run"


@pytest.mark.e2e
def test_a_part_alone_is_trained(staged, small_model):
    names = changed(weights(small_model)[0], weights(staged / "stage-1/model")[0])
    assert names
    assert all(name.endswith(("attn2.to_k.kernel", "attn2.to_v.kernel")) for name in names)


@pytest.mark.e2e
def test_stages_follow_each_other(staged):
    assert [len((staged / f"stage-{n}/metrics.jsonl").read_text().splitlines()) for n in (1, 2)] == [2, 3]
    assert json.loads((staged / "stage-2/model/provenance.json").read_text())["trained_from"] == "model"
    first, second = (weights(staged / f"stage-{n}/model")[0] for n in (1, 2))
    assert "unet.conv_in.kernel" in changed(first, second)


@pytest.mark.e2e
def test_from_a_cache_it_is_the_same(make, plain, small_model, tmp_path):
    options = (f"data.cache={tmp_path / 'cache'}", "run.total_steps=6")
    cached = make("denoise", small_model, f"out={tmp_path / 'cached'}", *options)
    run_training(cached, progress=False)
    np.testing.assert_allclose(losses(cached), losses(plain)[:6], rtol=1e-4)
    again = make("denoise", small_model, f"data.cache={tmp_path / 'cache'}", "data.resolution=32")
    with pytest.raises(ValueError, match=r"another cache \(resolution differ"):
        run_training(again, progress=False)


@pytest.mark.e2e
def test_half_precision_and_remat_learn_the_same(make, plain, small_model):
    half = make("denoise", small_model, "dtype=bfloat16", "remat=true")
    run_training(half, progress=False)
    np.testing.assert_allclose(losses(half), losses(plain)[:12], rtol=0.05)
    after, _ = weights(half.out + "/model")
    assert {value.dtype for name, value in after.items() if name.startswith("unet")} == {np.dtype(np.float32)}


@pytest.mark.e2e
def test_devices_share_the_batch(make, plain, small_model):
    """And the parameters; with copies of them it is tests/training/test_run.py."""
    four = make("denoise", small_model, "run.total_steps=4", "devices=4", "run.shard_parameters=true")
    run_training(four, progress=False)
    np.testing.assert_allclose(losses(four), losses(plain)[:4], rtol=1e-5)


def test_zero_terminal_snr_is_recorded(make, small_model):
    for options, rescaled in ((("objective.zero_snr=true",), True), ((), False)):
        diffusion = trainer(make("denoise", small_model, *options)).config.scheduler_config
        assert diffusion.get("rescale_betas_zero_snr", False) is rescaled
        assert (diffusion.get("timestep_spacing") == "trailing") is rescaled


@pytest.mark.e2e
def test_inpainting_begins_as_the_base_and_learns_its_channels(make, small_text_model):
    """The added channels' weights are zeros, so the first loss is the base's own."""
    options = ("objective.whole_mask_share=0.5", "run.total_steps=3", "objective.text_dropout=0")
    settings = make("denoise", small_text_model, "objective.becomes=inpaint", *options)
    np.testing.assert_allclose(
        first_losses(settings), first_losses(make("denoise", small_text_model, *options)), rtol=1e-5
    )
    made = run_training(settings, progress=False)
    after, config = weights(made)
    before, _ = weights(small_text_model)
    assert config.task == "inpaint"
    assert after["unet.conv_in.kernel"].shape[2] == 9
    assert np.abs(after["unet.conv_in.kernel"][:, :, 4:]).max() > 0
    assert changed({k: v for k, v in before.items() if not k.startswith("unet")}, after) == set()


@pytest.fixture
def changed_pictures(pictures, tmp_path):
    """The pictures, each with the name of what it was before an instruction."""
    folder = tmp_path / "changed"
    shutil.copytree(pictures, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "original_image": f"was/{row['file_name']}"}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    shutil.copytree(pictures, folder / "was")
    for path in (folder / "was").glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path).convert("RGB"))).save(path)
    return folder


def test_an_instructions_original_is_cut_as_its_image_is(changed_pictures, make, small_text_model):
    settings = make("denoise", small_text_model, "objective.becomes=instruct", f"data.image_folder={changed_pictures}")
    ready = trainer(dataclasses.replace(settings, data=dataclasses.replace(settings.data, flip=True, crop="random")))
    assert (ready.config.task, ready.unet.params["conv_in.kernel"].shape[2]) == ("instruct", 8)
    for row in examples_of(training_records(settings.data)[:3], ready.load, 0):
        np.testing.assert_allclose(row["original"], -row["image"], atol=0.02)  # the rest is resizing's rounding


@pytest.mark.e2e
def test_a_base_learns_to_follow_instructions(changed_pictures, make, small_text_model, tmp_path):
    """It begins as the base, and what it becomes is opened, exported and opened again for what it is."""
    data = (f"data.image_folder={changed_pictures}", f"data.validation_folder={changed_pictures}")
    options = ("run.total_steps=3", "run.sample_every=3", "samples.steps=3", "objective.text_dropout=0")
    settings = make("denoise", small_text_model, "objective.becomes=instruct", *data, *options)
    np.testing.assert_allclose(
        first_losses(settings), first_losses(make("denoise", small_text_model, *options)), rtol=1e-5
    )
    made = run_training(settings, progress=False)
    after, config = weights(made)
    assert (config.task, config.trained_for) == ("instruct", "instruct")
    assert np.abs(after["unet.conv_in.kernel"][:, :, 4:]).max() > 0
    assert (tmp_path / "run/samples/00000003.png").exists()
    with open_checkpoint(made) as checkpoint:
        save_diffusers(checkpoint, tmp_path / "theirs")
    again, _ = weights(tmp_path / "theirs")
    assert after.keys() - again.keys() == {"text_encoder.projection.kernel"}  # which no folder has
    assert not changed(again, after)
    pipe = unclip_jax.from_pretrained(tmp_path / "theirs", "float32", local_mesh(jax.devices()[:1]))
    assert type(pipe) is unclip_jax.InstructPipeline
    out = pipe(changed_pictures / "00.png", "a circle", num_inference_steps=2)
    assert out.images[0].size == (32, 32)


@pytest.mark.e2e
@pytest.mark.parametrize("task", ["depth", "normals"])
def test_a_base_learns_to_estimate(task, changed_pictures, make, small_text_model, tmp_path):
    """The named image is a map of the other, whose latents the UNet reads first."""
    data = (f"data.image_folder={changed_pictures}", f"data.validation_folder={changed_pictures}")
    options = ("objective.prediction_type=v_prediction", "objective.zero_snr=true", f"objective.becomes={task}")
    run = ("run.total_steps=3", "run.sample_every=3", "samples.steps=3", "data.resolution=16")
    made = run_training(make("denoise", small_text_model, *options, *data, *run), progress=False)
    before, (after, config) = weights(small_text_model)[0], weights(made)
    assert (config.task, config.image_first, config.estimator.processing_resolution) == (task, True, 16)
    kernel, base = after["unet.conv_in.kernel"], before["unet.conv_in.kernel"]
    assert 0 < np.abs(kernel[:, :, :4]).max() < np.abs(base).max()
    np.testing.assert_allclose(kernel[:, :, 4:], base, atol=0.05)
    assert (tmp_path / "run/samples/00000003.png").exists()
    pipe = unclip_jax.from_pretrained(made, "float32", local_mesh(jax.devices()[:1]))
    assert pipe(changed_pictures / "was" / "00.png").prediction.shape[:3] == (1, 32, 32)
    with pytest.raises(ValueError, match=r"data\.flip is true: mirrored normals"):
        trainer(make("denoise", small_text_model, *options[:2], "objective.becomes=normals", *data, "data.flip=true"))


@pytest.mark.e2e
def test_an_upscaler_learns_to_read_the_small_image(make, family_folder, tmp_path):
    """Which is noised to a level of its own."""
    model = family_folder("UPSCALE")
    settings = make("denoise", model, "run.total_steps=6", "run.sample_every=6", "samples.steps=3")
    made = run_training(settings, progress=False)
    before, after = weights(model)[0], weights(made)[0]
    assert np.abs((after["unet.conv_in.kernel"] - before["unet.conv_in.kernel"])[:, :, 4:]).max() > 0
    assert np.isfinite(losses(settings)).all()
    assert (tmp_path / "run/samples/00000006.png").exists()


@pytest.mark.e2e
def test_a_base_learns_to_read_depth_by_anothers_estimator(make, small_text_model, family_folder, tmp_path):
    other = family_folder("DEPTH")
    options = ("objective.becomes=depth-to-image", f"objective.depth_model={other}")
    settings = make("denoise", small_text_model, *options, "run.total_steps=3", "run.sample_every=3", "samples.steps=3")
    made = run_training(settings, progress=False)
    after, config = weights(made)
    assert config.task == "depth-to-image"
    assert config.depth_estimator == small_models.DEPTH.depth_estimator
    theirs = weights(other)[0]
    assert not changed({n: v for n, v in theirs.items() if n.startswith("depth_estimator.")}, after)
    assert np.abs(after["unet.conv_in.kernel"][:, :, 4:]).max() > 0
    assert (tmp_path / "run/samples/00000003.png").exists()


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["DEPTH", "UPSCALE"])
def test_losses_of_models_with_an_image_among_their_channels(name, make, family_folder):
    """A depth model's by its own estimator. Whole runs are from end to end."""
    each = first_losses(make("denoise", family_folder(name)))
    assert each.shape == (4,)
    assert np.isfinite(each).all()


@pytest.mark.e2e
def test_an_adapter_learns_and_is_written_alone(make, small_model, tmp_path):
    settings = make("lora", small_model, "lora.rank=4", "optimizer.learning_rate=0.02", "run.total_steps=30")
    path = run_training(settings, progress=False)
    tensors = load_file(path)
    assert {name.split(".")[0] for name in tensors} == {"unet"}
    down = {name: value for name, value in tensors.items() if name.endswith("lora_A.weight")}
    assert len(tensors) == 2 * len(down)
    assert all(value.shape[0] == 4 for value in down.values())
    assert min(np.abs(value).max() for value in tensors.values()) > 0
    assert np.mean(losses(settings)[-8:]) < np.mean(losses(settings)[:8])
    assert not (tmp_path / "run/model").exists()


@pytest.mark.e2e
def test_a_controlnet_begins_as_nothing_and_learns(make, small_text_model, pictures, tmp_path):
    """Its hints are files of a column; those of a second run, which goes on from the first, the images' edges."""
    folder = tmp_path / "with hints"
    shutil.copytree(pictures, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "conditioning_image": row["file_name"]}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    options = ("objective.text_dropout=0", "run.total_steps=3", "run.save_every=3", "data.flip=true", "batch_size=4")
    data = f"data.image_folder={folder}"
    settings = make("controlnet", small_text_model, data, "controlnet.hint=conditioning_image", *options)
    made = run_training(settings, progress=False)
    base = make("denoise", small_text_model, f"out={tmp_path / 'base'}", *options)
    run_training(base, progress=False)
    np.testing.assert_allclose(losses(settings)[0], losses(base)[0], rtol=1e-5)  # it adds nothing yet
    after, config = weights(made)
    assert config == ControlNetCheckpointConfig(fitting_config(weights(small_text_model)[1]))
    assert np.abs(after["controlnet.zero_convs.0.kernel"]).max() > 0
    again = make("controlnet", small_text_model, f"out={tmp_path / 'edges'}", f"controlnet.model={made}", *options)
    more, _ = weights(run_training(dataclasses.replace(again, samples=SampleSettings(steps=2)), progress=False))
    assert changed(after, more)
    pipe = unclip_jax.TextToImagePipeline.from_pretrained(small_text_model, "float32", local_mesh(jax.devices()[:1]))
    net = unclip_jax.ControlNet.from_pretrained(made, "float32", pipe.mesh)
    out = pipe("a circle", num_inference_steps=2, controlnet=net, control_image=folder / "00.png")
    assert out.images[0].size == (32, 32)


@pytest.mark.e2e
def test_the_vectors_of_a_new_word_are_learnt(make, small_model):
    settings = make(
        "textual-inversion",
        small_model,
        "inversion.placeholder=<dot>",
        "inversion.initial_word=dot",
        "inversion.vectors=2",
        "optimizer.learning_rate=0.05",
    )
    rows = load_file(run_training(settings, progress=False))
    assert rows.keys() == {"<dot>"}
    assert rows["<dot>"].shape == (2, 32)
    table = weights(small_model)[0]["text_encoder.token_embedding.embedding"]
    assert not np.allclose(rows["<dot>"], table[[67, 78]], atol=0.01)


@pytest.mark.e2e
def test_an_autoencoder_learns_and_nothing_else_changes(autoencoded, small_model):
    before, after = weights(small_model)[0], weights(Path(autoencoded.out) / "model")[0]
    assert {name.split(".")[0] for name in changed(before, after)} == {"vae"}
    found = [line["validation_psnr"] for line in metrics(autoencoded) if "validation_psnr" in line]
    assert found[-1] > found[0] + 0.5


@pytest.mark.e2e
def test_a_tiny_autoencoder_learns_the_latents_and_their_images(make, small_model, pictures):
    changes = (
        "tiny_vae.width=16",
        "tiny_vae.blocks=1",
        f"data.validation_folder={pictures}",
        "data.validation_images=4",
    )
    part = {"run": {"total_steps": 30, "save_every": 15}}
    settings = make("tiny-autoencoder", small_model, *changes)
    settings = dataclasses.replace(settings, stages=(part, part))
    made = run_training(settings, progress=False)
    lines = [metrics(dataclasses.replace(settings, out=f"{settings.out}/stage-{n}")) for n in (1, 2)]
    checked = [line["validation_psnr_alone"] for stage in lines for line in stage if "validation_psnr_alone" in line]
    assert checked[-1] > checked[0] + 0.5
    assert lines[1][0]["latents_off"] < 0.9 * lines[0][0]["latents_off"]  # it goes on with what is learnt
    with open_checkpoint(small_model, vae=made) as opened:
        assert opened.config.vae == fitting_tiny_vae(weights(small_model)[1].vae, settings.tiny_vae)
        opened.params["vae.decoder.conv_out.kernel"].read()
        directory.save(opened, Path(settings.out) / "with-it")
    for task in ("tiny-autoencoder", "autoencoder", "denoise"):
        with pytest.raises(ValueError, match=r"its VAE is (itself )?a tiny autoencoder"):
            run_training(make(task, f"{settings.out}/with-it"), progress=False)


@pytest.mark.e2e
def test_a_perceptual_model_adds_its_distance_to_the_loss(make, autoencoded, small_model):
    seen = make("autoencoder", small_model, "run.total_steps=3", f"autoencoder.perceptual_model={small_model}")
    run_training(seen, progress=False)
    more = losses(seen)[0] - losses(autoencoded)[0]
    assert 0 < more <= 0.1 * 2
    assert {name.split(".")[0] for name in changed(weights(small_model)[0], weights(seen.out + "/model")[0])} == {"vae"}


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("pairs", "parts"),
    [
        ("image-text", {"image_encoder", "text_encoder"}),
        ("image-image", {"image_encoder"}),
    ],
)
def test_the_towers_of_clip_that_see_pairs_learn(make, small_clip, pairs, parts):
    settings = make("clip", small_clip, f"clip.pairs={pairs}", "run.total_steps=30", "batch_size=8")
    made = run_training(settings, progress=False)
    assert {n.split(".")[0] for n in changed(weights(small_clip)[0], weights(made)[0])} - {"similarity"} == parts
    assert np.mean(losses(settings)[-5:]) < np.mean(losses(settings)[:5])


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("denoise", "data.resolution=17", "data.resolution is 17; want a multiple of 2"),
        ("denoise", "objective.trainable=nothing", "the UNet has no such parameter"),
        ("denoise", "devices=9", "devices is 9; want 1 to"),
        ("denoise", "batch_size=5", None),
        ("denoise", "data.filters={p_unsafe: [2, 3]}", "none of 16 images passes"),
        ("denoise", "data.filters={score: [2, 3]}", "column score is None; want a number"),
        ("denoise", "objective.prediction_type=noise", "accepted: epsilon"),
        ("denoise", "objective.text_dropout=2", "text_dropout is 2"),
        ("denoise", "objective.becomes=depth-to-image", "needs a text-to-image checkpoint"),
        ("lora", "lora.rank=0", "rank is 0"),
        ("lora", "lora.targets=x", "no kernel of this network has such a name"),
        ("textual-inversion", "inversion.placeholder=two words", "want a word"),
        ("clip", "seed=1", "needs a CLIP model on its own"),
        ("autoencoder", "data.resolution=15", "want a multiple of 2"),
        ("tiny-autoencoder", "data.resolution=15", "want a multiple of 2"),
        ("tiny-autoencoder", "tiny_vae.width=0", "encoder_block_out_channels is .0, 0."),
        ("controlnet", "random_start=true", "begins as a copy of the checkpoint's encoder"),
        ("controlnet", "controlnet.hint=nowhere", "column nowhere is None; want the name of an image file"),
    ],
)
def test_what_does_not_fit_is_refused(make, small_model, task, override, message):
    if message is None:
        settings = make(task, small_model, override, "devices=4")
        message = "want a multiple of the 4 devices"
    else:
        settings = make(task, small_model, override)
    with pytest.raises(ValueError, match=message):
        run_training(settings, progress=False)


def test_instructions_need_the_images_before_them(make, small_text_model, tmp_path):
    becomes = ("denoise", small_text_model, "objective.becomes=instruct")
    with pytest.raises(ValueError, match="column original_image is None; want the name of an image file"):
        run_training(make(*becomes), progress=False)
    tars = DataSettings(tars=(str(tmp_path / "a.tar"),))
    with pytest.raises(ValueError, match=r"original_image is 'original_image', a column; want data\.image_folder"):
        trainer(dataclasses.replace(make(*becomes), data=tars))


def test_depth_needs_an_estimator(make, small_text_model):
    with pytest.raises(ValueError, match="has no depth estimator"):
        run_training(make("denoise", small_text_model, "objective.becomes=depth-to-image"), progress=False)
