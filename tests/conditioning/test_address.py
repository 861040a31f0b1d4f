"""Images at addresses: from a server on loopback with its faults, and in data URIs."""

import base64
import io
import socket
import time
from collections.abc import Iterator
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.image_server import ImageServer, serving
from unclip_jax.conditioning import address
from unclip_jax.conditioning.address import fetch, is_address, shown
from unclip_jax.conditioning.clip_image import load_image
from unclip_jax.conditioning.depth import load_depth_map
from unclip_jax.conditioning.masks import load_mask
from unclip_jax.image_files import contact_sheet, read_recipe, save_png

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def png(array: np.ndarray = IMAGE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageServer]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with serving() as pictures:
        pictures.files["/a.png"] = png()
        yield pictures


def refused(source: str, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        load_image(source)
    text = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in text
    assert text.startswith("image '")
    assert "secret" not in text
    for word in words:
        assert word in text, text


def test_an_image_is_fetched(server: ImageServer) -> None:
    where = f"{server.address}/a.png?token=secret"
    np.testing.assert_array_equal(load_image(where), IMAGE)
    assert server.asked == ["/a.png?token=secret"]
    assert fetch(where) == png()
    np.testing.assert_array_equal(load_image(where.replace("http", "HTTP", 1)), IMAGE)


def test_wherever_an_image_is_taken(server: ImageServer, tmp_path) -> None:
    where = f"{server.address}/a.png"
    assert np.array_equal(np.asarray(load_mask(where)), IMAGE)
    server.files["/gray.png"] = png(IMAGE[..., 0])
    np.testing.assert_array_equal(load_depth_map(f"{server.address}/gray.png"), IMAGE[..., 0])
    assert contact_sheet([(where, "a")], [(IMAGE, "b")], cell=32) == contact_sheet(
        [(IMAGE, "a")], [(IMAGE, "b")], cell=32
    )
    save_png(tmp_path / "made.png", Image.fromarray(IMAGE), {"seed": 3})
    server.files["/made.png"] = (tmp_path / "made.png").read_bytes()
    assert read_recipe(f"{server.address}/made.png") == {"seed": 3}
    with pytest.raises(ValueError, match=r"^'http://127.0.0.1:\d+/a.png': a PNG file without a recipe"):
        read_recipe(f"{where}?secret")


def test_redirects_are_followed_to_http_alone_and_not_for_ever(server: ImageServer) -> None:
    server.moved |= {"/there": "/a.png", "/round": "/round", "/file": "file:///etc/hostname", "/ftp": "ftp://x/y.png"}
    server.moved |= {"/data": "data:image/png;base64,AAAA", "/broken": "http://[secret"}
    np.testing.assert_array_equal(load_image(f"{server.address}/there"), IMAGE)
    refused(f"{server.address}/round?secret", OSError, "redirected more than 5 times")
    assert len(server.asked) == 2 + 6
    for path in ("/file", "/ftp"):
        refused(f"{server.address}{path}", ValueError, "not an address of http or https, or redirected elsewhere")
    refused(f"{server.address}/data", ConnectionError, "cannot be downloaded: Invalid URL in location header")
    refused(f"{server.address}/broken", ConnectionError, "cannot be downloaded: ")


@pytest.mark.parametrize(
    ("status", "kind"), [(404, FileNotFoundError), (410, FileNotFoundError), (403, OSError), (500, OSError)]
)
def test_what_a_server_refuses(server: ImageServer, status: int, kind: type[OSError]) -> None:
    server.statuses["/b.png"] = status
    refused(f"{server.address}/b.png?secret", kind, f"{server.address}/b.png'", f"the server answers {status} ")


def test_what_is_no_image(server: ImageServer) -> None:
    for content in (b"", b"<html>Log in</html>", png()[:60]):
        server.files["/b.png"] = content
        refused(f"{server.address}/b.png?secret", ValueError, "/b.png'")


def test_a_download_that_breaks_off_is_refused(server: ImageServer) -> None:
    server.cut.add("/a.png")
    refused(f"{server.address}/a.png?secret", ConnectionError, "cannot be downloaded: ")


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as bound:  # bound but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        refused(f"http://user:secret@127.0.0.1:{bound.getsockname()[1]}/a.png", ConnectionError, "cannot be downloaded")


@pytest.mark.parametrize("slow", ["head", "body"])
def test_the_whole_transfer_has_a_time_limit(server: ImageServer, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """Each byte comes soon after the last, so that no limit on silence would end it."""
    monkeypatch.setattr(address, "LONGEST", 0.3)
    server.slow["/a.png"] = slow
    began = time.monotonic()
    refused(f"{server.address}/a.png?secret", TimeoutError, "did not arrive within 0.3 seconds")
    assert time.monotonic() - began < 5


def test_a_download_beyond_the_size_limit_is_refused(server: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.endless.add("/endless.png")
    monkeypatch.setattr(address, "LARGEST", len(png()))
    assert fetch(f"{server.address}/a.png") == png()
    refused(f"{server.address}/endless.png?secret", ValueError, "is larger than")
    server.files["/a.png"] += b"x"
    refused(f"{server.address}/a.png", ValueError, "is larger than")
    refused("data:," + "x" * (2 * len(png()) + 1), ValueError, "a data URI of")


@pytest.mark.parametrize(
    "text", ["file:///etc/hostname", "ftp://host/secret", "s3://bucket/a.png", "http://", "http:///a"]
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        load_image(text)
    assert "no such file" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a.png", "C:\\a.png", "c:/a.png", "database.png", "/x/http://y", "http:/a.png", ""])
def test_paths_are_no_addresses(text: str) -> None:
    assert not is_address(text)


@given(st.binary(max_size=60), st.sampled_from(["image/png", "", "text/plain;charset=utf-8", "IMAGE/PNG;x=y"]))
def test_data_uris_are_read(content: bytes, kind: str) -> None:
    plain = base64.b64encode(content).decode()
    spaced = " ".join(plain[i : i + 5] for i in range(0, len(plain), 5))
    for data in (plain, plain.rstrip("="), spaced, plain.replace("+", "%2B").replace("=", "%3D")):
        assert fetch(f"data:{kind};base64,{data}") == content
        assert fetch(f"DATA:{kind};BASE64,{data}") == content
    assert fetch(f"data:{kind},{quote_from_bytes(content)}") == content


def test_images_in_data_uris() -> None:
    where = "data:image/png;base64," + base64.b64encode(png()).decode()
    np.testing.assert_array_equal(load_image(where), IMAGE)
    refused("data:image/png;base64,iVBORw0KGgo=", ValueError, "image 'data:image/png': not an image")
    refused("data:image/png;base64,secret*", ValueError, "broken base64")
    refused("data:image/png;base64", ValueError, "without a comma")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("https://user:secret@host:8/a/b.png?secret#secret", "https://host:8/a/b.png"),
        ("https://host#secret", "https://host"),
        ("https://host?a/b@c", "https://host"),
        ("https://host/a@b.png", "https://host/a@b.png"),
        ("data:image/png;base64,secret", "data:image/png"),
        ("data:,secret", "data:"),
    ],
)
def test_what_is_shown_of_an_address(text: str, want: str) -> None:
    assert shown(text) == want
