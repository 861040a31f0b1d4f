"""unclip-jax and python -m convert as a user runs them: exit status, one line for what is refused, what is written."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.__main__ import main as convert
from convert.random import write_random_checkpoint
from tests import small_models, small_prior
from tests.image_server import serving
from tests.pipelines import small_family
from unclip_jax import cli
from unclip_jax.checkpoints.directory import save
from unclip_jax.image_files import read_recipe

PHOTO = Path(__file__).parents[1] / "docs" / "images" / "coffee.jpg"


@pytest.fixture(scope="session")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_random_checkpoint(tmp_path_factory.mktemp("random") / "tiny.safetensors")


@pytest.fixture(scope="session")
def converted(random_file: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file, config = random_file
    destination = tmp_path_factory.mktemp("converted") / "model"
    assert convert([str(file), str(destination), "--config", str(config)]) == 0
    return destination


@pytest.fixture(autouse=True)
def quiet_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    # main() replaces it; the change must not outlive the test.
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def variations(*arguments: object) -> int:
    small = ("--height", 64, "--width", 64, "--steps", 2, "--devices", 1)
    return cli.main(["variations", *map(str, (*arguments, *small))])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0, error
    assert "Traceback" not in error
    return error


@pytest.mark.e2e
def test_variations_writes_images_with_recipes(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    arguments = (PHOTO, "--model", converted, "--num-images", 2, "--seed", 7, "--prompt", "a cat", "--out", out)
    assert variations(*arguments) == 0
    names = sorted(p.name for p in out.iterdir())
    assert names == ["0001-000.png", "0001-001.png", "0001-sheet.png"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    first, second = (np.asarray(Image.open(out / name)) for name in names[:2])
    assert first.shape == (64, 64, 3)
    assert first.std() > 1
    assert (first != second).any()
    recipe = read_recipe(out / names[1])
    assert recipe["seed"] == 7
    assert recipe["index"] == 1
    assert recipe["prompt"] == "a cat"
    assert recipe["scheduler"] == "ldm-ddim"
    assert recipe["images"][0]["name"] == PHOTO.name
    # A second run never overwrites, and the same seed makes the same image.
    assert variations(*arguments) == 0
    assert np.array_equal(np.asarray(Image.open(out / "0002-001.png")), second)


@pytest.mark.e2e
def test_variations_mixes_images(converted: Path, tmp_path: Path):
    other = tmp_path / "other.png"
    Image.new("RGB", (80, 96), (10, 200, 90)).save(other)
    mix = ("--weights", 1.5, -0.5, "--noise-level", 10, 20, "--mix-noise-level", 50)
    assert variations(PHOTO, other, "--model", converted, *mix, "--out", tmp_path / "out") == 0
    recipe = read_recipe(tmp_path / "out" / "0001-000.png")
    assert recipe["image_weights"] == [1.5, -0.5]
    assert recipe["noise_level"] == [10, 20]
    assert len(recipe["images"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "missing.png"),
        ([__file__], "image"),
        ([PHOTO, "--scheduler", "dim"], "did you mean"),
        ([PHOTO, "--noise-level", "1001"], "noise_level"),
        ([PHOTO, "--noise-level", "1", "2"], "noise_level"),
        ([PHOTO, "--weights", "0"], "image_weights"),
        ([PHOTO, "--eta", "2"], "eta"),
        ([PHOTO, "--seed", "-1"], "seed"),
        ([PHOTO, "--num-images", "0"], "num_images_per_prompt"),
        ([PHOTO, "--dtype", "int8"], "dtype"),
        ([PHOTO, "--preprocess", "mine"], "preprocess"),
    ],
)
def test_bad_usage_is_status_2_and_one_line(
    arguments: list[object], message: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert variations(*arguments, "--model", converted, "--out", tmp_path / "out") == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_missing_model_and_too_many_devices(converted: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["variations", str(PHOTO), "--model", "no/such/thing.safetensors"]) == 2
    assert "no/such/thing.safetensors" in one_line(capsys)
    assert cli.main(["variations", str(PHOTO), "--model", str(converted), "--devices", "99"]) == 2
    assert "99" in one_line(capsys)


def test_info_describes_a_checkpoint(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["info", "--json"]) == 0
    assert "jax" in json.loads(capsys.readouterr().out)["versions"]
    assert cli.main(["info", str(converted), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["checkpoint"]
    assert set(facts["parts"]) == {"unet", "vae", "text_encoder", "image_encoder", "image_normalizer"}
    assert facts["config"]["scheduler"] == "ldm-ddim"
    assert cli.main(["info", str(converted)]) == 0
    assert "image_encoder" in capsys.readouterr().out
    assert variations(PHOTO, "--model", converted, "--out", tmp_path) == 0
    capsys.readouterr()
    assert cli.main(["info", str(tmp_path / "0001-000.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["num_inference_steps"] == 2
    assert cli.main(["info", str(PHOTO)]) == 2
    assert PHOTO.name in one_line(capsys)


@pytest.mark.e2e
def test_info_plans_memory(converted: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--plan", "--height", "128", "--width", "128", "--batch", "2", "--devices", "1", "--decoding", "tiled"]
    assert cli.main(["info", str(converted), *options, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["plan"]
    assert planned["mesh"] == {"data": 1}
    assert planned["hosts"] == 1
    assert planned["read"] > 2**20
    stages = planned["stages"]
    peaks = {name: stage["weights"] + stage["activations"] for name, stage in stages.items()}
    assert planned["peak"] == {"stage": max(peaks, key=peaks.get), "bytes": max(peaks.values())}
    assert list(stages) == ["loading weights", "encoding images", "encoding prompts", "sampling", "decoding"]
    assert all(stage["weights"] > stage["activations"] >= 0 for stage in stages.values())
    assert cli.main(["info", str(converted), *options, "--free-networks"]) == 0
    printed = capsys.readouterr().out
    assert "MiB a device" in printed
    assert "1 along data; 1 host, which reads" in printed
    assert cli.main(["info", str(converted), "--plan", "--devices", "4", "--model-parallel", "3"]) == 2
    assert '"model" is 3; want a divisor of the number of devices, 4' in one_line(capsys)
    assert cli.main(["info", "--plan"]) == 2
    assert "--plan" in one_line(capsys)
    assert cli.main(["info", str(converted), "--plan", "--height", "100"]) == 2
    assert "height is 100" in one_line(capsys)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    """An image, a mask, a depth map, and an adapter's file that is none."""
    rng = np.random.default_rng(0)
    mask = np.zeros((20, 24), np.uint8)
    mask[4:12, 5:15] = 255
    arrays = {"photo": rng.integers(0, 256, (20, 24, 3), np.uint8), "mask": mask}
    arrays["depth"] = np.linspace(0, 255, 480).reshape(20, 24).astype(np.uint8)
    paths = {}
    for name, array in arrays.items():
        paths[name] = str(tmp_path / f"{name}.png")
        Image.fromarray(array).save(paths[name])
    return paths


