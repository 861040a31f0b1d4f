"""Images for CLIP's image encoder: decoding any image, then one of three ways of resizing it to 224 x 224."""

import contextlib
import io
import os
import warnings
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from unclip_jax.conditioning.address import fetch, is_address, shown

Preprocess = Literal["diffusers", "original", "original-kornia-0.6.0"]
# A stored image: opened, at a path or an address, or the bytes of a file.
StoredImage = Image.Image | str | os.PathLike[str] | bytes
ImageSource = StoredImage | NDArray[Any]
STORED = (Image.Image, str, os.PathLike, bytes)

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

# EXIF's orientation -> the transposition that puts the image upright. (Pillow's own function also rewrites the EXIF
# block, and fails on some cameras' blocks.)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow keeps of a file that has the orientation in it.
TURNED_BY = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
# Formats for which Pillow runs another program (Ghostscript) or has the operating system draw.
REFUSED_FORMATS = ("EPS", "WMF")
# Resizing the shorter side to 224 makes the longer one this many times as long, before the crop.
LARGEST_ASPECT_RATIO = 100


def load_image(source: ImageSource, name: str = "image") -> NDArray[np.uint8]:
    """Decodes an image to uint8 (H, W, 3) RGB.

    The EXIF orientation is applied, transparency is composited on white, and 16-bit gray is scaled to 8 bits. Other
    colour modes are converted as Pillow does (colour profiles are not applied). Of an animation the first frame is
    read.

    Args:
        source: A PIL image, the path of an image file, its address (http, https) or data URI, its bytes, or an array
            (H, W, 3), (H, W, 4), (H, W, 1) or (H, W) of uint8 or of floats from 0 to 1.
        name: What error messages call it.

    Returns:
        (H, W, 3) uint8.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The source is not an image that can be read.
        OSError: As in `unclip_jax.conditioning.address.fetch`, with the same subclasses.
    """
    if isinstance(source, STORED):
        return _rgb(*_opened(source, name))
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source), name)
    raise ValueError(
        f"{name} is a {type(source).__name__}; want a PIL image, a path, an address, or an array (H, W, 3)"
    )


def load_images(source: Any, name: str = "image") -> list[NDArray[np.uint8]]:
    """Decodes one image or several, see `load_image`.

    Args:
        source: One image, a list of images, or an array (images, H, W, C).
        name: What error messages call it.

    Returns:
        A list of (H, W, 3) uint8.

    Raises:
        ValueError: The list is empty, or as in `load_image`.
        OSError: As in `load_image`.
    """
    return [load_image(item, name) for item in several(source, name)]


def several(source: Any, name: str = "image") -> list[Any]:
    """A list of the images in a list, in an array (images, H, W, C), or of the only one.

    Raises:
        ValueError: There is none.
    """
    stacked = not isinstance(source, STORED) and getattr(source, "ndim", 0) == 4
    sources = list(source) if stacked or isinstance(source, list | tuple) else [source]
    if not sources:
        raise ValueError(f"{name} is an empty list")
    return sources


def open_image(source: StoredImage, name: str) -> Image.Image:
    """An image decoded and upright, but in its own colour mode. Raises the same errors as `load_image`."""
    return _opened(source, name)[0]


