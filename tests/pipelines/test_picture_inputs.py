"""Wherever a pipeline takes an image it takes it in every form, and an address is asked once a call."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from tests.image_server import serving
from tests.pipelines.small_family import KINDS, arguments, hole, photo

IMAGES = ("image", "mask_image", "condition_image", "depth_map")
FORMS = {"path", "text", "bytes", "PIL", "address"}


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with serving() as pictures:
        yield pictures


def formed(array, form, server, folder):
    name = f"{len(server.files)}.png"
    server.files[f"/{name}"] = png(array)
    (folder / name).write_bytes(png(array))
    return {
        "path": folder / name,
        "text": str(folder / name),
        "bytes": png(array),
        "PIL": Image.fromarray(array),
        "address": f"{server.address}/{name}",
    }[form]


def arrays(value):
    """All arrays in a checked call."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        return [array for item in value for array in arrays(item)]
    return [value] if isinstance(value, np.ndarray) else []


def same(a, b):
    return all(map(np.array_equal, arrays(a), arrays(b))) and len(arrays(a)) == len(arrays(b)) > 0


@pytest.mark.parametrize("name", [name for name in KINDS if "image" in KINDS[name].settings])
def test_a_call_takes_every_form(name, family, server, tmp_path):
    pipe, given = family(name), arguments(name)
    if name == "depth":
        given["depth_map"] = photo(5)[..., 0]
    want = pipe.check(**given)
    changed = {**given, "image": photo(7)}
    assert not same(pipe.check(**changed), want)
    for form in FORMS:
        server.asked.clear()
        pictures = {key: formed(given[key], form, server, tmp_path) for key in IMAGES if given.get(key) is not None}
        assert same(pipe.check(**given | pictures), want), form
        assert len(server.asked) == (len(pictures) if form == "address" else 0)
    several = np.stack([photo(), photo(1)])
    one = {key: value for key, value in given.items() if key != "condition_image"}
    assert same(pipe.check(**one | {"image": several}), pipe.check(**one | {"image": list(several)}))


def test_masks_and_maps_for_several_images_are_asked_for_once(family, server, tmp_path):
    for name, key, array in (("inpainting", "mask_image", hole()), ("depth", "depth_map", photo(5)[..., 0])):
        server.asked.clear()
        where = formed(array, "address", server, tmp_path)
        family(name).check(**arguments(name, **{"image": [photo(), photo(1)], key: where}))
        assert len(server.asked) == 1


def test_the_image_that_guides_is_asked_for_once(family, server, tmp_path):
    where = formed(photo(), "address", server, tmp_path)
    family("variation of latents").check(**arguments("variation of latents", image=where, prompt=["a", "b"]))
    assert len(server.asked) == 1


def test_embeddings_are_of_images_in_every_form(family, server, tmp_path):
    pipe = family("variation of latents")
    want = pipe.encode_image_embeds([photo()])
    for form in FORMS:
        given = formed(photo(), form, server, tmp_path)
        for images in (given, [given], (given,)):
            np.testing.assert_array_equal(pipe.encode_image_embeds(images), want)
    np.testing.assert_array_equal(pipe.encode_image_embeds(photo()), want)
    np.testing.assert_array_equal(pipe.encode_image_embeds(photo() / 255), want)
    gray = photo()[..., 0]
    for array in (gray, gray[..., None], np.repeat(gray[..., None], 3, 2), gray / 255):
        np.testing.assert_array_equal(
            pipe.encode_image_embeds(array), pipe.encode_image_embeds([Image.fromarray(gray)])
        )
    both = pipe.encode_image_embeds([photo(1), photo()])
    np.testing.assert_array_equal(pipe.encode_image_embeds(np.stack([photo(1), photo()])), both)
    np.testing.assert_array_equal(both[1:], want)


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        ([], ValueError, "images is an empty list"),
        ("none.png", FileNotFoundError, "images 'none.png': no such file"),
        (3, ValueError, "images is a int; want a PIL image"),
        (b"x", ValueError, "images: not an image"),
    ],
)
def test_what_has_no_embedding(family, images, kind, message):
    with pytest.raises(kind, match=message):
        family("variation of latents").encode_image_embeds(images)


def test_a_checkpoint_without_an_image_encoder(family):
    with pytest.raises(ValueError, match="this checkpoint has no image encoder"):
        family("upscaling").encode_image_embeds([photo()])
