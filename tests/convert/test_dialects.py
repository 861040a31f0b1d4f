"""One checkpoint as many programs write it: each file opens as the same parameters, and makes the same image."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from convert import layouts
from convert.engine import export_tensors
from convert.export.original_yaml import original_yaml
from convert.layouts import Place
from convert.readers import CheckpointError
from convert.rules import ldm, tiny_vae
from tests.convert import other_writers, tiny_vae_files
from tests.convert.diffusers_folder import weights_name
from tests.convert.other_writers import TEXT_TO_IMAGE, UNCLIP, Writer
from unclip_jax import UnCLIPPipeline
from unclip_jax.checkpoints.networks import part
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import local_mesh

# Places in single files, by who writes them.
COMFY_VISION = {"image_encoder": Place("embedder.model.visual.", "transformers")}
SGM_TEXT = {"text_encoder": Place("conditioner.embedders.0.model.", "open_clip")}
SGM_BOTH = {
    "text_encoder": Place("conditioner.embedders.1.transformer.", "transformers"),
    "image_encoder": Place("conditioner.embedders.0.open_clip.model.", "open_clip"),
}
OLD_TEXT = {"text_encoder": Place("cond_stage_model.transformer.", "transformers")}
TEXT_UNDER_BOTH = {"text_encoder": Place("cond_stage_model.model.transformer.", "transformers")}
DIFFUSERS_VAE = {"vae": Place("first_stage_model.", "diffusers")}
DIFFUSERS_UNET = {"unet": Place("model.diffusion_model.", "diffusers")}
COMPONENTS = {
    "unet": Place("unet.", "diffusers"),
    "vae": Place("vae.", "diffusers"),
    "text_encoder": Place("text_encoder.", "transformers"),
    "image_encoder": Place("image_encoder.", "transformers"),
}
POSITION_IDS = "cond_stage_model.model.transformer.text_model.embeddings.position_ids"
WRITERS = {
    "the original": Writer(),
    "the original, a ckpt of Lightning": Writer(container="lightning", beside=("betas", "model_ema.num_updates")),
    "the original in half precision": Writer(dtype="float16", container="torch"),
    "the original in bfloat16": Writer(dtype="bfloat16"),
    "the original in double precision": Writer(dtype="float64", container="torch"),
    "the original in shards": Writer(container="shards"),
    "ComfyUI": Writer(
        COMFY_VISION,
        beside=(
            "v_pred",
            "cond_stage_model.model.logit_scale",
            "cond_stage_model.model.text_projection",
            "embedder.model.visual.vision_model.embeddings.position_ids",
        ),
    ),
    "ComfyUI in half precision": Writer(COMFY_VISION, dtype="float16", beside=("v_pred", POSITION_IDS)),
    "ComfyUI, its text projection unnamed": Writer(
        COMFY_VISION, beside=("cond_stage_model.model.transformer.text_projection.weight",)
    ),
    "diffusers' converter": Writer(beside=(POSITION_IDS,), container="lightning"),
    "diffusers' converter on newer VAEs": Writer(attention="to_q", matrices=True, container="torch"),
    "diffusers' converter, newer VAEs reshaped": Writer(attention="to_q", dtype="float16"),
    "diffusers' converter on older VAEs": Writer(attention="query", matrices=True),
    "a converter that keeps the text tower": Writer(
        OLD_TEXT, beside=("cond_stage_model.transformer.text_model.embeddings.position_ids",)
    ),
    "the same of a newer text tower": Writer(OLD_TEXT, text_model=False, container="lightning"),
    "a converter that keeps it under the model": Writer(TEXT_UNDER_BOTH, dtype="bfloat16", container="torch"),
    "a converter that keeps the VAE": Writer(DIFFUSERS_VAE, attention="to_q", matrices=True),
    "the same of an older VAE": Writer(DIFFUSERS_VAE, attention="query", matrices=True, dtype="float16"),
    "the same, attention as convolutions": Writer(DIFFUSERS_VAE, attention="q"),
    "a converter that keeps the UNet": Writer(DIFFUSERS_UNET, container="torch"),
    "sgm": Writer(SGM_TEXT, beside=("denoiser.sigmas",)),
    "sgm in half precision": Writer(SGM_TEXT, dtype="float16", beside=("denoiser.sigmas", "global_step")),
    "sgm with both towers": Writer(SGM_BOTH, container="shards"),
    "sgm names, ComfyUI's tower": Writer(SGM_TEXT | COMFY_VISION, container="lightning"),
    "components in one file": Writer(COMPONENTS, attention="to_q", matrices=True),
    "components of older releases": Writer(COMPONENTS, attention="query", matrices=True, container="torch"),
    "components of the newest": Writer(COMPONENTS, attention="to_q", matrices=True, text_model=False),
    "data parallel training": Writer(wrapper="module.", container="torch", beside=("first_stage_model.loss.logvar",)),
    "a compiled model": Writer(wrapper="_orig_mod.", beside=("noise_augmentor.sqrt_alphas_cumprod",)),
    "everything at once": Writer(
        SGM_TEXT | COMFY_VISION | DIFFUSERS_VAE | DIFFUSERS_UNET,
        attention="query",
        matrices=True,
        wrapper="module.",
        dtype="bfloat16",
        container="lightning",
        beside=("betas", "v_pred", "embedder.model.token_embedding.weight"),
    ),
}


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "unclip.yaml"
    path.write_text(yaml.safe_dump(original_yaml(UNCLIP)))
    return path


@pytest.fixture(scope="module")
def picture(description, tmp_path_factory):
    """A function: the parameters of an open checkpoint -> an image, by one compiled program for all."""
    file = other_writers.write(tmp_path_factory.mktemp("plain"), UNCLIP, Writer())
    pipe = UnCLIPPipeline.from_pretrained(file, "float32", local_mesh(jax.local_devices()[:1]), config=description)
    pipe.progress = False
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def make(params):
        for name, network in pipe.networks.items():
            for key, value in part(params, name).items():
                network.params[key] = jax.device_put(value.read().astype(np.float32), network.params[key].sharding)
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 3, "output_type": "np"}
        return pipe(photo, "a cat", **settings).images

    return make


@pytest.fixture(scope="module")
def plain_images(picture):
    """Of the plain file of each dtype."""
    return {dtype: picture(other_writers.plain(UNCLIP, dtype)) for dtype in {w.dtype for w in WRITERS.values()}}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_parameters_and_image(name, description, picture, plain_images, tmp_path):
    writer = WRITERS[name]
    with open_checkpoint(other_writers.write(tmp_path, UNCLIP, writer), config=description) as checkpoint:
        for key, parameter in other_writers.plain(UNCLIP, writer.dtype).items():
            np.testing.assert_array_equal(checkpoint.params[key].read(), parameter.read(), strict=True)
        np.testing.assert_array_equal(picture(checkpoint.params), plain_images[writer.dtype])


def test_there_are_thirty_of_them():
    assert len(WRITERS) >= 30
    assert len({dataclasses.astuple(writer) for writer in map(_hashable, WRITERS.values())}) == len(WRITERS)


def _hashable(writer):
    return dataclasses.replace(writer, places=tuple(writer.places.items()))


ROOTS = {
    "unet": ["model.diffusion_model.", "diffusion_model.", "unet."],
    "vae": ["first_stage_model.", "vae."],
    "text_encoder": [
        "cond_stage_model.",
        "cond_stage_model.model.",
        "cond_stage_model.transformer.",
        "conditioner.embedders.3.model.",
        "text_encoder.",
    ],
    "image_encoder": [
        "embedder.",
        "embedder.model.",
        "embedder.model.visual.",
        "cond_stage_model.model.",
        "conditioner.embedders.2.open_clip.model.",
        "image_encoder.",
    ],
}


@pytest.mark.parametrize("component", ROOTS)
def test_every_dialect_of_a_part_under_every_root(component):
    """Names alone: whatever the root, the part's tensors are found, and none is left over."""
    for dialect in layouts.PARTS[component]:
        tiny = component == "vae" and dialect in tiny_vae.DIALECTS
        config = dataclasses.replace(UNCLIP, vae=tiny_vae_files.SMALL) if tiny else UNCLIP
        params = other_writers.parameters(config)
        for root in ROOTS[component]:
            if (dialect, root) in (
                ("open_clip", "cond_stage_model.transformer."),  # would be `transformer.transformer`
                ("open_clip", "embedder.model.visual."),  # `visual.visual`
            ):
                continue
            place = Place(root, dialect)
            names = {r.foreign for r in layouts.table(config, params, {component: place}).rules}
            places, found = layouts.locate(names, {component: ldm.PLACES[component]})
            assert places == {component: place}
            assert found == {name: name for name in names}


