"""Output: pixels to images, PNG files that carry their recipe, and the contact sheet."""

import functools
import io
import json
import math
import os
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from unclip_jax.conditioning.address import fetch, is_address, shown
from unclip_jax.conditioning.clip_image import ImageSource, load_image

Rounding = Literal["round", "truncate"]
NAN_PIXELS = "images have NaN pixels: the network overflowed; try dtype float32 or bfloat16"

RECIPE_KEY = "unclip_jax"  # text chunk with the whole recipe as JSON
PARAMETERS_KEY = "parameters"  # text chunk with the line that AUTOMATIC1111's web UI started and other tools read

# Our solvers by the names that those tools know; others keep our name.
SAMPLER_NAMES = {
    "ddim": "DDIM",
    "ldm-ddim": "DDIM",
    "pndm": "PLMS",
    "dpm++2m": "DPM++ 2M",
    "ldm-dpm": "DPM++ 2M",
    "dpm++2m-karras": "DPM++ 2M Karras",
}

BACKGROUND, MAT, RULE, TEXT, HEADING = "#fafafa", "#efefef", "#d8d8d8", "#3c3c3c", "#8a8a8a"
LOOKALIKES = str.maketrans("×–—‘’“”", "x--''\"\"")


def to_uint8(images: ArrayLike, rounding: Rounding) -> NDArray[np.uint8]:
    """Converts floats in 0..1 to 8 bits. Values outside are clipped, as in both references.

    Args:
        images: (..., H, W, 3) floats.
        rounding: "round" to the nearest level, halves to even, as diffusers does; or "truncate", as Stability's code
            does.

    Returns:
        uint8 of the same shape.

    Raises:
        FloatingPointError: There is a NaN, which means that the network overflowed in its dtype.
        ValueError: The rounding is unknown.
    """
    levels = _levels(np, np.asarray(images, np.float32), rounding)
    refuse_nan(np.isnan(levels).any())
    return levels.astype(np.uint8)


@functools.partial(jax.jit, static_argnames="rounding")
def to_uint8_on_device(images: jax.Array, rounding: Rounding) -> tuple[jax.Array, jax.Array]:
    """`to_uint8` of (B, H, W, 3) float32 where they are, bit for bit, and which of the images have a NaN, (B,) bool.

    For `refuse_nan` on the host; the pixels of such an image mean nothing.
    """
    levels = _levels(jnp, images, rounding)
    return levels.astype(jnp.uint8), jnp.isnan(levels).any(axis=(1, 2, 3))


def refuse_nan(found: Any) -> None:
    """Raises FloatingPointError where a NaN was found in images."""
    if found:
        raise FloatingPointError(NAN_PIXELS)


def _levels(numpy: Any, images: Any, rounding: Rounding) -> Any:
    """The 8-bit levels of float32 images, as floats. numpy: or jax.numpy."""
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding is {rounding!r}; accepted: {', '.join(get_args(Rounding))}")
    levels = numpy.clip(images, 0, 1) * np.float32(255)
    return numpy.rint(levels) if rounding == "round" else levels


def save_png(path: str | os.PathLike[str], image: Image.Image, recipe: Mapping[str, Any]) -> None:
    """Writes a PNG with its recipe in two text chunks: JSON for `read_recipe`, and the line that other tools read.

    The file appears complete or not at all.

    Args:
        path: The file.
        image: The image.
        recipe: JSON values, including numpy's numbers and arrays. The line shows these keys, all optional: prompt,
            negative_prompt, num_inference_steps, scheduler, guidance_scale, seed, index, noise_level, image_weights,
            mix_noise_level, eta, model, images (each with a "name"), version. The size is the image's.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The recipe cannot be written as JSON.
        OSError: The disk refuses.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r}: the folder does not exist")
    data = png_bytes(image, recipe)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def png_bytes(image: Image.Image, recipe: Mapping[str, Any]) -> bytes:
    """The file that `save_png` writes. Raises ValueError for a recipe that cannot be written as JSON."""
    try:
        text = json.dumps(dict(recipe), default=_plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe cannot be written as JSON: {error}") from error
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(RECIPE_KEY, text)
    # A lone surrogate has no UTF-8, and NUL would end the text early for some readers.
    line = _parameters(json.loads(text), image).encode("utf-8", "replace").decode().replace("\0", "")
    chunks.add_text(PARAMETERS_KEY, line)  # becomes the international kind, iTXt, where Latin-1 does not do
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=chunks)
    return file.getvalue()


def read_recipe(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the recipe that `save_png` wrote into a PNG.

    Args:
        source: A path or an address.

    Returns:
        The recipe.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a PNG, is broken, or has no recipe of ours.
        OSError: As in `unclip_jax.conditioning.address.fetch`, with the same subclasses.
    """
    path, fetched = os.fspath(source), is_address(os.fspath(source))
    name = repr(shown(path) if fetched else path)
    file = io.BytesIO(fetch(path, "image")) if fetched else path
    try:
        with Image.open(file, formats=["PNG"]) as image:
            # Pillow bounds the text's memory. Loading the pixels finds chunks that another program put after them.
            text = image.info.get(RECIPE_KEY) or image.text.get(RECIPE_KEY)  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: not a PNG file") from None
    except Exception as error:  # Pillow raises whatever it stumbles over
        raise ValueError(f"{name}: cannot be read as a PNG file: {' '.join(str(error).split())}") from error
    if text is None:
        raise ValueError(f"{name}: a PNG file without a recipe of unclip_jax in it")
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: the recipe is not JSON: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{name}: the recipe is a JSON {type(recipe).__name__}; want an object")
    return recipe


