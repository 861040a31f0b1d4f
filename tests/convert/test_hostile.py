"""Broken and hostile sources as a user meets them: status 2 and one line, nothing run, nothing half-written.

The readers' own cases, byte by byte, are in test_readers.py; here whole checkpoints go through the command line.
"""

import io
import json
import os
import pickle
import resource
import shutil
import zipfile

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from convert.statistics import read_statistics
from tests.convert.broken_msgpack import BROKEN as BROKEN_FLAX
from tests.convert.diffusers_folder import random_tensors, weights_name, write_folder
from tests.convert.hostile_pickles import HOSTILE
from tests.convert.torch_files import edit, mapping, name, several, storage, tensor, text, torch_bytes
from unclip_jax.checkpoints.directory import INDEX
from unclip_jax.checkpoints.source import open_checkpoint

STEP = "first_stage_model.encoder.conv_in.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory, original):
    """The same small checkpoint in every layout: layout -> its folder."""
    root = tmp_path_factory.mktemp("sources")
    write_folder((root / "diffusers").mkdir() or root / "diffusers", random_tensors())
    for layout in ("jax", "orbax"):
        assert main([str(root / "diffusers"), str(root / layout), "--to", layout]) == 0
    return root


@pytest.fixture
def refused(tmp_path, capsys):
    """Converting these arguments is refused in one line that holds these words; nothing is left."""

    def check(*arguments, words=(), destination=None):
        destination = destination or tmp_path / "written" / "model.safetensors"
        before = sorted(destination.parent.iterdir()) if destination.parent.is_dir() else []
        capsys.readouterr()
        assert main([str(arguments[0]), str(destination), *map(str, arguments[1:])]) == 2
        error = capsys.readouterr().err.splitlines()
        lines = [line for line in error if not line.startswith("convert: warning:")]
        assert len(lines) == 1, error
        assert lines[0].isprintable()
        assert len(lines[0]) < 2100
        for word in (words,) if isinstance(words, str) else words:
            assert word in lines[0]
        assert (sorted(destination.parent.iterdir()) if destination.parent.is_dir() else []) == before

    return check


def copy(folder, destination):
    return shutil.copytree(folder, destination, copy_function=os.link)


def replace(path, content):
    path.unlink()  # a link to the file that the other tests use
    path.write_bytes(content)


def change_json(path, change):
    data = json.loads(path.read_text())
    replace(path, json.dumps(change(data) or data).encode())


# --- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["os.system", "stack global", "huge storage"])
def test_hostile_pickles_are_refused_by_the_command(tmp_path, refused, case):
    """All of them are in test_readers.py."""
    (tmp_path / "model.ckpt").write_bytes(torch_bytes(HOSTILE[case][0]))
    refused(tmp_path / "model.ckpt", words="model.ckpt")


def test_nothing_that_a_pickle_says_is_run(tmp_path, refused):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    calls = {"os.mkdir", "posix.mkdir"}
    codes = [several(text(str(tmp_path / "run"))).join((name(call), b"R")) for call in calls]
    codes += [mapping({"w": tensor(), "v": code}) for code in codes]
    for number, code in enumerate(codes):
        (tmp_path / f"{number}.ckpt").write_bytes(torch_bytes(code))
        refused(tmp_path / f"{number}.ckpt", words="mkdir")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Touch()))
    refused(tmp_path / "bare.ckpt", words="bare pickle")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs_are_refused(tmp_path, refused, method):
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w", method) as archive:
        archive.writestr("a/data.pkl", mapping({"w": tensor(storage(size=2**25))}))
        archive.writestr("a/data/0", bytes(2**27))
    assert (tmp_path / "model.ckpt").stat().st_size < 2**18
    refused(tmp_path / "model.ckpt", words="is compressed")


def test_a_zip_whose_records_share_their_bytes(tmp_path, refused):
    def share(entries):
        return [*entries, entries[2] | {"name": b"a/data/1", "local": b"a/data/0", "at": 200}]

    (tmp_path / "model.ckpt").write_bytes(torch_bytes(mapping({"w": tensor()}), change=share))
    refused(tmp_path / "model.ckpt", words="'a/data/1'")


@pytest.mark.parametrize("path", ["a/../../evil", "/etc/cron.d/evil", "a\\..\\evil", "a//evil", "a/./evil"])
def test_paths_out_of_a_zip_are_refused(tmp_path, refused, path):
    change = edit(3, name=path.encode(), local=path.encode())
    (tmp_path / "model.ckpt").write_bytes(torch_bytes(mapping({"w": tensor()}), change=change))
    refused(tmp_path / "model.ckpt", words="not a plain relative name")