def preprocess(image: NDArray[np.uint8], mode: Preprocess, size: int = 224) -> NDArray[np.float32]:
    """Converts an image to the image encoder's pixel values, normalised by CLIP's mean and standard deviation.

    Args:
        image: (H, W, 3) uint8.
        mode: "diffusers": bicubic resize of the shorter side to `size`, then the middle square, bit for bit as
            transformers' `CLIPImageProcessorPil`. "original": Stability's code with kornia 0.6.4 or newer; the whole
            image is squashed into the square. "original-kornia-0.6.0": the same with the version that its requirements
            pin, which blurs more before a reduction.
        size: The side of the square.

    Returns:
        (size, size, 3) float32.

    Raises:
        ValueError: The image has one pixel, or one side more than 100 times the other; or, in the original's ways, a
            side below 64 pixels.
    """
    if mode not in get_args(Preprocess):
        raise ValueError(f"preprocess is {mode!r}; accepted: {', '.join(get_args(Preprocess))}")
    if size < 1:
        raise ValueError(f"size is {size}; want at least 1")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}; want uint8 (H, W, 3)")
    height, width = image.shape[:2]
    if not height * width > 1:
        raise ValueError(f"image is {width}x{height} pixels; want more than one")
    if max(height, width) > LARGEST_ASPECT_RATIO * min(height, width):
        raise ValueError(f"image is {width}x{height} pixels; want an aspect ratio of at most {LARGEST_ASPECT_RATIO}:1")
    if mode == "diffusers":
        # transformers multiplies by 1/255 in float64
        pixels = (_middle_square(image, size) * (1 / 255)).astype(np.float32)
    else:
        pixels = _squashed(image, mode, size)
    return (pixels - CLIP_MEAN) / CLIP_STD


def _opened(source: StoredImage, name: str) -> tuple[Image.Image, str]:
    """The image, and its name in messages: a file is named with its path, an address is shown."""
    if isinstance(source, Image.Image):
        return _upright(source, name), name
    file: Any = source
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    elif is_address(path := os.fspath(source)):
        name, file = f"{name} {shown(path)!r}", io.BytesIO(fetch(path, name))
    else:
        name, file = f"{name} {path!r}", path
    try:
        loaded = _header(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{name}: a folder; want an image file") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: not an image in a supported format, such as PNG, JPEG or WebP") from None
    except Exception as error:  # on broken files Pillow raises whatever it stumbles over
        raise _unreadable(error, name) from error
    with loaded:
        return _upright(loaded, name), name


def _header(file: Any) -> Image.Image:
    """An image whose pixels are not read yet.

    Pillow warns about large images and refuses those of twice that size; here the warning's size is the limit.
    """
    Image.init()  # all of Pillow's formats, so that some can be left out
    formats = [format for format in Image.ID if format not in REFUSED_FORMATS]
    try:
        return Image.open(file, formats=formats)
    except Image.DecompressionBombWarning:  # where warnings are errors
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=formats)


def _unreadable(error: Exception, name: str) -> ValueError:
    if isinstance(error, Image.DecompressionBombError):
        return ValueError(f"{name}: too large: {_line(error)} Set PIL.Image.MAX_IMAGE_PIXELS for one that you trust")
    return ValueError(f"{name}: cannot be read: {_line(error)}")


def _upright(loaded: Image.Image, name: str) -> Image.Image:
    try:
        loaded.load()
    except Exception as error:
        raise _unreadable(error, name) from error
    if not loaded.width * loaded.height:
        raise ValueError(f"{name} is {loaded.width}x{loaded.height} pixels; want at least one")
    orientation = None
    with contextlib.suppress(Exception):  # a broken EXIF block does not spoil an image: it is taken as it is stored
        orientation = UPRIGHT.get(loaded.getexif().get(ExifTags.Base.Orientation, 1))
    if orientation is None:
        return loaded.copy()  # which outlives the file
    upright = loaded.transpose(orientation)
    for key in TURNED_BY:  # or it would be turned once more where it is given on
        upright.info.pop(key, None)
    return upright


def _rgb(loaded: Image.Image, name: str) -> NDArray[np.uint8]:
    if loaded.mode == "F":
        return _from_array(np.asarray(loaded), name)
    if loaded.mode.startswith("I"):
        return _from_array(_gray_8_bit(loaded, name), name)
    try:
        if loaded.has_transparency_data:
            loaded = loaded.convert("RGBA")
            loaded = Image.alpha_composite(Image.new("RGBA", loaded.size, "white"), loaded)
        return np.array(loaded.convert("RGB"))
    except Exception as error:
        raise ValueError(
            f"{name} has colour mode {loaded.mode}, which cannot be converted to RGB: {_line(error)}"
        ) from error


