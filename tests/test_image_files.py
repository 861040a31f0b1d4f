"""Pixels to images, recipes in PNG files, contact sheets."""

import json
import os
import re
import stat
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from unclip_jax.image_files import contact_sheet, read_recipe, refuse_nan, save_png, to_uint8, to_uint8_on_device

RECIPE = {
    "prompt": "a photo of a cat, sleeping",
    "negative_prompt": "blurry: very",
    "num_inference_steps": 20,
    "scheduler": "dpm++2m-karras",
    "guidance_scale": 10.0,
    "seed": 42,
    "index": 3,
    "height": 32,
    "width": 48,
    "noise_level": [0, 500],
    "image_weights": [1.0, 0.5],
    "mix_noise_level": 50,
    "eta": 0.0,
    "model": "stable-diffusion-2-1-unclip",
    "images": [{"name": "cat, left.jpg", "sha256": "ab" * 32}],
    "version": "0.1.0",
    "dtype": "float32",
    "preprocess": "diffusers",
}
FUZZ = {"max_examples": 60, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def plain(colour="teal", size=(48, 32)):
    return Image.new("RGB", size, colour)


def chunks(path):
    """The kinds of the text chunks of a PNG by keyword."""
    data, at, found = path.read_bytes(), 8, {}
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind in (b"tEXt", b"iTXt", b"zTXt"):
            found[data[at + 8 : at + 8 + length].split(b"\0")[0].decode()] = kind.decode()
        at += 12 + length
    return found


def insert_chunk(path, kind, data, before=b"IDAT"):
    png = path.read_bytes()
    at = png.index(before) - 4
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(png[:at] + chunk + png[at:])


# Rounding


def test_pixels_are_rounded_or_truncated():
    levels = np.array([0, 0.5, 1.5, 2.5, 127.49, 127.51, 254.9, 255], np.float32)
    images = np.broadcast_to((levels / 255)[:, None], (2, 1, 8, 3))
    rounded, truncated = to_uint8(images, "round"), to_uint8(images, "truncate")
    assert rounded.shape == (2, 1, 8, 3)
    assert rounded.dtype == truncated.dtype == np.uint8
    assert rounded[0, 0, :, 0].tolist() == [0, 0, 2, 2, 127, 128, 255, 255]
    assert truncated[0, 0, :, 0].tolist() == [0, 0, 1, 2, 127, 127, 254, 255]


@given(st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3))
def test_what_lies_outside_is_clipped(values):
    image = np.array(values, np.float32).reshape(1, 1, 1, 3)
    for rounding, most in (("round", 0.5), ("truncate", 1)):
        assert np.abs(to_uint8(image, rounding) - 255.0 * image.clip(0, 1)).max() <= most
    assert to_uint8(np.full((1, 1, 1, 3), np.inf), "round").max() == 255


def test_every_level_survives_the_way_there_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    np.testing.assert_array_equal(to_uint8(levels / np.float32(255), "round"), levels)


def test_bad_pixels_and_rounding():
    with pytest.raises(FloatingPointError, match="NaN pixels"):
        to_uint8(np.array([[[[0, np.nan, 0]]]]), "round")
    with pytest.raises(ValueError, match="rounding is 'floor'; accepted: round, truncate"):
        to_uint8(np.zeros((1, 2, 2, 3)), "floor")


def around_every_tie():
    """The floats at and beside every level and every tie of two levels, and what is special; (2, 1, T, 3)."""
    levels = np.arange(0, 255.5, 0.5, dtype=np.float32) / np.float32(255)
    beside = [np.nextafter(levels, np.float32(end)) for end in (-np.inf, np.inf)]
    special = np.array([-0.0, 1, np.inf, -np.inf, 1e-45, 1e-38, np.nextafter(np.float32(1), 2), -3, 7], np.float32)
    return np.resize(np.concatenate([levels, *beside, special]), (2, 1, 512, 3))


@pytest.mark.parametrize("rounding", ["round", "truncate"])
def test_a_device_rounds_as_the_host_does(rounding):
    images = around_every_tie()
    got, broken = to_uint8_on_device(images, rounding)
    np.testing.assert_array_equal(got, to_uint8(images, rounding))
    assert got.dtype == np.uint8
    assert not broken.any()