def test_damaged_data_of_a_torch_file(tmp_path, original, refused):
    """Found by the checksum as the conversion comes to it, when much has been written."""
    arrays = load_file(original[0])
    code = {
        key: tensor(storage(key=key, size=a.size), shape=a.shape, strides=tuple(s // 4 for s in a.strides))
        for key, a in arrays.items()
    }
    content = bytearray(torch_bytes(mapping(code), {key: a.tobytes() for key, a in arrays.items()}))
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert main([str(path), "--check", "--config", str(original[1])]) == 0
    content[content.index(arrays[STEP].tobytes()) + 5] ^= 4
    path.write_bytes(content)
    for layout in ("jax", "orbax", "diffusers", "original"):
        refused(path, "--config", original[1], "--to", layout, words=("is damaged", STEP))


def test_damaged_data_and_a_known_digest(tmp_path, original, refused):
    from unclip_jax.checkpoints.directory import sha256

    content = bytearray(original[0].read_bytes())
    content[-5] ^= 1
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", "--config", original[1], "--sha256", sha256(original[0]), words="SHA-256")


@pytest.mark.parametrize("case", list(BROKEN_FLAX)[::8])
def test_broken_files_of_flax_are_refused_by_the_command(tmp_path, refused, case):
    """All of them are in test_msgpack.py."""
    (tmp_path / "model.msgpack").write_bytes(BROKEN_FLAX[case][0])
    refused(tmp_path / "model.msgpack", words="model.msgpack")


def test_names_for_a_terminal(tmp_path, original, refused):
    arrays = load_file(original[0])
    odd = ["\x1b[2Jx\nconvert: wrote it", "x" * 5000, "\u202e"]
    save_file({**arrays, **{key: np.zeros(1, np.float32) for key in odd}}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "--config", original[1], words=("3 unknown", r"\x1b[2J"))


# --- yaml ------------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: !!python/object/apply:os.mkdir [run]", "not a yaml of plain data"),
        (b"model: !!python/name:os.system", "not a yaml of plain data"),
        (b"model: !mine {a: 1}", "not a yaml of plain data"),
        (BOMB.encode(), "aliases are not accepted"),
        (b"a: &a [*a]", "aliases are not accepted"),
        (b"[" * 16_000, "not a yaml of plain data"),
        (b"model: {target: os.system, params: {command: id}}", "model.target is 'os.system'"),
        (b"model: " + b"x" * 17_000, "no model configuration"),
        (b"\xff\xfe", "not a yaml of plain data"),
        (b"", "the file is missing or not a mapping"),
        (b"model: \x00", "not a yaml of plain data"),
        (b"? [a]\n: b", "not a yaml of plain data"),
        (b"model: 2001-99-99", "not a yaml of plain data"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path, original, refused, content, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_bytes(content)
    refused(original[0], "--config", tmp_path / "x.yaml", words=("x.yaml", words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("unet_config", "target", "os.system"),
        ("first_stage_config", "target", "builtins.eval"),
        ("embedder_config", "target", "mine.Encoder"),
        (None, "scale_factor", 10**400),
        (None, "scale_factor", float("nan")),
        (None, "linear_end", 10**400),
        (None, "image_size", 10**9),
        ("unet_config", "params", {"num_res_blocks": 10**5}),
        ("unet_config", "params", {"channel_mult": [1] * 1000}),
    ],
)
def test_absurd_values_in_a_yaml_are_refused(tmp_path, original, refused, section, key, value):
    data = yaml.safe_load(original[1].read_text())
    node = data["model"]["params"] if section is None else data["model"]["params"][section]
    node[key] = {**node[key], **value} if isinstance(value, dict) else value
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(data))
    refused(original[0], "--config", tmp_path / "x.yaml", words="x.yaml")


# --- folders ---------------------------------------------------------------------------------------------------------

DAMAGE = {
    "empty": lambda raw: b"",
    "half": lambda raw: raw[: len(raw) // 2],
    "random": lambda raw: np.random.default_rng(0).bytes(4000),
    "deep": lambda raw: b"[" * 200_000,
    "list": lambda raw: b"[]",
}
PARTS = {
    "jax": ["config.json", "tokenizer.json", INDEX, "params-00001-of-00001.safetensors"],
    "orbax": ["config.json", "params/_METADATA", "params/manifest.ocdbt"],
    "diffusers": [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        f"vae/{weights_name('vae')}",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ],
}


BROKEN = [
    (layout, file, damage)
    for layout, files in PARTS.items()
    for file in files
    for damage in DAMAGE
    if (file, damage) != ("tokenizer/merges.txt", "empty")  # a vocabulary of single bytes is one
]


@pytest.mark.parametrize(("layout", "file", "damage"), BROKEN)
def test_a_folder_with_a_broken_file(sources, tmp_path, refused, layout, file, damage):
    folder = copy(sources / layout, tmp_path / "source")
    replace(folder / file, DAMAGE[damage]((folder / file).read_bytes()))
    refused(folder, "--to", "jax")


def test_orbax_data_that_is_cut(sources, tmp_path, refused):
    folder = copy(sources / "orbax", tmp_path / "source")
    for path in (folder / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 100_000:
            replace(path, path.read_bytes()[:1000])
    refused(folder, "--to", "jax", words="source/params")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("text_encoder", "layers"), 10**6),
        (("text_encoder", "layers"), 10**400),
        (("text_encoder", "vocab_size"), 100),
        (("unet", "layers_per_block"), 10**5),
        (("unet", "block_out_channels"), [32] * 1000),
        (("unet", "num_heads"), [[[]]]),
        (("vae", "layers_per_block"), -1),
        (("vae", "scaling_factor"), 10**400),
        (("vae", "scaling_factor"), float("nan")),
        (("vae", "norm_groups"), 0),
        (("format_version",), 2),
        (("dialect",), ["original"]),
        (("unet",), None),
    ],
)
def test_a_configuration_that_lies(sources, tmp_path, refused, path, value):
    folder = copy(sources / "jax", tmp_path / "source")

    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    change_json(folder / "config.json", change)
    refused(folder, "--to", "diffusers")


@pytest.mark.parametrize("shard", ["../outside", "/etc/passwd", "..", "", ".", "a\0", "missing", 3, ["x"]])
def test_an_index_that_points_elsewhere(sources, tmp_path, refused, shard):
    folder = copy(sources / "jax", tmp_path / "source")
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "outside")
    change_json(folder / INDEX, lambda data: data["weight_map"].update(dict.fromkeys(list(data["weight_map"]), shard)))
    refused(folder, "--to", "diffusers", words="source/")