def contact_sheet(
    inputs: Sequence[tuple[ImageSource, str]],
    variations: Sequence[tuple[ImageSource, str]],
    columns: int | None = None,
    cell: int = 256,
) -> Image.Image:
    """One RGB image with the inputs at the left, the variations beside them, and a label below each.

    Args:
        inputs: Images (anything that `load_image` takes) with their labels.
        variations: Likewise. One of the two may be empty.
        columns: Of the variations; by default the sheet is as square as possible. With one row per input (columns =
            variations of each), every input stands beside its own variations.
        cell: The side, in pixels, of the square into which each image is fitted; at least 32.

    Returns:
        The sheet.

    Raises:
        ValueError: Both lists are empty, or a number is out of range.
    """
    if not inputs and not variations:
        raise ValueError("inputs and variations are both empty; want at least one image")
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}; want at least 1")
    if cell < 32:
        raise ValueError(f"cell is {cell}; want at least 32")
    columns = min(columns or math.ceil(math.sqrt(len(variations))), len(variations))
    rows = max(math.ceil(len(variations) / max(columns, 1)), math.ceil(math.sqrt(len(inputs))))
    input_columns = math.ceil(len(inputs) / rows)

    margin, gap = max(cell // 8, 12), max(cell // 16, 8)
    font, heading = (_font(max(cell // part, 10)) for part in (17, 13))
    ascent, descent = font.getmetrics()
    label_height = gap // 2 + ascent + descent
    heading_height = sum(heading.getmetrics()) + gap
    step_x, step_y = cell + gap, cell + label_height + gap + gap // 2

    def block_width(count: int) -> int:
        return count * step_x - gap

    divided = bool(inputs and variations)
    left = margin + (block_width(input_columns) + 2 * margin if divided else 0)
    width = left + block_width(columns if variations else input_columns) + margin
    height = margin + heading_height + rows * step_y - gap - gap // 2 + margin
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if divided:
        draw.line((left - margin, margin, left - margin, height - margin), RULE, max(cell // 256, 1))

    for x0, title, images, across in (
        (margin, "input", inputs, input_columns),
        (left, "variation", variations, columns),
    ):
        if images:
            title = title if len(images) == 1 else f"{len(images)} {title}s"
            draw.text((x0, margin), _elide(title, heading, block_width(across)), HEADING, heading)
        for index, (source, label) in enumerate(images):
            row, column = divmod(index, across)
            x, y = x0 + column * step_x, margin + heading_height + row * step_y
            image = _fit(Image.fromarray(load_image(source)), cell)
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), MAT)
            sheet.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
            draw.text((x + cell / 2, y + cell + gap // 2), _elide(label, font, cell), TEXT, font, anchor="ma")
    return sheet


def _parameters(recipe: dict[str, Any], image: Image.Image) -> str:
    """Prompt, then "Negative prompt: ...", then one line of "Name: value" pairs; absent values are left out."""
    scheduler = recipe.get("scheduler")
    settings = {
        "Steps": recipe.get("num_inference_steps"),
        "Sampler": SAMPLER_NAMES.get(scheduler, scheduler) if isinstance(scheduler, str) else scheduler,
        "CFG scale": recipe.get("guidance_scale"),
        "Seed": recipe.get("seed"),
        "Size": f"{image.width}x{image.height}",
        "Model": recipe.get("model"),
        "Index": recipe.get("index"),
        "Noise level": recipe.get("noise_level"),
        "Image weights": recipe.get("image_weights"),
        "Mix noise level": recipe.get("mix_noise_level"),
        "Eta": recipe.get("eta"),
        "Images": [image.get("name") for image in recipe.get("images") or []] or None,
        "Version": recipe.get("version") and f"unclip_jax {recipe['version']}",
    }
    negative, prompt = recipe.get("negative_prompt"), recipe.get("prompt") or ""
    lines = [
        prompt if isinstance(prompt, str) else " | ".join(prompt),
        f"Negative prompt: {negative}" if negative else "",
        ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None),
    ]
    return "\n".join(line for line in lines if line)


def _quoted(value: Any) -> str:
    """A value of the settings line. One with a separator is put in quotes, the way readers of that line undo."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and JAX
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    width, height = (max(round(length * scale), 1) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's promise where a size is asked for
    return font


def _elide(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of a text, on one line, as fits into `width` pixels.

    Pillow's own font has little more than ASCII: accents are dropped, other letters become question marks.
    """
    text = unicodedata.normalize("NFKD", " ".join(text.split()).translate(LOOKALIKES))
    text = "".join(c if c.isascii() or c == "·" else "?" for c in text if not unicodedata.combining(c))
    if font.getlength(text[:width]) <= width and len(text) <= width:  # no letter is narrower than a pixel
        return text
    fits = max((n for n in range(min(len(text), width)) if font.getlength(text[:n] + "…") <= width), default=0)
    return text[:fits].rstrip() + "…"
