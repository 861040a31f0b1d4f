"""What people write for something on the hub, and what is none of it."""

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from unclip_jax.checkpoints.places import HubPlace, place_of

ID = "sd2-community/stable-diffusion-2-1-unclip"
FILE = "sd21-unclip-l.ckpt"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (ID, HubPlace(ID)),
        (f"{ID}/{FILE}", HubPlace(ID, FILE)),
        (f"{ID}/unet", HubPlace(ID, "unet")),
        ("a/b/c/d e/f.safetensors", HubPlace("a/b", "c/d e/f.safetensors")),
        (f"https://huggingface.co/{ID}", HubPlace(ID)),
        (f"https://huggingface.co/{ID}/", HubPlace(ID)),
        (f"http://www.huggingface.co/{ID}?library=diffusers", HubPlace(ID)),
        (f"https://hf.co/{ID}#examples", HubPlace(ID)),
        (f"huggingface.co/{ID}", HubPlace(ID)),
        (f"hf.co/{ID}/{FILE}", HubPlace(ID, FILE)),
        (f"HTTPS://HuggingFace.co/{ID}", HubPlace(ID)),
        (f"https://user:hf_secret@huggingface.co/{ID}", HubPlace(ID)),
        (f"https:/huggingface.co/{ID}", HubPlace(ID)),  # what a path makes of it
        (f"https://huggingface.co/{ID}/resolve/main/{FILE}", HubPlace(ID, FILE, "main")),
        (f"https://huggingface.co/{ID}/resolve/main/{FILE}?download=true", HubPlace(ID, FILE, "main")),
        (f"https://huggingface.co/{ID}/blob/fp16/unet/config.json", HubPlace(ID, "unet/config.json", "fp16")),
        (f"https://huggingface.co/{ID}/raw/main/unet/config.json", HubPlace(ID, "unet/config.json", "main")),
        (f"https://huggingface.co/{ID}/tree/main", HubPlace(ID, "", "main")),
        (f"https://huggingface.co/{ID}/tree/main/unet", HubPlace(ID, "unet", "main")),
        (f"https://huggingface.co/{ID}/tree/main/unet/", HubPlace(ID, "unet", "main")),
        (f"https://huggingface.co/{ID}/commit/0123abc", HubPlace(ID, "", "0123abc")),
        (f"https://huggingface.co/{ID}/tree/refs%2Fpr%2F9/unet", HubPlace(ID, "unet", "refs/pr/9")),
        (f"https://huggingface.co/{ID}/tree/refs/pr/9/unet", HubPlace(ID, "unet", "refs/pr/9")),
        (f"https://huggingface.co/{ID}/blob/main/a%20b/c%23.ckpt", HubPlace(ID, "a b/c#.ckpt", "main")),
        (f"https://hub.example:8080/root/{ID}/tree/v1", HubPlace(ID, "", "v1")),
        (f"hub.example:8080/root/{ID}", HubPlace(ID)),
    ],
)
def test_places(text: str, want: HubPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example:8080/root")
    assert place_of(text) == want


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a/",
        "/a/b",
        "a/b/",
        "a//b",
        "../a/b",
        "a/../b",
        "a/b/../c",
        "a/b/./c",
        "x/model.ckpt",
        "a b/c/d",
        "a/b--c/d",
    ],
)
def test_what_is_no_place(text: str) -> None:
    assert place_of(text) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "https://civitai.com/api/download/models/1?token=secret",
            "source is an address at 'civitai.com', and only the hub",
        ),
        ("https://user:secret@example.org/x.ckpt", "source is an address at 'example.org', .* download the file"),
        ("https://example.org/huggingface.co/a/b", "source is an address at 'example.org'"),
        ("https://huggingface.co.example.org/a/b", "source is an address at 'huggingface.co.example.org'"),
        ("https://huggingface.co@example.org/a/b", "source is an address at 'example.org'"),
        ("file:///home/secret/x.ckpt", "source is an address of file://; want a path"),
        ("s3://bucket/secret", "source is an address of s3://"),
        ("https://huggingface.co", "no address of a model; want https://huggingface.co/OWNER/NAME"),
        (
            "https://huggingface.co/gpt2?secret",
            "source is 'https://huggingface.co/gpt2', which is no address of a model",
        ),
        ("https://huggingface.co/datasets/a/b", "no address of a model"),
        ("https://huggingface.co/spaces/a/b", "no address of a model"),
        ("https://huggingface.co/a/b--c", "no address of a model"),
        ("https://huggingface.co/a/b/resolve?secret", "https://huggingface.co/a/b/resolve', which names no revision"),
    ],
)
def test_addresses_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        place_of(text)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_on_this_machine_comes_first(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("a/b", "huggingface.co/a/b", "a/b/c.ckpt"):
        assert place_of(text) is not None
        (tmp_path / text).mkdir(parents=True)
        assert place_of(text) is None
    (tmp_path / "a/d").symlink_to("nowhere")
    assert place_of("a/d") is None


NAMES = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,8}[A-Za-z0-9_])?", fullmatch=True).filter(
    lambda name: ".." not in name and "--" not in name and not name.lower().endswith((".bin", ".th", ".pt", ".json"))
)
SEGMENTS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda text: text not in (".", "..")
)


@given(NAMES, NAMES, st.lists(SEGMENTS, min_size=1, max_size=3), NAMES, st.sampled_from(["resolve", "blob", "tree"]))
def test_an_address_says_what_it_was_made_of(
    owner: str, name: str, parts: list[str], revision: str, route: str
) -> None:
    from urllib.parse import quote

    place = HubPlace(f"{owner}/{name}", "/".join(parts), revision)
    path = "/".join(quote(part, safe="") for part in parts)
    if owner in ("datasets", "spaces", "api", "docs", "blog", "papers"):
        return
    assert place_of(f"https://huggingface.co/{place.repo_id}/{route}/{revision}/{path}?download=true") == place


@given(st.text(max_size=40))
def test_any_text_is_a_place_or_none_or_refused_in_one_line(text: str) -> None:
    for start in ("", "https://huggingface.co/", "a/b/", "https://"):
        try:
            place = place_of(start + text)
        except ValueError as error:
            refused = error
        else:
            refused = None
            assert place is None or place.repo_id.count("/") == 1
        assert "\n" not in str(refused)