def test_an_index_that_names_a_tensor_twice(sources, tmp_path, refused):
    folder = copy(sources / "jax", tmp_path / "source")
    raw = (folder / INDEX).read_bytes()
    first = next(iter(json.loads(raw)["weight_map"]))
    replace(folder / INDEX, raw.replace(b'"weight_map": {', f'"weight_map": {{"{first}": "x",'.encode()))
    refused(folder, "--to", "diffusers", words=(first, "twice"))


@pytest.mark.parametrize(
    ("component", "entry"),
    [
        ("unet", ["../../evil", "UNet2DConditionModel"]),
        ("unet", ["os", "system"]),
        ("vae", ["diffusers", "/etc/passwd"]),
        ("extra", ["../evil", "Model"]),
        ("extra", ["diffusers", "a/../../b"]),
    ],
)
def test_a_model_index_that_points_elsewhere(sources, tmp_path, refused, component, entry):
    folder = copy(sources / "diffusers", tmp_path / "source")
    change_json(folder / "model_index.json", lambda data: data.update({component: entry}))
    refused(folder, "--to", "jax", words=("model_index.json", component))


def test_the_hubs_cache_is_a_folder_of_symlinks(sources, tmp_path):
    """So links are followed, wherever they point: whoever makes one could have copied the file."""
    for path in (sources / "diffusers").rglob("*"):
        link = tmp_path / "snapshot" / path.relative_to(sources / "diffusers")
        if path.is_file():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    assert main([str(tmp_path / "snapshot"), "--check"]) == 0