@given(st.lists(st.floats(-0.25, 1.25, width=32), min_size=6, max_size=6), st.sampled_from(["round", "truncate"]))
def test_a_device_rounds_any_pixel_as_the_host_does(values, rounding):
    images = np.array(values, np.float32).reshape(1, 1, 2, 3)
    np.testing.assert_array_equal(to_uint8_on_device(images, rounding)[0], to_uint8(images, rounding))


def test_a_device_tells_which_images_have_a_nan():
    images = around_every_tie()
    images[1, 0, 5, 2] = np.nan
    _, broken = to_uint8_on_device(images, "round")
    assert broken.tolist() == [False, True]
    with pytest.raises(FloatingPointError, match="NaN pixels"):
        refuse_nan(broken.any())


# Recipes


def test_recipe_and_pixels_come_back(tmp_path):
    path = tmp_path / "picture.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    save_png(path, image, RECIPE)
    assert read_recipe(path) == read_recipe(str(path)) == RECIPE
    with Image.open(path) as saved:
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(image))
    assert os.listdir(tmp_path) == ["picture.png"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values, max_size=3),
    max_leaves=5,
)


@given(prompt=st.text(), negative=st.text(), others=st.dictionaries(st.text(), json_values, max_size=4))
@settings(**FUZZ)
def test_any_text_comes_back(tmp_path, prompt, negative, others):
    recipe = others | {"prompt": prompt, "negative_prompt": negative}
    save_png(tmp_path / "picture.png", plain(size=(2, 2)), recipe)
    assert read_recipe(tmp_path / "picture.png") == recipe


def test_numbers_and_arrays_of_numpy_are_values(tmp_path):
    recipe = {"seed": np.int64(3), "guidance_scale": np.float32(2.5), "noise_level": np.array([1, 2])}
    save_png(tmp_path / "picture.png", plain(), recipe)
    assert read_recipe(tmp_path / "picture.png") == {"seed": 3, "guidance_scale": 2.5, "noise_level": [1, 2]}


def test_the_line_that_other_tools_read(tmp_path):
    save_png(tmp_path / "picture.png", plain(), RECIPE)
    with Image.open(tmp_path / "picture.png") as saved:
        text = saved.text["parameters"]
    assert text.splitlines() == [
        "a photo of a cat, sleeping",
        "Negative prompt: blurry: very",
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 10.0, Seed: 42, Size: 48x32, "
        'Model: stable-diffusion-2-1-unclip, Index: 3, Noise level: "[0, 500]", Image weights: "[1.0, 0.5]", '
        r'Mix noise level: 50, Eta: 0.0, Images: "[\"cat, left.jpg\"]", Version: unclip_jax 0.1.0',
    ]


def parsed(settings_line):
    """The settings line as the readers of that form take it apart."""
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', settings_line)
    return {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}


def test_quoted_values_are_read_as_they_were(tmp_path):
    recipe = RECIPE | {"model": 'a "good", model: v2', "scheduler": "something-new", "guidance_scale": [1, 2]}
    save_png(tmp_path / "picture.png", plain(), recipe)
    with Image.open(tmp_path / "picture.png") as saved:
        fields = parsed(saved.text["parameters"].splitlines()[-1])
    assert fields["Model"] == 'a "good", model: v2'
    assert fields["Sampler"] == "something-new"
    assert fields["CFG scale"] == "[1, 2]"
    assert json.loads(fields["Images"]) == ["cat, left.jpg"]
    assert fields["Size"] == "48x32"


def test_what_is_absent_is_left_out(tmp_path):
    for recipe in ({}, {"prompt": "", "negative_prompt": "", "scheduler": None, "images": [], "version": None}):
        save_png(tmp_path / "picture.png", plain(), recipe)
        with Image.open(tmp_path / "picture.png") as saved:
            assert saved.text["parameters"] == "Size: 48x32"
        assert read_recipe(tmp_path / "picture.png") == recipe


