"""Every block of code on the pages in docs runs as it is written, with small checkpoints of the kinds that it names.

The README's are run by test_readme.py and test_readme_parity.py, docs/devices.md's by distributed/test_recipes.py, the
settings in docs/training.md are read by training/test_settings.py, and what takes longer is in test_docs_long.py.
"""

import contextlib
import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import unclip_jax
from convert.__main__ import difference_parser
from convert.__main__ import parser as convert_parser
from convert.export.diffusers import save_diffusers
from convert.export.lora import save_lora
from convert.export.textual_inversion import save_textual_inversion
from tests import readme, small_models, stand_ins
from tests.convert.adapter_files import random_lora
from tests.convert.safety_folder import PREPROCESSOR, write_safety_checker
from tests.convert.torch_files import mapping, storage, tensor, torch_bytes
from tests.docs import NOT_RUN, mask, photo, run
from tests.pipelines import small_controlnet
from tests.pipelines.small_family import one_level
from tests.watermarked import natural
from unclip_jax import UnCLIPPipeline
from unclip_jax.cli import parser as cli_parser
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.models.configs import ControlNetConfig, VAEConfig
from unclip_jax.sampling import Branch, draw, image_keys, make_solver
from unclip_jax.training.settings import read_settings

PAGES = [path.relative_to(readme.ROOT).as_posix() for path in sorted((readme.ROOT / "docs").glob("*.md"))]
DEMO = readme.ROOT / "unclip_jax" / "demo" / "pictures"
# Files with the tensors of two published checkpoints, and what is rightly guessed of them.
GUESSED = {"v2-1_768-ema-pruned.safetensors": "v_prediction", "512-base-ema.ckpt": "epsilon"}
ELSEWHERE = {
    "docs/bulk.md": "test_docs_long.py",
    "docs/cluster.md": "bulk/test_cluster_ray.py",
    "docs/demo-model.md": "test_docs_long.py",
    "docs/devices.md": "distributed/test_recipes.py",
    "docs/editing.md": "test_docs_long.py",
    "docs/evaluation.md": "test_docs_long.py",
    "docs/features.md": "test_docs_long.py",
    "docs/guidance.md": "test_docs_long.py",
    "docs/hosts.md": "distributed/test_hosts.py",
    "docs/training.md": "test_docs_long.py",
}


def test_every_block_is_run_somewhere():
    """A page with blocks has a test of its name, here or where `ELSEWHERE` says."""
    pages = [page for page in PAGES if readme.blocks(page)]
    for page in pages:
        name = f"test_{page.removeprefix('docs/').removesuffix('.md').replace('-', '_')}"
        assert page in ELSEWHERE or name in globals(), page
    for page, where in ELSEWHERE.items():
        assert page in pages
        assert page.removeprefix("docs/") in (readme.ROOT / "tests" / where).read_text("utf-8")
    languages = {language for page in pages for language, _ in readme.blocks(page)}
    assert languages == {"python", "shell", "sh", "bash", "yaml"}
    lines = "\n".join(text for page in pages for _, text in readme.blocks(page))
    assert all(re.search(pattern, lines) for pattern in NOT_RUN)


@pytest.mark.e2e
def test_adapters(desk, hub_server, tmp_path_factory):
    (name,) = [name for name in stand_ins.HUB if name.endswith("stable-diffusion-2-1")]
    made = tmp_path_factory.mktemp("hub")
    hub_server.repos[name] = {"main": stand_ins.repositories(made, [name])[name]}
    shutil.copytree(made / "0-theirs", "sd21")
    config = one_level(stand_ins.HUB[name])
    save_lora(config, random_lora(0, config=config), "cat.safetensors", "kohya")
    save_lora(config, random_lora(1, config=config), "ink_folder")
    rows = np.random.default_rng(0).standard_normal((3, 32), np.float32)
    save_textual_inversion("<cat>", rows, "learned_embeds.safetensors")
    style = mapping({"string_to_param": mapping({"*": tensor(storage(size=96), shape=(3, 32), strides=(32, 1))})})
    (desk / "style.pt").write_bytes(torch_bytes(style, {"0": rows.tobytes()}))
    names = {}
    for index, (_, text) in enumerate(readme.blocks("docs/adapters.md")):
        if "denoise(x, emb, text" in text:  # which are as in the README
            model = names["unet"].merge()
            context = model.encode_context(names["pipe"].encode_prompts(["a cat"]))
            emb = model.embed_time(jnp.zeros(1))
            names |= {"params": names["unet"].params, "x": jnp.ones((1, 8, 8, 4)), "emb": emb, "text": context}
        run("adapters", names, only=index)
    assert names["both"]["unet"] is not names["base"]["unet"]
    assert names["ids"].shape[0] == 1
    assert "<tom>_2 in <style>" in names["expand_words"](names["tokenizer"], "a <tom> in <style>")
    context = names["pipe"].encode_prompts(["a cat"])
    predicted = names["predict"](names["unet"].params, names["lora"], 0.5, names["x"], np.array([5]), context)
    assert predicted.shape == (1, 8, 8, 4)
    assert np.isfinite(names["out"]).all()
    assert {"cat-kohya.safetensors", "folder"} <= {path.name for path in desk.iterdir()}
    assert list((desk / "text-to-image").glob("*-sheet.png"))


