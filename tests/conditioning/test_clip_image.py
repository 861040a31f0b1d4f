"""Decoding and preprocessing of images, without torch."""

import io
import pathlib
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import unclip_jax
from unclip_jax.conditioning.clip_image import CLIP_MEAN, CLIP_STD, load_image, load_images, open_image, preprocess

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "preprocess.npz")
DIALECTS = ("diffusers", "original", "original-kornia-0.6.0")


def picture(width=40, height=30, seed=0):
    """Random uint8 (H, W, 3), smooth enough to survive JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def saved(image, path, **options):
    Image.fromarray(image).save(path, **options)
    return path


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def refused(source, *words):
    """The one line with which an image is refused."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_image(source)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("image")
    for word in words:
        assert word in message
    return error.type


# Preprocessing


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["landscape", "small", "square"])
def test_preprocess_equals_the_recordings(name, dialect):
    pixels = preprocess(GOLDEN[f"{name}_picture"], dialect)
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.float32
    # the order of float32 sums is all that may differ, and nothing in diffusers' way
    atol = 0 if dialect == "diffusers" else 5e-6
    np.testing.assert_allclose(pixels[::4, ::4], GOLDEN[f"{name}_{dialect}"], atol=atol, rtol=0)


def test_the_blur_of_the_two_kornia_versions_differs():
    image = np.random.default_rng(0).integers(0, 256, (768, 768, 3), np.uint8)
    newer, pinned = (preprocess(image, dialect).std() for dialect in DIALECTS[1:])
    assert 1.5 * pinned < newer


@pytest.mark.parametrize("dialect", DIALECTS)
@given(level=st.integers(0, 255), width=st.integers(64, 400), height=st.integers(64, 400), size=st.integers(1, 256))
@settings(max_examples=15, deadline=None)
def test_a_plain_image_stays_plain(dialect, level, width, height, size):
    pixels = preprocess(np.full((height, width, 3), level, np.uint8), dialect, size)
    want = (np.float32(level / 255) - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(pixels, np.broadcast_to(want, (size, size, 3)), atol=5e-6)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_image_of_the_right_size_is_only_normalised(dialect):
    image = picture(256, 256)
    want = (np.float32(image / 255) - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(preprocess(image, dialect, 256), want, atol=2e-6)


@pytest.mark.parametrize("dialect", DIALECTS)
@given(width=st.integers(64, 500), height=st.integers(64, 500), size=st.sampled_from([32, 56, 224]))
@settings(max_examples=10, deadline=None)
def test_a_mirrored_image_gives_mirrored_pixels(dialect, width, height, size):
    width -= width % 2 if dialect == "diffusers" else 0  # its crop takes the left one of two middles
    image = picture(width, height)
    if dialect == "diffusers" and int(size * width / min(width, height)) % 2:
        return
    direct, mirrored = preprocess(image, dialect, size), preprocess(image[:, ::-1], dialect, size)
    np.testing.assert_allclose(mirrored[:, ::-1], direct, atol=0.02)  # rounding to 8 bits in between


@pytest.mark.parametrize("dialect", DIALECTS)
def test_preprocess_takes_views_and_leaves_its_input_alone(dialect):
    image = np.asfortranarray(picture(130, 100))
    before = image.copy()
    image.flags.writeable = False
    np.testing.assert_array_equal(preprocess(image[::-1], dialect), preprocess(before[::-1].copy(), dialect))
    np.testing.assert_array_equal(image, before)


def test_the_smallest_images_are_taken():
    assert preprocess(np.zeros((1, 2, 3), np.uint8), "diffusers").shape == (224, 224, 3)
    assert preprocess(np.zeros((64, 64, 3), np.uint8), "original").shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("shape", "dialect", "message"),
    [
        ((1, 1, 3), "diffusers", "image is 1x1 pixels; want more than one"),
        ((1, 1, 3), "original", "image is 1x1 pixels; want more than one"),
        ((1, 1000, 3), "diffusers", "image is 1000x1 pixels; want an aspect ratio of at most 100:1"),
        ((70000, 64, 3), "original", "image is 64x70000 pixels; want an aspect ratio of at most 100:1"),
        ((63, 500, 3), "original", "image is 500x63 pixels; want sides of at least 64 (preprocess 'original')"),
        ((0, 5, 3), "diffusers", "image is 5x0 pixels; want more than one"),
        ((64, 64), "diffusers", "image is uint8 (64, 64); want uint8 (H, W, 3)"),
        ((64, 64, 4), "diffusers", "image is uint8 (64, 64, 4); want uint8 (H, W, 3)"),
        ((64, 64, 3), "clip", "preprocess is 'clip'; accepted: diffusers, original, original-kornia-0.6.0"),
    ],
)
def test_what_preprocess_cannot_take_is_refused(shape, dialect, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        preprocess(np.zeros(shape, np.uint8), dialect)


def test_preprocess_refuses_floats_and_sizes():
    with pytest.raises(ValueError, match="image is float32"):
        preprocess(np.zeros((64, 64, 3), np.float32), "diffusers")
    with pytest.raises(ValueError, match="size is 0; want at least 1"):
        preprocess(np.zeros((64, 64, 3), np.uint8), "diffusers", 0)


# What can be loaded


def test_the_same_image_from_every_kind_of_source(tmp_path):
    image = picture()
    path = saved(image, tmp_path / "ünï\u732b.png")
    sources = [
        image,
        image[:, ::-1][:, ::-1],
        np.asfortranarray(image),
        image / 255,
        (image / 255).astype(np.float32),
        Image.fromarray(image),
        path,
        str(path),
        path.read_bytes(),
        np.dstack([image, np.full((30, 40), 255, np.uint8)]),
    ]
    for source in sources:
        loaded = load_image(source)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, image)


def test_one_image_or_several():
    image, gray = picture(), picture()[..., 0]
    for source in (image, [image], (image,), image[None], image[None] / 255):
        (loaded,) = load_images(source)
        np.testing.assert_array_equal(loaded, image)
    first, second = load_images([Image.fromarray(image), gray])
    np.testing.assert_array_equal(second, np.repeat(gray[..., None], 3, 2))
    assert first.shape == second.shape
    for source in ([], np.zeros((0, 4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="images is an empty list"):
            load_images(source, "images")


def test_nothing_else_opens_images():
    """What is read of a file is decided in one place; the recipe in a PNG is not its image."""
    package = pathlib.Path(unclip_jax.__file__).parent
    files = [*package.rglob("*.py"), *package.with_name("convert").rglob("*.py")]
    found = {path.relative_to(package).as_posix() for path in files if "Image.open(" in path.read_text()}
    assert found == {"conditioning/clip_image.py", "image_files.py"}


def test_jax_arrays_load():
    import jax.numpy as jnp

    image = picture()
    np.testing.assert_array_equal(load_image(jnp.asarray(image)), image)
    np.testing.assert_array_equal(load_image(jnp.asarray(image, jnp.float32) / 255), image)


def test_the_result_is_the_callers_own():
    image = picture()
    load_image(image)[:] = 0
    assert image.any()
    opened = Image.fromarray(image)
    load_image(opened)[:] = 0
    np.testing.assert_array_equal(np.asarray(opened), image)


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 1)])
def test_gray_arrays_get_three_channels(shape):
    gray = picture()[..., 0]
    for array in (gray.reshape(shape), gray.reshape(shape) / 255):
        np.testing.assert_array_equal(load_image(array), np.repeat(gray[..., None], 3, 2))


