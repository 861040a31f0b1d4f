"""Downloads against a small hub on loopback."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants, file_download
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from convert.adapters import read_lora, read_textual_inversion
from convert.export.lora import save_lora
from tests.convert.adapter_files import CONFIG, random_lora
from tests.hub_server import Handler, Hub, commit, is_body
from unclip_jax.checkpoints import directory, hub
from unclip_jax.checkpoints.hub import download, download_file
from unclip_jax.checkpoints.places import is_hub_id

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = bytes(range(256)) * 4000

# Every file has contents of its own: the cache fetches equal ones once.
DIFFUSERS = {
    name: name.encode()
    for name in (
        "model_index.json",
        "README.md",
        "sd21-unclip-h.ckpt",
        "sd21-unclip-h.safetensors",
        "scheduler/scheduler_config.json",
        "feature_extractor/preprocessor_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/model.onnx",
        "text_encoder/openvino_model.bin",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_flax_model.msgpack",
        "image_normalizer/config.json",
        "image_normalizer/diffusion_pytorch_model.bin",
        "safety_checker/model.safetensors",
    )
} | {"unet/diffusion_pytorch_model.safetensors": WEIGHTS}
PLAIN = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "feature_extractor/preprocessor_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "image_normalizer/config.json",
    "image_normalizer/diffusion_pytorch_model.bin",
}
CONVERTED = {
    name: name.encode()
    for name in (
        "config.json",
        "tokenizer.json",
        "provenance.json",
        directory.INDEX,
        "params-00001-of-00002.safetensors",
        "params-00002-of-00002.safetensors",
    )
}


@pytest.fixture
def server(hub_server: Hub) -> Hub:
    hub_server.repos["a/folder"] = {"main": DIFFUSERS}
    return hub_server


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(caught: "pytest.ExceptionInfo[BaseException]") -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def test_a_diffusers_folder_comes_with_what_is_read_and_nothing_else(server: Hub) -> None:
    folder = download("a/folder")
    assert contents(folder) == {name: DIFFUSERS[name] for name in PLAIN}
    assert server.bodies() == PLAIN
    assert server.tokens == {None}


def test_the_second_time_nothing_is_fetched(server: Hub) -> None:
    first = download("a/folder")
    server.asked.clear()
    assert download("a/folder") == first
    assert server.asked
    assert not server.bodies()


def test_a_variant_replaces_plain_weights_where_it_exists(server: Hub) -> None:
    names = set(contents(download("a/folder", variant="fp16")))
    assert names - PLAIN == {"text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"}
    assert PLAIN - names == {"text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"}


def test_the_files_of_flax_come_where_there_are_no_others(server: Hub) -> None:
    flax = {"unet/diffusion_flax_model.msgpack", "vae/diffusion_flax_model.msgpack"}
    flax |= {"text_encoder/flax_model.msgpack.index.json", "text_encoder/flax_model-00001-of-00001.msgpack"}
    other = {"vae/diffusion_pytorch_model.msgpack", "text_encoder/model.msgpack", "unet/model.onnx"}
    server.repos["a/flax"] = {"main": {name: name.encode() for name in {"model_index.json", *flax, *other}}}
    assert contents(download("a/flax")).keys() == {"model_index.json", *flax}


def test_an_unknown_variant_is_refused_before_any_file_is_fetched(server: Hub) -> None:
    with pytest.raises(ValueError, match=r"variant is 'int8'.*a/folder.*'fp16', 'non_ema'") as caught:
        download("a/folder", variant="int8")
    one_line(caught)
    assert not server.bodies()


def test_a_converted_checkpoint_comes_whole(server: Hub) -> None:
    server.repos["a/converted"] = {"main": {**CONVERTED, "README.md": b"card", "sample.png": b""}}
    assert contents(download("a/converted")) == CONVERTED
    with pytest.raises(ValueError, match="variant is 'fp16', but a/converted holds no diffusers folder"):
        download("a/converted", variant="fp16")


def test_an_original_repository_gives_its_file(server: Hub) -> None:
    yamls = {"x.yaml": b"model:", "x.safetensors.yaml": b"model: ", "x.ckpt.yaml": b"model:  "}
    files = {"x.ckpt": b"pickle", "x.safetensors": b"tensors", "y/z.ckpt": b"", **yamls}
    server.repos["a/original"] = {"main": files}
    path = download("a/original")
    assert path.name == "x.safetensors"
    assert path.read_bytes() == b"tensors"
    assert (path.parent / "x.yaml").is_file()
    assert server.bodies() == {"x.safetensors", "x.yaml", "x.safetensors.yaml"}


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (
            ("a.ckpt", "b.safetensors"),
            r"2 original checkpoints, a\.ckpt, b\.safetensors: name the one .*, as in a/b/a\.ckpt",
        ),
        ((), r"no checkpoint that can be read.*it has no files"),
        (("README.md", "model.onnx"), r"no checkpoint that can be read.*it has README\.md, model\.onnx"),
        (("model_index.json", "unet/config.json"), r"no weights in \.safetensors, \.bin or \.msgpack"),
        (
            ("model_index.json", "unet/diffusion_pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.bin"),
            "unet has only weights of a variant: give variant, one of 'fp16'",
        ),
    ],
)
def test_repositories_that_are_refused(server: Hub, files: tuple[str, ...], text: str) -> None:
    server.repos["a/b"] = {"main": dict.fromkeys(files, b"x")}
    with pytest.raises(ValueError, match=text) as caught:
        download("a/b")
    one_line(caught)


USUAL = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


@pytest.mark.parametrize(
    ("files", "name", "wanted"),
    [
        (("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors", "x.safetensors"), None, USUAL[0]),
        (("pytorch_lora_weights.bin", "x.safetensors"), None, USUAL[1]),
        (("ink.safetensors", "README.md", "checkpoint-500/other.safetensors"), None, "ink.safetensors"),
        (("ink.safetensors", "checkpoint-500/other.pt"), "checkpoint-500/other.pt", "checkpoint-500/other.pt"),
    ],
)
def test_one_file_is_fetched(server: Hub, files: tuple[str, ...], name: str | None, wanted: str) -> None:
    server.repos["a/b"] = {"main": {file: file.encode() for file in files}}
    assert download_file("a/b", USUAL, name).read_bytes() == wanted.encode()
    assert server.bodies() == {wanted}


@pytest.mark.parametrize(
    ("files", "name", "text"),
    [
        (("README.md",), None, r"a/b holds none of pytorch_lora_weights\.safetensors, .*it has README\.md"),
        (
            ("a.safetensors", "b.safetensors"),
            None,
            r"2 files, a\.safetensors, b\.safetensors: choose one by weight_name",
        ),
        (("a.safetensors",), "b.safetensors", r"a/b has no file 'b\.safetensors'; it has a\.safetensors"),
    ],
)
def test_one_file_that_is_not_there(server: Hub, files: tuple[str, ...], name: str | None, text: str) -> None:
    server.repos["a/b"] = {"main": dict.fromkeys(files, b"x")}
    with pytest.raises(ValueError, match=text) as caught:
        download_file("a/b", USUAL, name)
    one_line(caught)
    assert not server.bodies()


def test_adapters_come_from_the_hub(server: Hub, tmp_path: Path) -> None:
    name, change = next(iter(random_lora(0).items()))
    save_lora(CONFIG, {name: change}, tmp_path)
    file = (tmp_path / USUAL[0]).read_bytes()
    server.repos["a/cat"] = {"main": {USUAL[0]: file, "old.safetensors": b""}}
    assert read_lora("a/cat", CONFIG).keys() == {name}
    server.repos["a/several"] = {"main": {"cat.safetensors": file, "dog.safetensors": b""}}
    assert read_lora("a/several", CONFIG, "cat.safetensors").keys() == {name}
    with pytest.raises(ValueError, match="dog"):
        read_lora("a/several", CONFIG, "dog.safetensors")
    settings = json.dumps({"peft_type": "LORA", "lora_alpha": 5}).encode()
    peft = {"adapter_model.safetensors": file, "adapter_config.json": settings}
    server.repos["a/peft"] = {"main": {**peft, "other.safetensors": b""}}
    assert read_lora("a/peft", CONFIG).keys() == {name}
    network = name.split(".")[0]
    server.repos["a/folders"] = {"main": {f"{network}/{key}": value for key, value in peft.items()}}
    assert read_lora("a/folders", CONFIG).keys() == {name}
    width = CONFIG.text_encoder.width
    server.repos["a/word"] = {"main": {"learned_embeds.safetensors": save({"<cat>": np.zeros((2, width), np.float32)})}}
    assert read_textual_inversion("a/word", CONFIG)["<cat>"].shape == (2, width)
    with pytest.raises(FileNotFoundError, match="no such repository"):
        read_lora("a/nothing", CONFIG)
    server.repos["a/cats"] = {"main": {"v1/cat.safetensors": file, f"v2/{USUAL[0]}": file, "v1/dog.safetensors": b""}}
    address = f"{server.endpoint}/a/cats/blob/main/v1/cat.safetensors"
    for source in ("a/cats/v1/cat.safetensors", "a/cats/v2", address, f"{server.endpoint}/a/cats/tree/main/v2"):
        assert read_lora(source, CONFIG).keys() == {name}
    assert read_lora("a/cats/v1", CONFIG, "cat.safetensors").keys() == {name}
    for source, text in (("a/cats/v1", "a/cats/v1 holds 2 files"), ("a/cats/v3", "no file or folder 'v3'")):
        with pytest.raises(ValueError, match=text):
            read_lora(source, CONFIG)


def test_a_revision_is_honoured(server: Hub) -> None:
    tagged = {**DIFFUSERS, "unet/config.json": b'{"tagged": true}'}
    server.repos["a/folder"]["refs/pr/1"] = tagged
    main, other = download("a/folder"), download("a/folder", revision="refs/pr/1")
    assert main != other
    assert contents(other)["unet/config.json"] == tagged["unet/config.json"]
    assert download("a/folder", revision=commit(tagged)) == other
    with pytest.raises(FileNotFoundError, match=r"a/folder: no revision 'v9' \(404\)") as caught:
        download("a/folder", revision="v9")
    one_line(caught)


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_broken_transfer_is_finished(server: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", len(WEIGHTS) // 8)  # what is kept comes in whole chunks
    name = "unet/diffusion_pytorch_model.safetensors"
    server.cuts[name] = [how]
    folder = download("a/folder")
    assert (folder / name).read_bytes() == WEIGHTS
    ranges = [span for method, path, span in server.asked if is_body(method, path) and path.endswith(name)]
    assert ranges == [None, f"bytes={len(WEIGHTS) // 2}-" if how == "closed" else None]
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_after_a_failed_run_whole_files_are_kept(server: Hub) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    server.cuts[name] = ["reset"] * hub.ATTEMPTS
    with pytest.raises(ConnectionError, match=r"a/folder: the hub at .* cannot be reached .*run again") as caught:
        download("a/folder")
    one_line(caught)
    server.asked.clear()
    assert contents(download("a/folder")) == {name: DIFFUSERS[name] for name in PLAIN}
    assert name in server.bodies()
    assert len(server.bodies()) < len(PLAIN)


def test_offline_uses_the_cache_and_says_when_it_is_empty(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download("a/folder")
    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download("a/folder") == folder
    for repo_id, variant in (("a/other", None), ("a/folder", "fp16")):
        with pytest.raises(FileNotFoundError, match=rf"^{repo_id}: HF_HUB_OFFLINE is set and the cache .*") as caught:
            download(repo_id, variant=variant)
        one_line(caught)
    assert not server.asked


def test_offline_a_part_of_a_checkpoint_is_not_passed_for_the_whole(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download("a/folder")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="does not hold all of it"):
        download("a/folder")


def test_offline_a_cache_without_a_list_of_files_serves(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download("a/folder")
    older = folder.parents[3] / "older"
    folder.parents[2].rename(older)  # another path, so that nothing is remembered in the process
    for tree in older.glob("*/trees"):
        for file in tree.iterdir():
            file.unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(older))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert set(contents(download("a/folder"))) == PLAIN


@pytest.mark.e2e
def test_the_environment_variables_work(server: Hub, tmp_path: Path) -> None:
    """In a process of its own, as huggingface_hub reads them once."""
    server.repos["a/small"] = {"main": CONVERTED}
    program = "import sys; from unclip_jax.checkpoints.hub import download; print(download(sys.argv[1]))"
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_secret"}

    def run(repo_id: str, **more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", program, repo_id]
        return subprocess.run(
            command, env={**ours, **more}, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )

    online = run("a/small")
    assert online.returncode == 0, online.stderr
    assert Path(online.stdout.strip()).is_relative_to(tmp_path / "home")
    assert server.tokens == {"Bearer hf_secret"}
    server.asked.clear()
    offline = run("a/small", HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout
    assert not server.asked


def test_not_found_names_copies_and_local_files_and_asks_for_nothing_else(server: Hub) -> None:
    server.repos["sd2-community/stable-diffusion-2-1-unclip"] = {"main": DIFFUSERS}
    with pytest.raises(FileNotFoundError) as caught:
        download("a/stable-diffusion-2-1-unclip")
    text = one_line(caught)
    assert text.startswith("a/stable-diffusion-2-1-unclip: no such repository")
    assert "sd2-community/stable-diffusion-2-1-unclip" in text
    assert "local folder or file" in text
    assert all("sd2-community" not in path for _, path, _ in server.asked)


OLD, COPY = "stabilityai/stable-diffusion-2-1-unclip", "sd2-community/stable-diffusion-2-1-unclip"


def test_the_table_of_removed_repositories() -> None:
    assert hub.REMOVED[OLD] == COPY
    assert len(hub.REMOVED) == 8
    assert all(is_hub_id(repo_id) for pair in hub.REMOVED.items() for repo_id in pair)
    assert not hub.REMOVED.keys() & set(hub.REMOVED.values())


@pytest.mark.parametrize("status", [None, 401, 404])
def test_of_a_removed_repository_the_copy_is_fetched(server: Hub, status: int | None) -> None:
    """None: as the hub says it; others without a code, as it says it without a login, or another hub does."""
    server.repos[COPY] = {"main": DIFFUSERS, "fp16": {**DIFFUSERS, "unet/config.json": b"{}"}}
    if status:
        server.refuse(status, f"/api/models/{OLD}.*")
    with pytest.warns(
        UserWarning, match=f"^{OLD} was removed from the hub: using its copy {COPY} .mirrors=False"
    ) as said:
        folder = download(OLD)
    assert len(said) == 1
    assert set(contents(folder)) == PLAIN
    with pytest.warns(UserWarning, match=COPY):
        assert contents(download(OLD, revision="fp16", variant="fp16"))["unet/config.json"] == b"{}"
    with pytest.warns(UserWarning, match=COPY):
        assert download(OLD, "sd21-unclip-h.safetensors").read_bytes() == b"sd21-unclip-h.safetensors"
    with (
        pytest.warns(UserWarning, match=COPY),
        pytest.raises(FileNotFoundError, match=f"^{COPY}: no revision 'v9'") as refused,
    ):
        download(OLD, revision="v9")
    one_line(refused)


def test_no_copy_is_fetched_where_none_is_wanted(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[COPY] = {"main": DIFFUSERS}
    for value, arguments in (("1", {}), ("0", {"mirrors": False})):
        monkeypatch.setenv("UNCLIP_JAX_NO_MIRRORS", value)
        with pytest.raises(FileNotFoundError, match=rf"^{OLD}: the repository was removed .*{COPY}") as caught:
            download(OLD, **arguments)
        one_line(caught)
    assert all("sd2-community" not in path for _, path, _ in server.asked)


@pytest.mark.parametrize("code", ["GatedRepo", "RevisionNotFound"])
def test_a_repository_that_is_there_has_no_copy(server: Hub, code: str) -> None:
    server.repos[COPY] = {"main": DIFFUSERS}
    server.refuse(404 if code == "RevisionNotFound" else 403, f"/api/models/{OLD}.*", X_Error_Code=code)
    with pytest.raises((PermissionError, FileNotFoundError), match=f"^{OLD}: "):
        download(OLD, revision="v9")
    server.refuse(503, f"/api/models/{OLD}.*")
    with pytest.raises(OSError, match=f"^{OLD}: the hub answers 503"):
        download(OLD)
    assert all("sd2-community" not in path for _, path, _ in server.asked)


def test_what_the_cache_has_of_a_removed_repository_serves(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[OLD] = {"main": DIFFUSERS}
    folder = download(OLD)
    server.repos = {COPY: {"main": DIFFUSERS}}
    with pytest.warns(UserWarning, match=f"^{OLD}: the repository was removed .*; using the copy in the cache"):
        assert download(OLD) == folder
    with pytest.warns(UserWarning, match=f"using its copy {COPY}"):  # which the cache lacks
        assert download(OLD, variant="fp16") != folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    assert download(OLD) == folder
    assert not server.asked


def test_offline_the_copy_in_the_cache_stands_for_a_removed_repository(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos[COPY] = {"main": DIFFUSERS}
    folder = download(COPY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.warns(UserWarning, match=f"using its copy {COPY}"):
        assert download(OLD) == folder
    with pytest.raises(FileNotFoundError, match="stable-diffusion-2-depth: HF_HUB_OFFLINE is set"):
        download("stabilityai/stable-diffusion-2-depth")


@pytest.mark.parametrize(
    ("path", "want", "files"),
    [
        ("sd21-unclip-h.safetensors", "sd21-unclip-h.safetensors", {"sd21-unclip-h.safetensors"}),
        ("unet", "unet", {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}),
        ("text_encoder/pytorch_model.bin", None, {"text_encoder/pytorch_model.bin", "text_encoder/config.json"}),
        ("tokenizer/vocab.json", None, {"tokenizer/vocab.json"}),
    ],
)
def test_what_lies_at_a_path(server: Hub, path: str, want: str | None, files: set[str]) -> None:
    found = download("a/folder", path)
    assert found.as_posix().endswith(f"/{want or path}")
    assert server.bodies() == files


def test_folders_within_a_repository(server: Hub) -> None:
    inner = {f"models/fox/{name}": content for name, content in DIFFUSERS.items()}
    jax = {f"jax/{name}": content for name, content in CONVERTED.items()}
    single = {"one/x.ckpt": b"pickle", "one/x.yaml": b"model:", "one/deeper/y.ckpt": b""}
    server.repos["a/b"] = {"main": {**inner, **jax, **single, "z.ckpt": b"z"}}
    assert set(contents(download("a/b", "models/fox", variant="fp16"))) >= {
        "unet/diffusion_pytorch_model.fp16.safetensors"
    }
    assert contents(download("a/b", "jax")) == CONVERTED
    assert server.bodies() <= {*inner, *jax}
    assert download("a/b", "one").name == "x.ckpt"
    assert (download("a/b", "one").parent / "x.yaml").read_bytes() == b"model:"
    for path, text in (("models", "holds no checkpoint"), ("models/fo", "a/b has no file or folder 'models/fo'")):
        with pytest.raises(ValueError, match=text) as caught:
            download("a/b", path)
        one_line(caught)
    with pytest.raises(ValueError, match=r"variant is 'fp16', but a/b/one/x\.ckpt is one file"):
        download("a/b", "one/x.ckpt", variant="fp16")


def test_a_part_is_a_repository_of_its_own(server: Hub) -> None:
    names = ("config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "README.md", "x.ckpt")
    server.repos["a/vae"] = {"main": {name: name.encode() for name in names}}
    assert set(contents(download("a/vae"))) == {"config.json", "diffusion_pytorch_model.safetensors"}
    with pytest.raises(ValueError, match="variant is 'fp16', but a/vae has no such weights"):
        download("a/vae", variant="fp16")


@pytest.mark.parametrize(("stem", "kind"), [("diffusion_pytorch_model", "safetensors"), ("flax_model", "msgpack")])
def test_an_index_comes_with_its_shards(server: Hub, stem: str, kind: str) -> None:
    shards = {f"unet/{stem}-0000{i}-of-00002.{kind}": bytes([i]) for i in (1, 2)}
    index = f"unet/{stem}.{kind}.index.json"
    server.repos["a/b"] = {"main": {index: b"{}", "unet/config.json": b"{ }", "unet/other.safetensors": b"", **shards}}
    assert download("a/b", index).name == Path(index).name
    assert server.bodies() == {index, "unet/config.json", *shards}


def refusals() -> list[tuple[dict[str, str], int, str | None, type[OSError], str]]:
    unknown = {"X_Error_Message": "Invalid username or password."}
    gated = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access is restricted"}
    wrong = {"X_Error_Message": "Invalid credentials in Authorization header"}
    disabled = {"X_Error_Message": "Access to this resource is disabled."}
    return [
        (unknown, 401, None, FileNotFoundError, r"\(401\).*sd2-community/"),
        (wrong, 401, "hf_wrong", PermissionError, r"refuses your login \(401\); .*HF_TOKEN"),
        (gated, 401, None, PermissionError, r"gated \(401\); accept its terms at .*/a/folder.*hf auth login"),
        (gated, 403, "hf_right", PermissionError, r"gated \(403\)"),
        ({"X_Error_Message": "no\nway"}, 403, "hf_weak", PermissionError, r"denies access \(403: no way\)"),
        (disabled, 403, None, PermissionError, "resource is disabled"),
        ({}, 404, None, FileNotFoundError, "no such repository"),
        ({}, 429, None, OSError, "answers 429 Too Many Requests; try again later"),
        ({}, 503, None, OSError, "answers 503 Service Unavailable; try again later"),
    ]


@pytest.mark.parametrize("paths", [".*", "/a/folder/resolve/.*"], ids=["all", "files"])
@pytest.mark.parametrize(("headers", "status", "token", "kind", "text"), refusals())
def test_what_the_hub_refuses_is_told_in_one_line(
    server: Hub,
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
    status: int,
    token: str | None,
    kind: type[OSError],
    text: str,
    paths: str,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    server.refuse(status, paths, **{k: v.replace("\n", " ") for k, v in headers.items()})
    with pytest.raises(kind, match=text) as caught:
        download("a/folder")
    assert "hf_" not in one_line(caught)
    assert type(caught.value) is kind


def test_a_refusing_hub_gives_way_to_the_cache_with_a_warning(server: Hub) -> None:
    folder = download("a/folder")
    server.refuse(503)
    with pytest.warns(UserWarning, match="a/folder: the hub answers 503 .*; using the copy in the cache"):
        assert download("a/folder") == folder


def test_without_a_network_what_is_cached_is_used_or_the_lack_is_told(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download("a/folder")
    with socket.socket() as bound:  # bound but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(ConnectionError, match=r"a/other: the hub at .* cannot be reached") as caught:
            download("a/other")
        one_line(caught)
        with pytest.warns(UserWarning, match="cannot be reached .*; using the copy in the cache"):
            assert download("a/folder") == folder


def test_something_else_than_a_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "reply_json", lambda self, content: self.reply(200, b"<html>Log in</html>", {}))
    with pytest.raises(OSError, match=r"a/folder: http://127\.0\.0\.1:\d+ does not answer like a hub") as caught:
        download("a/folder")
    one_line(caught)


def test_a_full_disk_is_told_in_one_line(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(OSError, match=r"a/folder: the disk is full \(cache .*\); free .* HF_HOME") as caught:
        download("a/folder")
    one_line(caught)


def test_a_cache_that_cannot_be_written(server: Hub) -> None:
    Path(constants.HF_HUB_CACHE).write_text("a file in the folder's place")
    with pytest.raises(OSError, match=r"a/folder: the cache .* cannot be written \(.*\); set HF_HOME") as caught:
        download("a/folder")
    one_line(caught)


@pytest.mark.parametrize(
    "text", ["", "a", "a/", "/a/b", "a/b/c", "../b", "a/..b", "a/b--c", "-a/b", "a/b.", "å/b", "a b/c"]
)
def test_other_texts_are_no_hub_ids(text: str) -> None:
    assert not is_hub_id(text)
    with pytest.raises(ValueError, match=r"repo_id is .*; want the form 'owner/name'"):
        download(text)


def test_which_texts_are_ids_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("sd2-community/stable-diffusion-2-1-unclip")
    assert is_hub_id("a/model_v1.5")
    assert not is_hub_id("checkpoints/sd21-unclip-h.ckpt")
    assert not is_hub_id("checkpoints/sd21-unclip-h.safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").symlink_to("nowhere")
    assert not is_hub_id("a/b")


STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "flax_model", "openvino_model")


@given(
    st.sets(
        st.builds(
            "{}/{}{}{}.{}".format,
            st.sampled_from(("unet", "vae")),
            st.sampled_from(STEMS),
            st.sampled_from(("", ".fp16", ".non_ema")),
            st.sampled_from(("", "-00001-of-00002", "-00002-of-00002")),
            st.sampled_from(("safetensors", "bin", "msgpack", "safetensors.index.json", "bin.index.json", "h5")),
        )
    ),
    st.sampled_from((None, "fp16")),
)
def test_one_form_of_each_components_weights_is_chosen(files: set[str], variant: str | None) -> None:
    names = sorted({"model_index.json", "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", *files})
    try:
        chosen = hub._choose(names, "a/b", variant)
    except ValueError:
        assert variant is not None
        assert not any(".fp16" in name for name in names if hub.WEIGHTS.fullmatch(name.partition("/")[2]))
        return
    assert set(chosen) <= set(names)
    for component in ("unet", "vae"):
        weights = [name for name in chosen if name.startswith(component)]
        assert weights
        assert len({".safetensors" in name for name in weights}) == 1
        assert len({".fp16" in name for name in weights}) == 1
        assert not any(word in name for name in weights for word in ("non_ema", "flax", "openvino", "msgpack", "h5"))