@pytest.mark.e2e
@pytest.mark.usefixtures("fully_compiled")  # the images have published sizes
def test_controlnet(desk, hub_server, tmp_path_factory):
    made = tmp_path_factory.mktemp("hub")
    changes = {"vae": VAEConfig(block_out_channels=(8,) * 4, layers_per_block=1, norm_groups=4)}
    changes["text_encoder"] = dataclasses.replace(small_models.TEXT, context_length=77)
    names = [name for name in stand_ins.HUB if name.endswith(("2-1-base", "2-1-unclip"))]
    for name, files in stand_ins.repositories(made, names, **changes).items():
        hub_server.repos[name] = {"main": files}
    net = ControlNetConfig(small_controlnet.BASE, conditioning_embedding_out_channels=(8,) * 4)
    save_diffusers(small_controlnet.checkpoint(net), made / "net")
    files = {path.name: path.read_bytes() for path in (made / "net").iterdir()}
    hub_server.repos["thibaud/controlnet-sd21-canny-diffusers"] = {"main": files}
    names = {}
    for language, text in readme.blocks("docs/controlnet.md"):
        if language == "yaml":
            (desk / "settings.yaml").write_text(text)
            assert read_settings(desk / "settings.yaml").task == "controlnet"
        else:
            fewer = text.replace("num_inference_steps=20", "num_inference_steps=2").replace("--steps 20", "--steps 2")
            readme.run(language, fewer, names, "docs/controlnet.md")
    sizes = {path.name: len(np.asarray(Image.open(path))) for path in desk.glob("*.png")}
    assert sizes == {"edges.png": 512, "watercolour.png": 512, "apple-mushroom.png": 64, "apple-in-a-cup.png": 768}
    assert list((desk / "text-to-image").glob("*-sheet.png"))


@pytest.mark.e2e
def test_estimation(desk, hub_server, tmp_path_factory):
    chosen = [name for name in stand_ins.HUB if name.startswith("prs-eth") or name.endswith("-depth")]
    for name, files in stand_ins.repositories(tmp_path_factory.mktemp("hub"), chosen).items():
        hub_server.repos[name] = {"main": files}
    photo(desk / "room.jpg")
    names = {}
    for index, (language, text) in enumerate(readme.blocks("docs/estimation.md")):
        if language == "yaml":
            (desk / "settings.yaml").write_text(text)
            assert read_settings(desk / "settings.yaml").objective.becomes == "depth"
        else:
            run("estimation", names, only=index)
    assert names["depth"].shape == (*np.asarray(Image.open(desk / "room.jpg")).shape[:2], 1)
    assert {"depth.png", "near.png"} <= {path.name for path in desk.iterdir()}
    assert (desk / "depth" / "0001-000-near.png").is_file()