def _gray_8_bit(loaded: Image.Image, name: str) -> NDArray[np.uint8]:
    """Gray of modes I;16 and I, which Pillow would clip at 255; I holds the 16-bit values of some formats."""
    values = np.asarray(loaded).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} has gray values from {values.min()} to {values.max()}; want 0 to 65535 in mode I")
    gray = ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
    gray[values == loaded.info.get("transparency", -1)] = 255  # a PNG may name one transparent gray
    return gray


def _from_array(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; want (H, W, 3), (H, W, 4), (H, W, 1) or (H, W), not empty")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has values that are NaN or infinite; want floats from 0 to 1")
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{name} has values from {array.min():.5g} to {array.max():.5g}; want floats from 0 to 1")
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {array.dtype}; want uint8, or float16, float32 or float64 from 0 to 1")
    if array.shape[2] == 4:
        return _rgb(Image.fromarray(np.ascontiguousarray(array)), name)
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)))


def _middle_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return resized[top : top + size, left : left + size]


def _squashed(image: NDArray[np.uint8], mode: Preprocess, size: int) -> NDArray[np.float32]:
    """The original's way: sides cut to multiples of 64, then kornia's resize with antialiasing and aligned corners.

    kornia blurs, then interpolates. Both are linear along each axis, so one matrix per axis does both. The result
    overshoots 0..1 where bicubic does; the original does not clip it.
    """
    height, width = image.shape[:2]
    if min(height, width) < 64:
        raise ValueError(f"image is {width}x{height} pixels; want sides of at least 64 (preprocess {mode!r})")
    height, width = height - height % 64, width - width % 64
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    x = np.asarray(resized, np.float32) / 255 * 2 - 1
    reduced = max(height, width) > size
    rows, columns = (
        _resampling_matrix(length, size, _blur_kernel(length / size, mode) if reduced else np.ones(1))
        for length in (height, width)
    )
    x = (rows @ x.reshape(height, width * 3)).reshape(size, width, 3)
    return np.asarray((columns @ x + 1) / 2, np.float32)


def _blur_kernel(factor: float, mode: Preprocess) -> NDArray[np.float64]:
    """kornia's Gaussian, of odd length, before a reduction by `factor`; its rule changed between 0.6.0 and 0.6.4."""
    if mode == "original-kornia-0.6.0":
        sigma = max(factor, 1.0)
        length = int(4 * sigma)
    else:
        sigma = max((factor - 1) / 2, 0.001)
        length = int(max(4 * sigma, 3))
    radius = length // 2
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return kernel / kernel.sum()


def _resampling_matrix(length: int, size: int, blur: NDArray[np.float64]) -> NDArray[np.float32]:
    """Blur (reflected at the ends), then PyTorch's bicubic interpolation with aligned corners: (size, length)."""
    # PyTorch finds the positions in float32, which shifts the weights more than float32 arithmetic on pixels does.
    position = np.arange(size, dtype=np.float32) * np.float32((length - 1) / max(size - 1, 1))
    tap = np.floor(position).astype(int)[:, None] + np.arange(-1, 3)  # (size, 4)
    weight = _cubic(np.abs(position[:, None].astype(np.float64) - tap))
    tap = np.clip(tap, 0, length - 1)

    radius = len(blur) // 2
    source = np.abs(tap[..., None] + np.arange(-radius, radius + 1)) % (2 * length - 2)
    source = np.minimum(source, 2 * length - 2 - source)  # (size, 4, len(blur))
    matrix = np.zeros((size, length))
    np.add.at(matrix, (np.arange(size)[:, None, None], source), weight[..., None] * blur)
    return matrix.astype(np.float32)


def _cubic(distance: NDArray[np.float64], a: float = -0.75) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel for distances from 0 to 2, with PyTorch's parameter."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, far)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