@pytest.mark.parametrize(
    ("prompt", "kind", "shown"),
    [
        ("plain", "tEXt", "plain"),
        ("café", "tEXt", "café"),
        ("猫 🐈 на крыше", "iTXt", "猫 🐈 на крыше"),
        ("half \ud83d pair", "tEXt", "half ? pair"),
        ("nul\0byte", "tEXt", "nulbyte"),
    ],
)
def test_prompts_in_every_script(tmp_path, prompt, kind, shown):
    path = tmp_path / "picture.png"
    save_png(path, plain(), {"prompt": prompt})
    assert chunks(path) == {"unclip_jax": "tEXt", "parameters": kind}
    assert read_recipe(path)["prompt"] == prompt
    with Image.open(path) as saved:
        assert saved.text["parameters"].splitlines()[0] == shown


def test_the_file_has_the_users_usual_rights(tmp_path):
    (tmp_path / "other").write_text("")
    save_png(tmp_path / "picture.png", plain(), {})
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "picture.png")]
    assert rights[0] == rights[1]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_png(path, plain("red"), {"seed": 1})
    before = path.read_bytes()

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        monkeypatch.setattr(os, call, disk_full)
        with pytest.raises(OSError, match="No space left"):
            save_png(path, plain("blue"), {"seed": 2})
        monkeypatch.undo()
    with pytest.raises(OSError, match="cannot write mode F"):
        save_png(path, Image.new("F", (2, 2)), {})
    assert os.listdir(tmp_path) == ["picture.png"]
    assert path.read_bytes() == before


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_png(tmp_path / "picture.png", plain(), {})
    assert os.listdir(tmp_path) == []


def test_recipes_and_folders_that_are_refused(tmp_path):
    for value in (float("nan"), object()):
        with pytest.raises(ValueError, match="recipe cannot be written as JSON"):
            save_png(tmp_path / "picture.png", plain(), {"seed": value})
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        save_png(tmp_path / "missing" / "picture.png", plain(), {})
    assert os.listdir(tmp_path) == []


def unreadable(path, *words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_recipe(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{str(path)!r}: ")
    for word in words:
        assert word in message
    return error.type


def test_files_without_a_recipe(tmp_path):
    path = tmp_path / "picture.png"
    assert unreadable(path, "no such file") is FileNotFoundError
    assert unreadable(tmp_path, "cannot be read") is ValueError
    plain().save(path)
    assert unreadable(path, "without a recipe") is ValueError
    plain().save(path, format="JPEG")
    assert unreadable(path, "not a PNG file") is ValueError
    path.write_bytes(b"")
    assert unreadable(path, "not a PNG file") is ValueError


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", "null", '"text"', "[" * 100_000, '{"seed": ' + "9" * 5000 + "}", "\u00ff"]
)
def test_recipes_that_are_none(tmp_path, text):
    path = tmp_path / "picture.png"
    information = PngImagePlugin.PngInfo()
    information.add_text("unclip_jax", text)
    plain().save(path, pnginfo=information)
    assert unreadable(path, "recipe") is ValueError


def test_a_recipe_after_the_pixels_is_found(tmp_path):
    path = tmp_path / "picture.png"
    plain().save(path)
    insert_chunk(path, b"tEXt", b'unclip_jax\0{"seed": 5}', before=b"IEND")
    assert read_recipe(path) == {"seed": 5}


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_text_that_unpacks_to_gigabytes_is_refused(tmp_path, kind):
    path = tmp_path / "picture.png"
    plain().save(path)
    packed = zlib.compress(b" " * 50_000_000)
    insert_chunk(path, kind, b"unclip_jax\0" + (b"\0" if kind == b"zTXt" else b"\1\0\0\0") + packed)
    assert unreadable(path) is ValueError


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds odd in broken files
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4))
@settings(**FUZZ)
def test_broken_files_are_read_or_refused_in_one_line(tmp_path, cut, flips):
    path = tmp_path / "picture.png"
    save_png(path, plain(size=(4, 4)), {"prompt": "cat"})
    data = bytearray(path.read_bytes())
    for where, value in flips:
        data[int(where * (len(data) - 1))] = value
    path.write_bytes(data[: max(int(cut * 2 * len(data)), 1)])
    message = ""
    try:
        assert isinstance(read_recipe(path), dict)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message


# Contact sheets