# By command: the model, arguments (names of `inputs` stand for their files), and what the recipe then says. Sizes and
# options are those of tests/pipelines/small_family.py, whose compiled programs then serve.
MADE = {
    "text-to-image": (
        "TEXT_TO_IMAGE",
        "a cat, red;two dogs;--height;20;--width;24;--num-images;2;--guidance-rescale;0.5;--freeu;1;0.2;1.4;1.6",
        {"prompt": "two dogs", "guidance_rescale": 0.5, "height": 20, "freeu": [1.0, 0.2, 1.4, 1.6]},
    ),
    "image-to-image": (
        "SMALL",
        "photo;--prompt;a cat;--strength;0.7;--pag-scale;1.5",
        {"prompt": "a cat", "strength": 0.7, "pag_scale": 1.5},
    ),
    "depth-to-image": ("DEPTH", "photo;--depth-map;depth;--strength;0.7", {"strength": 0.7}),
    "inpaint": (
        "INPAINT",
        "photo;--mask;mask;--paste-back;--prompt;a hat",
        {"paste_back": True, "prompt": "a hat"},
    ),
    "upscale": ("UPSCALE", "photo;--noise-level;0;--guidance-scale;3", {"noise_level": 0}),
    "instruct": (
        "INSTRUCT",
        "photo;--prompt;make it snow;--image-guidance-scale;2;--pag-scale;1.5",
        {"prompt": "make it snow", "image_guidance_scale": 2.0},
    ),
}