@given(seed=st.integers(0, 99), dtype=st.sampled_from([np.float16, np.float32, np.float64]))
@settings(max_examples=20, deadline=None)
def test_floats_are_rounded_to_the_nearest_level(seed, dtype):
    values = np.random.default_rng(seed).random((5, 7, 3)).astype(dtype)
    assert np.abs(load_image(values) / 255.0 - values).max() <= 0.5 / 255 + 1e-9


# JPEG keeps no lossless pixels, so the comparison with it is loose.
@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "webp", "tiff", "ppm", "tga", "jp2", "jpg", "ico"])
def test_every_file_format_is_loaded(tmp_path, suffix):
    image = picture(64, 64)
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}, "ico": {"sizes": [(64, 64)]}}
    path = saved(image, tmp_path / f"picture.{suffix}", **options.get(suffix, {}))
    loaded = load_image(path)
    assert loaded.shape == image.shape
    assert np.abs(loaded.astype(int) - image).mean() <= {"gif": 12, "jpg": 2}.get(suffix, 0)


@pytest.mark.parametrize("suffix", ["jpg", "tiff", "webp", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, suffix, orientation):
    """The stored image is the upright one with the inverse transposition; undone, all eight agree."""
    upright = Image.fromarray(picture(64, 48))
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Image.Transpose
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif, quality=100)
    for source in (path, Image.open(path), path.read_bytes(), open_image(path, "image")):
        loaded = load_image(source)
        assert loaded.shape == (48, 64, 3)
        assert np.abs(loaded.astype(int) - np.asarray(upright)).mean() < 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
@pytest.mark.parametrize("exif", [b"garbage", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"MM"])
def test_a_broken_exif_block_is_ignored(tmp_path, suffix, exif):
    path = saved(picture(), tmp_path / f"picture.{suffix}", exif=b"Exif\0\0" + exif)
    assert load_image(path).shape == (30, 40, 3)