def test_a_tensor_in_two_dialects_is_refused():
    with pytest.raises(CheckpointError, match="twice, in two dialects"):
        layouts.locate(["unet.conv_in.weight", "model.diffusion_model.conv_in.weight"], ldm.PLACES)


def test_an_image_tower_that_nothing_reads_is_left(tmp_path):
    """As in a base model's file that was saved with the whole of open_clip's model."""
    description = tmp_path / "x.yaml"
    description.write_text(yaml.safe_dump(original_yaml(TEXT_TO_IMAGE)))
    tower = {n: a for n, a in other_writers.tensors(UNCLIP, Writer()).items() if n.startswith("embedder.")}
    plain = other_writers.tensors(TEXT_TO_IMAGE, Writer())
    for root in ("embedder.model.", "cond_stage_model.model.", "conditioner.embedders.1.model."):
        moved = {name.replace("embedder.model.", root): array for name, array in tower.items()}
        save_file(plain | moved, tmp_path / "both.safetensors")
        with open_checkpoint(tmp_path / "both.safetensors", config=description) as checkpoint:
            assert checkpoint.config == TEXT_TO_IMAGE
            assert not any(name.startswith("image_encoder") for name in checkpoint.params)


def test_a_folder_of_files_in_other_dialects(folder, tmp_path):
    """Within diffusers' folders, too, files are of any dialect and root."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    with open_checkpoint(folder) as checkpoint:
        want = {name: np.array(parameter.read()) for name, parameter in checkpoint.params.items()}
        params = {n: p for n, p in checkpoint.params.items() if not n.startswith("image_normalizer.")}
        originals = export_tensors(ldm.table(checkpoint.config, params).rules, params)
        for component, place in ldm.PLACES.items():
            held = {n: np.ascontiguousarray(t.read()) for n, t in originals.items() if n.startswith(place.prefix)}
            if held:
                save_file(held, copy / component / weights_name(component))
    with open_checkpoint(copy) as checkpoint:
        assert checkpoint.params.keys() == want.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(checkpoint.params[name].read(), array, strict=True)