@pytest.mark.e2e
@pytest.mark.parametrize("command", MADE)
def test_every_command_writes_what_it_says(command: str, family_folder, inputs: dict[str, str], tmp_path: Path, capsys):
    model, arguments, said = MADE[command]
    given = [inputs.get(argument, argument) for argument in arguments.split(";")]
    options = ["--model", str(family_folder(model)), "--steps", "3", "--devices", "1", "--out", str(tmp_path / "out")]
    assert cli.main([command, *given, *options, "--batch-size", "1", "--seed", "5", "--eta", "1"]) == 0, (
        capsys.readouterr().err
    )
    count = 4 if command == "text-to-image" else 1
    names = [*(f"0001-{index:03d}.png" for index in range(count)), "0001-sheet.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    recipe = read_recipe(tmp_path / "out" / names[count - 1])
    for key, value in {**said, "command": command, "seed": 5, "num_inference_steps": 3}.items():
        assert recipe[key] == value
    assert recipe["scheduler"] == "ddim"
    picture = np.asarray(Image.open(tmp_path / "out" / names[0]))
    assert picture.shape == ((40, 48, 3) if command == "upscale" else (20, 24, 3))
    if command == "text-to-image":
        assert read_recipe(tmp_path / "out" / names[0])["prompt"] == "a cat, red"
        with Image.open(tmp_path / "out" / "0001-sheet.png") as sheet:
            assert sheet.text["parameters"].startswith("a cat, red | two dogs\n")
    else:
        assert recipe["images"][0]["name"] == "photo.png"
    if command == "inpaint":
        kept = np.asarray(Image.open(inputs["mask"])) == 0
        assert recipe["mask_image"]["name"] == "mask.png"
        np.testing.assert_array_equal(picture[kept], np.asarray(Image.open(inputs["photo"]))[kept])


@pytest.mark.e2e
def test_commands_take_images_at_addresses(family_folder, inputs: dict[str, str], tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    uri = "data:image/png;base64," + base64.b64encode(Path(inputs["mask"]).read_bytes()).decode()
    options = ["--model", str(family_folder("INPAINT")), "--steps", "3", "--devices", "1", "--batch-size", "1"]
    options += ["--seed", "5", "--eta", "1", "--paste-back", "--prompt", "a hat"]
    with serving() as server:
        server.files |= {f"/{name}.png": Path(path).read_bytes() for name, path in inputs.items()}
        photo = f"{server.address}/photo.png"
        for out, arguments in {
            "local": [inputs["photo"], "--mask", inputs["mask"]],
            "fetched": [f"{photo}?token=secret", "--mask", uri],
        }.items():
            made = ["inpaint", *arguments, *options, "--out", str(tmp_path / out)]
            assert cli.main(made) == 0, capsys.readouterr().err
        assert server.asked == ["/photo.png?token=secret"]
        capsys.readouterr()
        assert cli.main(["inpaint", f"{server.address}/none.png?token=secret", "--mask", uri, *options]) == 2
        assert "none.png': the server answers 404 Not Found" in one_line(capsys)
        assert cli.main(["info", f"{photo}?x.png"]) == 2
        assert "a PNG file without a recipe" in one_line(capsys)
    local, fetched = (tmp_path / out / "0001-000.png" for out in ("local", "fetched"))
    np.testing.assert_array_equal(np.asarray(Image.open(local)), np.asarray(Image.open(fetched)))
    assert b"secret" not in fetched.read_bytes()
    said, without = read_recipe(fetched), read_recipe(local)
    assert (said["images"][0]["name"], said["mask_image"]["name"]) == (photo, "data:image/png")
    for recipe in (said, without):
        del recipe["images"][0]["name"], recipe["mask_image"]["name"]
    assert said == without


@pytest.mark.e2e
def test_text_to_image_by_a_prior(family_folder, tmp_path: Path, capsys):
    with small_prior.checkpoint() as checkpoint:
        save(checkpoint, tmp_path / "prior")
    small_models.write(small_family.without_encoder(small_prior.CONFIG.prior.embedding_dim), tmp_path / "unclip")
    options = ["--height", "20", "--width", "24", "--eta", "1"]
    options += ["--prior", str(tmp_path / "prior"), "--steps", "2", "--devices", "1", "--out", str(tmp_path / "out")]
    made = ["text-to-image", "a fox", "--model", str(tmp_path / "unclip"), "--noise-level", "9", *options]
    assert cli.main(made) == 0, capsys.readouterr().err
    recipe = read_recipe(tmp_path / "out" / "0001-000.png")
    assert recipe["prompt"] == "a fox"
    assert recipe["noise_level"] == 9
    assert recipe["prior"] == "prior"
    assert recipe["guidance_scale"] == 10.0  # as of variations
    capsys.readouterr()
    assert cli.main(["text-to-image", "a fox", "--model", str(family_folder("SMALL")), *options]) == 2
    assert "embeddings of width 64, the unCLIP checkpoint takes 16" in one_line(capsys)
    for source in ("prior", "unclip"):
        assert cli.main(["info", str(tmp_path / source), "--json"]) == 0
        parts = json.loads(capsys.readouterr().out)["checkpoint"]["parts"]
        assert set(parts) >= {"text_encoder", {"prior": "prior", "unclip": "unet"}[source]}


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("SMALL", ["text-to-image", "a cat"], "TextToImagePipeline takes one for text-to-image"),
        ("DEPTH", ["inpaint", "photo", "--mask", "mask"], "is a checkpoint for depth-to-image; InpaintPipeline takes"),
        ("INPAINT", ["upscale", "photo"], "is a checkpoint for inpaint; UpscalePipeline takes one for upscale"),
        ("UPSCALE", ["variations", "photo"], "is a checkpoint for upscale; UnCLIPPipeline takes one for variations"),
        ("TEXT_TO_IMAGE", ["text-to-image", "a cat", "--noise-level", "3"], "--noise-level is of a prior"),
        ("TEXT_TO_IMAGE", ["text-to-image", "a cat", "--lora", "none.safetensors=0.5"], "none.safetensors"),
        ("TEXT_TO_IMAGE", ["text-to-image", "a cat", "--lora", "photo"], "photo.png"),
        ("TEXT_TO_IMAGE", ["text-to-image", "a cat", "--textual-inversion", "none.bin"], "none.bin"),
        ("TEXT_TO_IMAGE", ["text-to-image", "a cat", "--freeu", "-1", "1", "1", "1"], "s1 is -1"),
        ("TEXT_TO_IMAGE", ["text-to-image", "a cat", "--watermark"], "too small for a watermark"),
        ("TEXT_TO_IMAGE", ["text-to-image", "a cat", "--safety-checker", "none"], "none"),
        ("TEXT_TO_IMAGE", ["text-to-image", "a cat", "--pag-scale", "-1"], "pag_scale is -1"),
        ("TEXT_TO_IMAGE", ["image-to-image", "photo", "--strength", "0"], "strength is 0"),
        ("TEXT_TO_IMAGE", ["image-to-image", "none.png"], "none.png"),
        ("INPAINT", ["inpaint", "photo", "--mask", "none.png"], "none.png"),
        ("INPAINT", ["inpaint", "photo", "--mask", "mask", "--padding-mask-crop", "-1"], "padding_mask_crop is -1"),
        ("DEPTH", ["depth-to-image", "photo", "--depth-map", "photo"], "depth_map is a colour image"),
        ("UPSCALE", ["upscale", "photo", "--noise-level", "351"], "noise_level is 351"),
    ],
)
def test_commands_refuse_in_one_line(
    model: str, arguments: list[str], message: str, family_folder, inputs: dict[str, str], tmp_path: Path, capsys
):
    given = [inputs.get(argument, argument) for argument in arguments]
    options = ["--model", str(family_folder(model)), "--out", str(tmp_path / "out"), "--devices", "1"]
    assert cli.main([*given, *options]) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_info_of_every_kind(family_folder, small_clip: Path, capsys):
    shown = {"TEXT_TO_IMAGE": set(), "DEPTH": {"depth_estimator"}, "INPAINT": set(), "UPSCALE": set()}
    for model, more in shown.items():
        assert cli.main(["info", str(family_folder(model)), "--json"]) == 0
        parts = json.loads(capsys.readouterr().out)["checkpoint"]["parts"]
        assert set(parts) == {"unet", "vae", "text_encoder", *more}
    assert cli.main(["info", str(small_clip)]) == 0
    assert "image_encoder" in capsys.readouterr().out
    assert cli.main(["info", str(small_clip), "--plan"]) == 2
    assert "is a CLIP model on its own" in one_line(capsys)


