"""Reads the architecture of a ControlNet: diffusers' config.json, or what the tensors' shapes show."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from convert import layouts
from convert.architecture.diffusers import _Config, _encoder
from convert.kinds import OTHER_FAMILY, TEXT_WIDTHS
from convert.layouts import Place
from convert.readers import CheckpointError, TensorInfo
from unclip_jax.models.configs import ControlNetConfig, UNetConfig

CLASSES = ("ControlNetModel", "FlaxControlNetModel")
HEAD_WIDTH = 64  # of Stable Diffusion 2's attention
CHANNEL_ORDERS = {"rgb": "rgb", "bgr": "bgr"}
# Parameters that show a size, by their number of axes; a ControlNet has at most one of the class embedding's.
CONV_IN, HINT, TEXT = "conv_in.kernel", "hint_embedding.conv_in.kernel", "mid_block.attentions.0.attn2.to_k.kernel"
PROJECTION, ROWS = "class_embedding.linear_1.kernel", "class_embedding.embedding"
TELLING = {CONV_IN: 4, HINT: 4, TEXT: 2, PROJECTION: 2, ROWS: 2}


def from_config(path: Path) -> ControlNetConfig:
    """The ControlNet that a config.json of diffusers describes.

    Raises:
        CheckpointError: It is not supported. The message names file and key.
    """
    c = _Config(path)
    c.expect({"_class_name": CLASSES})
    width = c.integer("cross_attention_dim", 1280)
    if family := TEXT_WIDTHS.get(width):
        c.fail(f"cross_attention_dim is {width}, as in {family}: {OTHER_FAMILY}")
    widths = "conditioning_embedding_out_channels"
    pool = c.data.get("global_pool_conditions", False)
    if not isinstance(pool, bool):
        c.fail(f"global_pool_conditions is {pool!r:.80}; want true or false")
    return c.build(
        ControlNetConfig,
        unet=c.build(UNetConfig, **_encoder(c)),
        conditioning_channels=c.integer("conditioning_channels", 3),
        conditioning_embedding_out_channels=tuple(
            c.size(widths, v) for v in c.sequence(widths, (16, 32, 96, 256), int)
        ),
        controlnet_conditioning_channel_order=c.choice("controlnet_conditioning_channel_order", "rgb", CHANNEL_ORDERS),
        global_pool_conditions=pool,
    )


def from_tensors(tensors: Mapping[str, TensorInfo], dialect: str, where: str) -> ControlNetConfig:
    """The ControlNet that has these tensors, if its attention's heads are as wide as Stable Diffusion 2's.

    Args:
        tensors: Under their names within the ControlNet.
        dialect: Of the names.
        where: The file's name in messages.

    Returns:
        The architecture. Whether the other tensors fit it remains to be checked.

    Raises:
        CheckpointError: The tensors do not show it.
    """
    advice = "give diffusers' config.json of this ControlNet as config="
    names = layouts.foreign_names("controlnet", {"controlnet": Place("", dialect)}, TELLING)

    def shape(parameter: str) -> tuple[int, ...]:
        name, axes = names[parameter], TELLING[parameter]
        if name not in tensors or len(tensors[name].shape) != axes:
            raise CheckpointError(f"{where}: not a ControlNet: no {name} of {axes} axes")
        return tensors[name].shape

    levels = _levels(tensors, dialect)
    if not levels or not all(levels):
        raise CheckpointError(f"{where}: its tensors do not show its levels: {advice}")
    channels, attention = zip(*(level[0] for level in levels), strict=True)
    for width, attends in zip(channels, (*attention[:-1], True), strict=True):
        if attends and width % HEAD_WIDTH:
            raise CheckpointError(
                f"{where}: heads are {HEAD_WIDTH} wide in Stable Diffusion 2, and a level here has {width} channels: "
                f"{advice}"
            )
    embedding = next((p for p in (PROJECTION, ROWS) if names[p] in tensors), None)
    try:
        return ControlNetConfig(
            UNetConfig(
                in_channels=shape(CONV_IN)[1],
                block_out_channels=channels,
                layers_per_block=len(levels[0]),
                attention_levels=attention,
                num_heads=tuple(max(1, width // HEAD_WIDTH) for width in channels),
                cross_attention_dim=shape(TEXT)[1],
                only_cross_attention=(False,) * len(levels),
                class_embedding={PROJECTION: "projection", ROWS: "table", None: None}[embedding],
                class_embedding_size=None if embedding is None else shape(embedding)[embedding == PROJECTION],
            ),
            conditioning_channels=shape(HINT)[1],
            conditioning_embedding_out_channels=_hint_widths(tensors, dialect),
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}; {advice}") from error


def _levels(tensors: Mapping[str, TensorInfo], dialect: str) -> list[list[tuple[int, bool]]]:
    """For each level on the way down, its layers: their channels, and whether they attend."""
    levels: list[list[tuple[int, bool]]] = []
    layers: list[tuple[int, bool]]
    if dialect == "ldm":
        levels.append([])
        for number in itertools.count(1):
            block = f"input_blocks.{number}"
            if f"{block}.0.op.weight" in tensors:
                levels.append([])
            elif channels := _channels(tensors, f"{block}.0.in_layers.2.weight"):
                levels[-1].append((channels, f"{block}.1.norm.weight" in tensors))
            else:
                return levels
    while f"down_blocks.{len(levels)}.resnets.0.conv1.weight" in tensors:
        block, layers = f"down_blocks.{len(levels)}", []
        while channels := _channels(tensors, f"{block}.resnets.{len(layers)}.conv1.weight"):
            layers.append((channels, f"{block}.attentions.{len(layers)}.norm.weight" in tensors))
        levels.append(layers)
    return levels


def _hint_widths(tensors: Mapping[str, TensorInfo], dialect: str) -> tuple[int, ...]:
    """The channels of every second of the hint's convolutions, from the first."""
    widths: list[int] = []
    while True:
        last = len(widths)
        if dialect == "ldm":
            name = f"input_hint_block.{4 * last}.weight"
        else:
            name = f"controlnet_cond_embedding.{f'blocks.{2 * last - 1}' if last else 'conv_in'}.weight"
        if not (channels := _channels(tensors, name)):
            return tuple(widths)
        widths.append(channels)


def _channels(tensors: Mapping[str, TensorInfo], name: str) -> int:
    """The output channels of a convolution; 0 if there is none of this name."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[0] if len(shape) == 4 else 0