def where(sheet, colour):
    """Bounding box (left, top, right, bottom) of a colour on the sheet."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_the_input_stands_beside_its_variations():
    colours = [(200, i, 0) for i in range(4)]
    sheet = contact_sheet([(plain((0, 0, 200)), "cat.jpg")], [(plain(c, (64, 64)), "seed 1") for c in colours])
    source = where(sheet, (0, 0, 200))
    boxes = [where(sheet, c) for c in colours]
    assert all(source[2] < box[0] for box in boxes)
    assert all((right - left, bottom - top) == (256, 256) for left, top, right, bottom in boxes)
    assert (source[2] - source[0], source[3] - source[1]) == (256, 171)  # 48 x 32, enlarged to fit
    assert boxes[0][1] == boxes[1][1] < boxes[2][1] == boxes[3][1]
    assert boxes[0][0] == boxes[2][0] < boxes[1][0] == boxes[3][0]
    assert source[1] - boxes[0][1] == (256 - 171) // 2


def test_columns_put_each_input_beside_its_own_variations():
    inputs = [(plain((0, i, 200), (8, 8)), "in") for i in range(3)]
    variations = [(plain((200, i, 0), (8, 8)), "out") for i in range(6)]
    sheet = contact_sheet(inputs, variations, columns=2, cell=40)
    for i in range(3):
        row = where(sheet, (0, i, 200))[1]
        assert row == where(sheet, (200, 2 * i, 0))[1] == where(sheet, (200, 2 * i + 1, 0))[1]


@given(
    inputs=st.integers(0, 12),
    variations=st.integers(0, 100),
    columns=st.none() | st.integers(1, 120),
    cell=st.integers(32, 70),
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5),
)
@settings(max_examples=25, deadline=None)
def test_any_number_of_images_fits_without_overlap(inputs, variations, columns, cell, sizes):
    if not inputs + variations:
        return
    pictures = [
        (plain((9, i % 100, i // 100), sizes[i % len(sizes)]), f"number {i}") for i in range(inputs + variations)
    ]
    sheet = contact_sheet(pictures[:inputs], pictures[inputs:], columns, cell)
    assert sheet.mode == "RGB"
    pixels = np.asarray(sheet).astype(int)
    rows, across = np.nonzero(pixels[..., 0] == 9)
    number = pixels[rows, across] @ [0, 1, 100]
    for i in range(inputs + variations):
        height, width = (np.ptp(at[number == i]) + 1 for at in (rows, across))
        assert max(height, width) == cell
        assert (number == i).sum() == height * width  # nothing is drawn over it
    assert (np.asarray(sheet)[[0, -1]] == 250).all()
    assert (np.asarray(sheet)[:, [0, -1]] == 250).all()


def test_labels_stay_inside_their_cells():
    label = "a name that is far too long for its place " * 1000
    sheet = np.asarray(contact_sheet([], [(plain("#fafafa", (8, 8)), label)] * 2, columns=2, cell=64))
    margin, gap = 12, 8
    between = sheet[margin + 30 :, margin + 64 : margin + 64 + gap]
    assert (between == 250).all()
    assert (sheet[margin + 30 :, margin : margin + 64] < 100).any()


def test_a_long_label_ends_in_an_ellipsis_and_an_odd_one_is_drawn():
    blank = (plain(size=(8, 8)), "")
    same = [contact_sheet([], [(blank[0], text)]) for text in ("é×\n猫", "ex ?")]
    np.testing.assert_array_equal(*map(np.asarray, same))
    assert contact_sheet([], [(blank[0], "\ud800")]).size == contact_sheet([], [blank]).size


def test_images_of_any_kind_and_mode(tmp_path):
    plain("red").save(tmp_path / "red.jpg")
    sources = [tmp_path / "red.jpg", str(tmp_path / "red.jpg"), np.zeros((5, 9, 3)), Image.new("RGBA", (4, 4))]
    sheet = contact_sheet([(s, "in") for s in sources], [(Image.new("1", (1, 90)), "thin")], cell=32)
    assert sheet.mode == "RGB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "inputs and variations are both empty; want at least one image"),
        (([], [(plain(), "")], 0), "columns is 0; want at least 1"),
        (([], [(plain(), "")], 1, 8), "cell is 8; want at least 32"),
    ],
)
def test_sheets_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        contact_sheet(*arguments)
