"""The kinds of layers of the UNet and of the VAE's decoder, at the shapes of their levels, in ours and in torch."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peers import as_module
from random_networks import full_size
from unclip_jax.models.attention import attend
from unclip_jax.models.layers import Conv, GroupNorm, Linear, layer_norm, upsample_nearest
from unclip_jax.models.unet_blocks import FeedForward

Shape = tuple[int, ...]
TEXT = 77  # tokens that cross-attention reads
KW: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": jnp.float32}
# Ours -> diffusers' names inside its FeedForward.
GEGLU = {"proj_in": "net.0.proj", "proj_out": "net.2"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of layer at one level.

    make: our layer with random weights, and its call on the layer and arrays; theirs: the same in torch, its weights
    not yet ours, and its call; shapes: of the inputs, images channels last.
    """

    kind: str
    where: str
    make: Callable[[], tuple[nnx.Module, Callable[..., jax.Array]]]
    theirs: Callable[[], tuple[Any, Callable[..., Any]]]
    shapes: tuple[Shape, ...]


def unet_rows(width: int, batch: int, size: int) -> Iterator[Row]:
    """The UNet's, with `full_size(width)`'s channels and heads. size: the latents' height and width."""
    config = full_size(width)
    levels = list(zip((size >> n for n in range(4)), config["block_out_channels"], strict=True))
    images = [(batch, side, side, channels) for side, channels in levels]
    tokens = [(batch, side * side, channels) for side, channels in levels]
    for shape in images:
        yield convolution("UNet", shape, shape[-1], 3)
    for shape in images:
        yield convolution("UNet", (*shape[:-1], 2 * shape[-1]), shape[-1], 1)
    for sequence in tokens:
        yield projection("UNet", sequence)
    for sequence, heads in zip(tokens, config["attention_head_dim"], strict=True):
        yield attention("self-attention", "UNet", sequence, sequence[1], heads)
    for sequence, heads in zip(tokens, config["attention_head_dim"], strict=True):
        yield attention("cross-attention", "UNet", sequence, TEXT, heads)
    for sequence in tokens:
        yield feed_forward("UNet", sequence)
    for shape in images:
        yield group_norm("UNet", shape, 1e-5)
    for sequence in tokens:
        yield norm("UNet", sequence)
    for shape in images:
        yield concatenation("UNet", shape)
    for shape in images[1:]:
        yield upsampling("UNet", shape)


def vae_rows(width: int, size: int) -> Iterator[Row]:
    """The decoder's, for one image. width: of its last level; size: the latents' height and width."""
    images = [(1, size << n, size << n, factor * width) for n, factor in enumerate((4, 4, 2, 1))]
    for shape in images:
        yield convolution("VAE", shape, shape[-1], 3)
    sequence = (1, size * size, 4 * width)
    yield projection("VAE", sequence)
    yield attention("self-attention", "VAE", sequence, sequence[1], 1)
    for shape in images:
        yield group_norm("VAE", shape, 1e-6)
    for shape in images[:-1]:
        yield upsampling("VAE", shape)


def convolution(where: str, shape: Shape, out: int, side: int) -> Row:
    def theirs() -> Any:
        import torch

        return torch.nn.Conv2d(shape[-1], out, side, padding=side // 2), _call

    return Row(
        f"{side}x{side} convolution",
        where,
        lambda: (Conv(shape[-1], out, side, rngs=nnx.Rngs(0), **KW), _call),
        theirs,
        (shape,),
    )


def projection(where: str, shape: Shape) -> Row:
    def theirs() -> Any:
        import torch

        return torch.nn.Linear(shape[-1], shape[-1]), _call

    return Row(
        "projection", where, lambda: (Linear(shape[-1], shape[-1], rngs=nnx.Rngs(0), **KW), _call), theirs, (shape,)
    )


def feed_forward(where: str, shape: Shape) -> Row:
    def theirs() -> Any:
        from diffusers.models.attention import FeedForward as Theirs

        return Theirs(shape[-1], activation_fn="geglu"), _call

    return Row("GEGLU", where, lambda: (FeedForward(shape[-1], rngs=nnx.Rngs(0), **KW), _call), theirs, (shape,))


def attention(kind: str, where: str, shape: Shape, context: int, heads: int) -> Row:
    """Without projections: from queries, keys and values (B, tokens, channels) as those make them."""

    def ours(_: Any, *given: jax.Array) -> jax.Array:
        q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in given)
        return attend(q, k, v).reshape(shape)

    def call(_: Any, *given: Any) -> Any:
        import torch

        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in given)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    read = (shape[0], context, shape[2])
    return Row(kind, where, lambda: (nnx.Module(), ours), lambda: (_nothing(), call), (shape, read, read))


def group_norm(where: str, shape: Shape, epsilon: float) -> Row:
    def theirs() -> Any:
        import torch

        return torch.nn.GroupNorm(32, shape[-1], epsilon), lambda layer, x: torch.nn.functional.silu(layer(x))

    return Row(
        "group norm, SiLU",
        where,
        lambda: (GroupNorm(shape[-1], 32, epsilon=epsilon), lambda layer, x: nnx.silu(layer(x))),
        theirs,
        (shape,),
    )


def norm(where: str, shape: Shape) -> Row:
    def theirs() -> Any:
        import torch

        return torch.nn.LayerNorm(shape[-1]), _call

    return Row("layer norm", where, lambda: (layer_norm(shape[-1], rngs=nnx.Rngs(0), **KW), _call), theirs, (shape,))


def concatenation(where: str, shape: Shape) -> Row:
    """Of what comes up with what was kept on the way down."""

    def call(_: Any, *given: Any) -> Any:
        import torch

        return torch.cat(given, 1)

    def ours(_: Any, *given: jax.Array) -> jax.Array:
        return jnp.concatenate(given, -1)

    return Row("concatenation", where, lambda: (nnx.Module(), ours), lambda: (_nothing(), call), (shape, shape))


def upsampling(where: str, shape: Shape) -> Row:
    def call(_: Any, x: Any) -> Any:
        import torch

        return torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")

    def ours(_: Any, x: jax.Array) -> jax.Array:
        return upsample_nearest(x)

    return Row("nearest upsampling", where, lambda: (nnx.Module(), ours), lambda: (_nothing(), call), (shape,))


def torch_layer(row: Row, layer: nnx.Module) -> Any:
    """torch's layer of a row with our layer's weights, as a module of tensors."""
    import torch

    theirs, call = row.theirs()
    state = {}
    for path, variable in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        *outer, leaf = map(str, path)
        array = np.asarray(variable[...])
        if leaf == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        name = ".".join([*(GEGLU[part] for part in outer), "bias" if leaf == "bias" else "weight"])
        state[name] = torch.from_numpy(np.array(array))
    theirs.load_state_dict(state)
    return as_module(theirs, call).eval()


def _call(layer: Any, x: Any) -> Any:
    return layer(x)


def _nothing() -> Any:
    import torch

    return torch.nn.Identity()
