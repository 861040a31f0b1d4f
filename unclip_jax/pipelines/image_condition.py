"""The pictures that an unCLIP checkpoint is conditioned by: their embeddings, each noised to a level, or mixed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.conditioning.clip_image import load_images
from unclip_jax.pipelines import arguments as check


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCondition:
    """One picture an image, or all of them mixed into one condition.

    images: (H, W, 3) uint8 each, or image_embeds: (pictures, D). noise_level: (pictures,). weights: (pictures,) of the
    mix, None without. image_noise: (B, draws, D), a draw for each picture of an image and one for a mix noised again.
    """

    pictures: int
    images: list[np.ndarray] | None
    image_embeds: np.ndarray | None
    noise_level: np.ndarray
    weights: np.ndarray | None = None
    mix_noise_level: int | None = None
    image_noise: np.ndarray | None = None


def check_condition(config: CheckpointConfig, a: Mapping[str, Any], name: str = "image") -> ImageCondition:
    """The condition in a call's arguments `a`, the noise given for it being checked as for one image a picture.

    name: what the caller's argument is called that is `a["image"]`. Arguments that a pipeline does not have need not be
    there. Raises ValueError, FileNotFoundError.
    """
    d = config.image_embedding_dim
    assert d is not None
    images, embeds = None, None
    if (a["image"] is None) == (a["image_embeds"] is None):
        raise ValueError(
            f"give one of {name} and image_embeds, " + ("not both" if a["image"] is not None else "got neither")
        )
    if a["image"] is not None:
        if config.image_encoder is None:
            raise ValueError(f"{name} is given, but this checkpoint has no image encoder; want image_embeds")
        images = load_images(a["image"], name)
        if config.preprocess.startswith("original"):
            for picture in images:
                if min(picture.shape[:2]) < 64:
                    raise ValueError(
                        f"{name} is {picture.shape[1]}x{picture.shape[0]}; the {config.preprocess!r} preprocessing "
                        "needs sides of at least 64 pixels"
                    )
    else:
        embeds = check.check_array("image_embeds", a["image_embeds"], (None, d))
    pictures = len(images) if images is not None else len(embeds)  # type: ignore[arg-type]
    if pictures == 0:
        raise ValueError("image_embeds has no rows")

    weights, mix_level = None, None
    if a.get("image_weights") is not None:
        weights = check.check_weights(a["image_weights"], pictures)
        if a["mix_noise_level"] is not None:
            mix_level = int(check.check_noise_levels(a["mix_noise_level"], 1)[0])
    elif a.get("mix_noise_level") is not None:
        raise ValueError("mix_noise_level is given without image_weights: there is no mix to noise")
    levels = check.check_noise_levels(a["noise_level"], pictures)

    repeats = check.check_integer("num_images_per_prompt", a["num_images_per_prompt"], 1, 1 << 20)
    noise = a["image_noise"]
    if noise is not None and weights is None:
        batch = pictures * repeats
        noise = check.check_array("image_noise", noise, (batch, d), (pictures, d))
        noise = (noise if len(noise) == batch else np.repeat(noise, repeats, axis=0))[:, None]
    elif noise is not None:
        noise = check.check_array("image_noise", noise, (repeats, pictures + (mix_level is not None), d))
    return ImageCondition(
        pictures=pictures,
        images=images,
        image_embeds=embeds,
        noise_level=levels,
        weights=weights,
        mix_noise_level=mix_level,
        image_noise=noise,
    )


def check_own_condition(config: CheckpointConfig, a: Mapping[str, Any], prompts: int) -> ImageCondition | None:
    """The same for pipelines that begin with `image`: an unCLIP checkpoint is conditioned by it, or by what is given
    for this alone, `condition_image` or `image_embeds`.

    None for other checkpoints. One picture stands for all prompts. Raises ValueError for what is given in vain, too.
    """
    apart = a.get("condition_image") is not None
    if config.task != "variations":
        given = [name for name in ("condition_image", "image_embeds", "image_noise") if a.get(name) is not None]
        given += ["noise_level"] if np.any(a["noise_level"]) else []
        if given:
            raise ValueError(f"{given[0]} is given, but this is not an unCLIP checkpoint")
        return None
    name = "condition_image" if apart else "image"
    own = {**a, "image": a[name] if apart or a["image_embeds"] is None else None}
    if own["image"] is not None:
        images = load_images(own["image"], name)
        own["image"] = images * prompts if len(images) == 1 else images
    elif np.shape(a["image_embeds"])[:1] == (1,):
        own["image_embeds"] = np.repeat(a["image_embeds"], prompts, axis=0)
    condition = check_condition(config, own, name)
    if condition.pictures != prompts:
        which = "image_embeds" if condition.images is None else name
        raise ValueError(f"{which} has {condition.pictures} entries; want {prompts}, one a picture, or one for all")
    return condition