@pytest.mark.e2e
def test_guidance_from_the_parts(small_model):
    page = (readme.ROOT / "docs" / "guidance.md").read_text("utf-8")
    (section,) = re.findall(r"^## From the parts$(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert [block] == [text for _, text in readme.blocks("docs/guidance.md")[1:]]  # the first: test_docs_long.py
    pipe = UnCLIPPipeline.from_pretrained(small_model, "float32", local_mesh(jax.local_devices()[:1]))
    network = pipe.networks["unet"]
    model, keys = network.merge(network.params), image_keys(0, jnp.arange(2))

    class WithoutLabels:
        """The page's UNet has no class labels; this one's are zeros, which its time embedding then holds."""

        encode_context, perturb_attention, denoise = model.encode_context, model.perturb_attention, model.denoise

        @staticmethod
        def embed_time(timesteps):
            labels = jnp.zeros((len(timesteps), pipe.config.unet.class_embedding_size))
            return model.embed_time(timesteps) + model.embed_class(labels)

    text = jnp.asarray(pipe.encode_prompts(["a cat", ""]))
    names = {
        "unet": WithoutLabels,
        "solver": make_solver("ddim", pipe.config.scheduler_config, 2),
        "noise": draw(keys, Branch.LATENTS, (8, 8, 4)),
        "prompt": text[:1].repeat(2, axis=0),
        "negative": text[1:].repeat(2, axis=0),
        "keys": keys,
    }
    exec(compile(block, "docs/guidance.md", "exec"), names)
    assert names["latents"].shape == (2, 8, 8, 4)
    assert np.isfinite(names["latents"]).all()


@pytest.mark.e2e
def test_memory(desk, capsys):
    small_models.write(one_level(small_models.TEXT_TO_IMAGE), desk / "SRC")
    run("memory")
    assert "peak" in capsys.readouterr().out


@pytest.mark.e2e
def test_merging(desk):
    stand_ins.write_original("sd21-unclip-h", desk / "sd21-unclip-h.ckpt")
    stand_ins.write_original("768-v", desk / "my-finetune.safetensors", seed=1)
    stand_ins.write_original("768-v", desk / "v2-1_768-ema-pruned.safetensors", seed=2)
    run("merging")
    assert list((desk / "outputs" / "variations").glob("*-sheet.png"))
    assert (desk / "outputs" / "my-unclip-diffusers" / "model_index.json").is_file()


PIPELINES = readme.blocks("docs/pipelines.md")


@pytest.mark.e2e
@pytest.mark.parametrize("index", range(len(PIPELINES)), ids=[re.findall(r"(\w+)\.from_", b)[0] for _, b in PIPELINES])
def test_pipelines(index, desk):
    (_, text) = PIPELINES[index]
    small_models.write(one_level(small_models.SMALL), desk / "outputs" / "tiny")
    for name in ("giraffe.png", "red-apple.png"):
        shutil.copy(DEMO / name, desk)
    for name in ("sketch.png", "room.jpg", "street.png", "small.png"):
        photo(desk / name)
    photo(desk / "depth.png", 40, "L")
    mask(desk / "mask.png")
    files = {
        "v2-1_768-ema-pruned.safetensors": "768-v",
        "512-base-ema.ckpt": "512-base",
        "512-depth-ema.ckpt": "512-depth",
        "512-inpainting-ema.ckpt": "512-inpainting",
        "x4-upscaler-ema.ckpt": "x4-upscaler",
        "sd21-unclip-l.ckpt": "sd21-unclip-l",
    }
    for file, name in files.items():
        if f'"{file}"' in text:
            stand_ins.write_original(name, desk / file)
    if "InstructPipeline" in text:
        small_models.write(one_level(small_models.INSTRUCT), desk / "runs" / "snow" / "model")
    if '"karlo"' in text:
        stand_ins.write_statistics(desk / "ViT-L-14_stats.th")
        stand_ins.write_karlo(desk / "karlo")
    names = {"unclip_jax": unclip_jax}
    guessed = next((GUESSED[file] for file in GUESSED if file in text), None)
    with contextlib.nullcontext() if guessed is None else pytest.warns(UserWarning, match=f"guess is '{guessed}'"):
        run("pipelines", names, only=index)
    assert guessed is None or names["pipe"].config.scheduler_config["prediction_type"] == guessed
    assert isinstance(names["pipe"], unclip_jax.UnCLIPPipeline) or names["out"].images


@pytest.mark.e2e
def test_publishing(desk, hub_server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    stand_ins.write_original("sd21-unclip-h", desk / "sd21-unclip-h.ckpt")
    run("publishing")
    assert hub_server.private == {"owner/my-variations", "owner/my-unclip"}
    for repo in hub_server.private:
        assert {"README.md", "model_index.json"} <= set(hub_server.repos[repo]["main"])


@pytest.mark.e2e
def test_use_restrictions(desk):
    assert len(readme.blocks("docs/use-restrictions.md")) == 2
    picture = natural(256, 256, seed=0)
    names = run("use-restrictions", {"image": picture}, only=0)
    assert names["read_watermark"](names["marked"]) == b"SDV2"
    folder = desk / "stable-diffusion-v1-5"
    write_safety_checker(folder / "safety_checker")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "model_index.json").write_text("{}")
    names = run("use-restrictions", {"images": np.stack([picture, picture])}, only=1)
    assert len(names["flags"]) == 2
    assert names["images"].shape == (2, 256, 256, 3)


def options_of(parser):
    """Every option of a command line and of its commands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        for command in (getattr(action, "choices", None) or {}).values() if hasattr(action, "add_parser") else ():
            found |= options_of(command)
    return found


def test_options_and_scripts_between_the_lines_are_there():
    parsers = (cli_parser(), convert_parser(), difference_parser())
    folder = readme.ROOT / "scripts"
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    scripts = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in files}
    known = set.union(*map(options_of, parsers), *(re.findall(r"--[a-z][\w-]*", text) for text in scripts.values()))
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", (readme.ROOT / page).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`\n]+)`", text):
            for script in re.findall(r"scripts/(\w+(?:/\w+)*)", code):
                assert script in scripts, (page, code)
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert option in known or option.startswith("--xla"), (page, code)