def test_a_pipe_in_the_place_of_a_file_does_not_block(sources, tmp_path, refused):
    for number, (layout, file) in enumerate(
        [("jax", "config.json"), ("jax", "tokenizer.json"), ("diffusers", "tokenizer/vocab.json")]
    ):
        folder = copy(sources / layout, tmp_path / str(number))
        (folder / file).unlink()
        os.mkfifo(folder / file)
        refused(folder, "--to", "jax")


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_weights_that_are_no_numbers_are_named(original, tmp_path, capsys):
    """In every layout, each of the three."""
    arrays = load_file(original[0])
    others = STEP.replace("weight", "bias"), "first_stage_model.decoder.conv_in.bias"
    for key, value in zip((STEP, *others), (np.nan, np.inf, -np.inf), strict=True):
        arrays[key].reshape(-1)[0] = value
    save_file(arrays, tmp_path / "x.safetensors")
    assert main([str(tmp_path / "x.safetensors"), str(tmp_path / "jax"), "--config", str(original[1])]) == 0

    def named():
        lines = capsys.readouterr().err.splitlines()
        assert all(line.endswith(" holds NaN or infinite numbers") for line in lines)
        return sorted(line.split()[2] for line in lines)

    assert named() == sorted((STEP, *others))
    assert main([str(tmp_path / "jax"), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert main([str(tmp_path / "orbax"), str(tmp_path / "diffusers"), "--to", "diffusers"]) == 0
    ours = ["vae.decoder.conv_in.bias", "vae.encoder.conv_in.bias", "vae.encoder.conv_in.kernel"]
    assert named() == sorted(ours * 2)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("layout", ["jax", "orbax"])
def test_numbers_that_a_dtype_cannot_hold_are_named(original, tmp_path, capsys, layout):
    arrays = load_file(original[0])
    arrays[STEP][0, 0, 0, 0] = 1e5
    save_file(arrays, tmp_path / "x.safetensors")
    options = ["--config", str(original[1]), "--to", layout]
    assert main([str(tmp_path / "x.safetensors"), str(tmp_path / "half"), *options, "--dtype", "float16"]) == 0
    assert "vae.encoder.conv_in.kernel has numbers beyond the range of float16" in capsys.readouterr().err
    assert main([str(tmp_path / "x.safetensors"), str(tmp_path / "wide"), *options, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().err == ""


def npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(f"{member}.npy", content)
    return buffer.getvalue()


def npy(array, claimed=None):
    np.save(buffer := io.BytesIO(), array, allow_pickle=True)
    raw = buffer.getvalue()
    return raw if claimed is None else raw.replace(str(array.shape).encode().ljust(len(claimed)), claimed, 1)


FINE = npy(np.ones(4, np.float32))
STATISTICS_FILES = {
    "bomb": npz(mean=npy(np.zeros(2**24, np.float32)), std=FINE),
    "claims": npz(mean=npy(np.zeros(4, np.float32)).replace(b"(4,), }         ", b"(400000000000,),"), std=FINE),
    "pickled": npz(mean=npy(np.array([os.system], object)), std=FINE),
    "structured": npz(mean=npy(np.zeros(4, "f4,i4")), std=FINE),
    "one": npz(mean=FINE),
    "array": FINE,
    "text": b"text",
    "damaged": npz(mean=FINE, std=FINE).replace(FINE[:6], b"xxxxxx"),
    "cut": npz(mean=FINE, std=FINE)[:-9],
    "nan": npz(mean=npy(np.full(4, np.nan, np.float32)), std=FINE),
    "huge": npz(mean=npy(np.full(4, 1e300)), std=FINE),
    "integers": npz(mean=npy(np.ones(4, np.int32)), std=FINE),
}


@pytest.mark.parametrize("case", STATISTICS_FILES)
def test_broken_statistics_are_refused(tmp_path, original, refused, case):
    (tmp_path / "stats.npz").write_bytes(STATISTICS_FILES[case])
    refused(original[0], "--config", original[1], "--clip-stats", tmp_path / "stats.npz", words="stats.npz")


def test_statistics_of_another_form(tmp_path):
    save_file({"mean": np.ones(2**17, np.float32), "std": np.ones(2**17, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="131072 features"):
        read_statistics(tmp_path / "x.safetensors")


# --- the destination -------------------------------------------------------------------------------------------------


def test_destinations_that_cannot_be(sources, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for destination, words in (
        (tmp_path / "file", "exists"),
        (tmp_path / "link", "exists"),
        (tmp_path / "file" / "inside", "file"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        for layout in ("jax", "orbax", "diffusers"):
            refused(sources / "jax", "--to", layout, words=words, destination=destination)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_belongs_to_the_original_is_not_overwritten(original, tmp_path, refused):
    (tmp_path / "x.safetensors.yaml").write_text("mine")
    destination = tmp_path / "x.safetensors"
    refused(
        original[0], "--config", original[1], "--to", "original", words="x.safetensors.yaml", destination=destination
    )
    assert (tmp_path / "x.safetensors.yaml").read_text() == "mine"


@pytest.mark.parametrize("layout", ["jax", "orbax", "diffusers", "original"])
def test_a_disk_that_fills_up(original, tmp_path, refused, layout):
    """Every file may grow to 100,000 bytes, which is what a full disk looks like to whoever writes."""
    with open_checkpoint(original[0], config=original[1]):  # so that nothing but the writing is limited
        pass
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused(original[0], "--config", original[1], "--to", layout, words="model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