def test_convert_writes_and_checks(
    random_file: tuple[Path, Path], converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file, config = random_file
    assert {p.name for p in converted.iterdir()} >= {"config.json", "tokenizer.json", "provenance.json"}
    provenance = json.loads((converted / "provenance.json").read_text())
    digest = next(h for name, h in provenance["sha256"].items() if name.endswith(file.name))
    assert provenance["source"] == file.name
    assert convert([str(file), "--check", "--config", str(config)]) == 0
    assert "complete" in capsys.readouterr().out
    half = tmp_path / "half"
    assert convert([str(file), str(half), "--config", str(config), "--dtype", "bfloat16", "--sha256", digest]) == 0
    assert sum(p.stat().st_size for p in half.iterdir()) < 0.6 * sum(p.stat().st_size for p in converted.iterdir())
    assert convert([str(converted), "--check"]) == 0


def test_convert_refuses(random_file, converted: Path, tmp_path: Path, tmp_path_factory, capsys):
    file, config = random_file
    alone = tmp_path_factory.mktemp("alone") / "tiny.safetensors"  # without the yaml beside it
    shutil.copy(file, alone)
    capsys.readouterr()
    cases = [
        ([str(file), str(converted), "--config", str(config)], "exists"),
        ([str(alone), str(tmp_path / "a")], "--config"),
        ([str(file), str(tmp_path / "b"), "--config", str(config), "--sha256", "00"], "SHA-256"),
        ([str(tmp_path / "none.ckpt"), str(tmp_path / "c")], "none.ckpt"),
        ([str(file)], "--check"),
        ([str(config), str(tmp_path / "d")], config.name),
    ]
    for arguments, message in cases:
        assert convert(arguments) == 2, arguments
        assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["add-difference", "--help"],
        ["{file}"],
        ["{file}", "--check", "--config", "{config}"],
        ["none.ckpt", "a"],
    ],
    ids=["help", "help of add-difference", "no destination", "check", "no source"],
)
def test_convert_is_the_same_command_in_both_programs(arguments, random_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # usage is wrapped by the length of the program's name
    file, config = map(str, random_file)
    given = [argument.format(file=file, config=config) for argument in arguments]

    def outcome(program: Callable[[list[str]], int], arguments: list[str]) -> tuple[object, str, str]:
        try:
            status: object = program(arguments)
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        return status, out, err

    status, out, err = outcome(convert, given)
    assert outcome(cli.main, ["convert", *given]) == (
        status,
        out.replace("python -m convert", "unclip-jax convert"),
        err,
    )
    assert out or err


def test_help_answers_without_jax():
    code = (
        "import contextlib, sys\n"
        "from unclip_jax import cli\n"
        "import convert.__main__ as convert\n"
        "cli.parser().format_help(), convert.parser().format_help()\n"
        "with contextlib.suppress(SystemExit):\n"
        "    cli.main(['convert', '--help'])\n"
        "sys.exit('jax' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


@pytest.mark.e2e
def test_a_picture_of_the_demo_model_loads_no_library_that_it_does_not_need(tmp_path: Path):
    """Each takes longer to import than it takes to look up a compiled program. Flax and JAX import their own."""
    code = (
        "import gc, sys\n"
        "from unclip_jax.cli import main\n"
        "assert main() == 0 and gc.get_threshold()[0] == 10_000\n"
        "unwanted = 'convert ftfy httpx huggingface_hub orbax requests scipy tensorstore torch tqdm transformers'\n"
        "sys.exit(' '.join(sys.modules.keys() & set(unwanted.split())) or 0)\n"
    )
    command = [sys.executable, "-c", code, "variations", str(PHOTO), "--steps", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001-000.png", "0001-sheet.png"]


@pytest.fixture
def training(family_folder, pictures: Path, tmp_path: Path) -> Path:
    """Settings of a short run."""
    path = tmp_path / "settings.yaml"
    settings = {
        "task": "lora",
        "model": str(family_folder("SMALL")),
        "out": str(tmp_path / "run"),
        "data": {"image_folder": str(pictures)},
        "batch_size": 4,
        "optimizer": {"warmup_steps": 0},
        "run": {"total_steps": 2},
    }
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.e2e
def test_train_says_what_it_made(training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", str(training), "--set", "lora.rank=2"]) == 0
    made = Path(capsys.readouterr().out.strip())
    assert made == tmp_path / "run/pytorch_lora_weights.safetensors"
    assert made.is_file()


@pytest.mark.parametrize(
    ("override", "status", "message"),
    [
        ("run.total_steps=0", 2, "total_steps is 0"),
        ("nothing=1", 2, "unknown keys ['nothing']"),
        ("model=/none", 2, "no such file"),
        ("data.image_folder=/none", 2, "no such folder"),
        ("optimizer.learning_rate=1e30", 1, "loss or gradient is not finite"),
    ],
)
def test_train_refuses_in_one_line(
    training: Path, override: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
):
    options = ["--set", override, "--set", "optimizer.weight_decay=1", "--set", "run.report_every=1"]
    if "learning_rate" in override:
        options += ["--set", "run.total_steps=8"]
    assert cli.main(["train", str(training), *options]) == status
    assert message in capsys.readouterr().err.splitlines()[-1]