def test_a_camera_whose_exif_block_cannot_be_written_again_still_turns_the_image(tmp_path):
    """With a tag of the wrong type, on which Pillow 13's `ImageOps.exif_transpose` fails."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x0100] = 5  # a number by the standard, turned into text below
    block = bytearray(exif.tobytes())
    block[block.index(b"\x01\x00\x00\x04") + 3] = 2
    path = saved(picture(), tmp_path / "picture.webp", exif=bytes(block))
    assert load_image(path).shape == (40, 30, 3)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_colour_mode_becomes_rgb(mode):
    image = picture()
    through = {"PA": "P", "RGBa": "RGBA"}.get(mode, mode)
    converted = Image.fromarray(image).convert(through).convert(mode)
    loaded = load_image(converted).astype(int)
    gray = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    reference = gray if mode in ("1", "L", "LA") else image
    tolerance = {"1": 255, "P": 60, "PA": 60, "YCbCr": 2, "HSV": 4, "LAB": 4}.get(mode, 0)
    assert np.abs(loaded - reference).mean() <= tolerance
    assert loaded.shape == (30, 40, 3)


def test_one_bit_is_black_and_white():
    bits = np.random.default_rng(0).random((5, 6)) < 0.5
    np.testing.assert_array_equal(load_image(Image.fromarray(bits)), np.repeat(bits[..., None], 3, 2) * 255)


@given(
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    alpha=st.integers(0, 255),
    mode=st.sampled_from(["RGBA", "array", "LA"]),
)
@settings(max_examples=40, deadline=None)
def test_transparency_is_composited_on_white(colour, alpha, mode):
    rgba = np.full((2, 3, 4), [*colour, alpha], np.uint8)
    if mode == "LA":
        rgba[..., :3] = colour[0]
        loaded = load_image(Image.merge("LA", [Image.fromarray(rgba[..., i].copy()) for i in (0, 3)]))
    else:
        loaded = load_image(rgba if mode == "array" else Image.fromarray(rgba))
    want = rgba[..., :3] * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(loaded - want).max() <= 1


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_a_palettes_transparent_entry_is_white(tmp_path, transparency):
    image = Image.new("P", (4, 2), 0)
    image.putpalette([200, 10, 20, 1, 2, 3])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "palette.png", transparency=transparency)
    loaded = load_image(tmp_path / "palette.png")
    np.testing.assert_array_equal(loaded[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(loaded[1, 3], [200, 10, 20])


def test_a_named_transparent_colour_is_white(tmp_path):
    for mode, colour in (("RGB", (9, 8, 7)), ("L", 9)):
        image = Image.new(mode, (3, 2), colour)
        image.putpixel((1, 1), (1, 2, 3) if mode == "RGB" else 1)
        image.save(tmp_path / "named.png", transparency=colour)
        loaded = load_image(tmp_path / "named.png")
        assert (loaded[0] == 255).all()
        assert (loaded[1, 1] < 9).all()


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_gray_is_scaled(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257, 32768, 65534, 65535]], np.uint16)
    want = np.rint(values / 257).astype(np.uint8)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    image.save(tmp_path / f"deep.{suffix}")
    for source in (image, image.convert("I"), tmp_path / f"deep.{suffix}"):
        np.testing.assert_array_equal(load_image(source), np.repeat(want[..., None], 3, 2))


def test_16_bit_gray_with_a_transparent_value(tmp_path):
    Image.fromarray(np.array([[1000, 2570]], np.uint16)).save(tmp_path / "deep.png")
    data = (tmp_path / "deep.png").read_bytes()
    end_of_header = 8 + 25
    data = data[:end_of_header] + png_chunk(b"tRNS", struct.pack(">H", 1000)) + data[end_of_header:]
    (tmp_path / "deep.png").write_bytes(data)
    np.testing.assert_array_equal(load_image(tmp_path / "deep.png")[..., 0], [[255, 10]])


def test_16_bit_colour_becomes_8_bits(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 257 * 7, 0) * 2 for _ in range(3))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 3, 16, 2, 0, 0, 0))
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))
    np.testing.assert_array_equal(load_image(path), np.broadcast_to([255, 7, 0], (3, 2, 3)))


def test_float_images_are_from_0_to_1(tmp_path):
    values = np.array([[0, 0.5, 1]], np.float32)
    Image.fromarray(values).save(tmp_path / "float.tiff")
    np.testing.assert_array_equal(load_image(tmp_path / "float.tiff")[..., 0], [[0, 128, 255]])
    refused(Image.fromarray(values * 2), "from 0 to 2; want floats from 0 to 1")


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    for name in ("moving.gif", "moving.webp", "moving.png", "moving.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with Image.open(tmp_path / name) as opened:
            assert opened.n_frames == 3
        loaded = load_image(tmp_path / name)
        assert np.abs(loaded.astype(int) - [255, 0, 0]).max() <= 2


# What is refused


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((4, 4, 3), np.nan), "NaN or infinite"),
        (np.full((4, 4, 3), np.inf), "NaN or infinite"),
        (np.full((4, 4, 3), -0.01), "from -0.01 to -0.01; want floats from 0 to 1"),
        (np.linspace(0, 255, 48).reshape(4, 4, 3), "from 0 to 255; want floats from 0 to 1"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64; want uint8, or float16, float32 or float64 from 0 to 1"),
        (np.zeros((4, 4, 3), bool), "dtype bool"),
        (np.zeros((4, 4, 3), np.uint16), "dtype uint16"),
        (np.zeros((4, 4, 3), complex), "dtype complex128"),
        (np.full((4, 4, 3), "x"), "dtype <U1"),
        (np.zeros((3, 40, 40), np.uint8), "shape (3, 40, 40); want (H, W, 3)"),
        (np.zeros((4, 4, 2), np.uint8), "shape (4, 4, 2)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape (1, 4, 4, 3)"),
        (np.zeros(4, np.uint8), "shape (4,)"),
        (np.uint8(4), "shape ()"),
        (np.zeros((0, 4, 3), np.uint8), "not empty"),
        (np.zeros((4, 0), np.uint8), "not empty"),
    ],
)
def test_arrays_that_are_refused(array, words):
    assert refused(array, words) is ValueError


@pytest.mark.parametrize("source", [None, 3, [np.zeros((4, 4, 3), np.uint8)], io.BytesIO()])
def test_things_that_are_refused(source):
    words = "want a PIL image, a path, an address, or an array (H, W, 3)"
    assert refused(source, type(source).__name__, words) is ValueError


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "picture.png"
    assert refused(path, repr(str(path)), "no such file") is FileNotFoundError
    assert refused("", "no such file") is FileNotFoundError
    assert refused(tmp_path, "a folder") is ValueError
    assert refused("nul\0byte.png") is ValueError
    for content in (b"", b"not a picture", b"\0" * 1000):
        path.write_bytes(content)
        assert refused(path, repr(str(path)), "not an image in a supported format") is ValueError
        assert refused(content, "image: not an image in a supported format") is ValueError
    assert refused(path / "below") is ValueError


def test_other_programs_are_never_run(tmp_path):
    """Pillow would hand an EPS file, whatever its name, to Ghostscript."""
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path, format="EPS")
    assert refused(path, "not an image in a supported format") is ValueError


def test_images_without_pixels_or_closed(tmp_path):
    refused(Image.new("RGB", (0, 5)), "0x5 pixels")
    with Image.open(saved(picture(), tmp_path / "picture.png")) as opened:
        pass
    refused(opened, "cannot be read")


def test_gray_beyond_16_bits_is_refused():
    for value in (-1, 65536):
        refused(Image.new("I", (2, 2), value), f"gray values from {value} to {value}; want 0 to 65535")


def test_a_colour_mode_that_pillow_cannot_convert_is_refused():
    refused(Image.new("La", (2, 2)), "colour mode La")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))))
    assert refused(path, repr(str(path)), "900000000 pixels", "limit of 178956970 pixels") is ValueError
    assert refused(path.read_bytes(), "too large: ", "Set PIL.Image.MAX_IMAGE_PIXELS") is ValueError


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_up_to_pillows_limit_large_images_are_read(tmp_path, monkeypatch, action):
    """From half of it on Pillow warns, and warnings may be errors."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30)
    for width, height in ((40, 30), (80, 30)):
        path = saved(picture(width, height), tmp_path / "picture.png")
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            for source in (path, path.read_bytes()):
                assert load_image(source).shape == (height, width, 3)
    assert refused(saved(picture(81, 30), tmp_path / "picture.png"), "2430 pixels", "2400 pixels") is ValueError


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "jp2"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = saved(picture(), tmp_path / f"picture.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert refused(path, repr(str(path))) is ValueError


FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "TGA", "PPM", "PCX", "ICO", "QOI", "SGI"]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds odd in broken files
@given(
    format=st.sampled_from(FORMATS),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_broken_files_load_or_are_refused_in_one_line(tmp_path, format, cut, flips):
    buffer = io.BytesIO()
    Image.fromarray(picture(16, 16)).save(buffer, format=format)
    data = bytearray(buffer.getvalue())
    for where, value in flips:
        data[int(where * (len(data) - 1))] = value
    path = tmp_path / "broken"
    path.write_bytes(data[: max(int(cut * 2 * len(data)), 1)])
    message = ""
    try:
        assert load_image(path).ndim == 3
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
