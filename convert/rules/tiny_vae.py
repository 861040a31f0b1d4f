"""A tiny autoencoder's names: diffusers' and those of TAESD itself.

Both number the modules of each half from one end to the other, activations and upsamplings included. TAESD's decoder
has one more, which limits the latents, before the first convolution.
"""

from collections.abc import Callable

from convert.engine import Dialect, Table
from unclip_jax.models.configs import AutoencoderTinyConfig


def _table(layers: str, before: int) -> Callable[[Table, str, AutoencoderTinyConfig], None]:
    """The names of a dialect. layers: between a half's name and a number; before: modules before the decoder's own."""

    def table(t: Table, prefix: str, config: AutoencoderTinyConfig) -> None:
        _half(t, "encoder.down_blocks", f"{prefix}encoder.{layers}", config.num_encoder_blocks, 0)
        _half(t, "decoder.up_blocks", f"{prefix}decoder.{layers}", config.num_decoder_blocks, before)

    return table


def _half(t: Table, levels: str, theirs: str, counts: tuple[int, ...], number: int) -> None:
    half = levels.partition(".")[0]
    t.module(f"vae.{half}.conv_in", f"{theirs}{number}")
    number += 2 if half == "decoder" else 1  # an activation follows
    for level, count in enumerate(counts):
        for block in range(count):
            for conv in range(3):
                ours = f"vae.{levels}.{level}.blocks.{block}.conv{conv + 1}"
                t.module(ours, f"{theirs}{number + block}.conv.{2 * conv}")
        number += count
        last = level == len(counts) - 1
        if half == "decoder" and not last:
            number += 1  # the upsampling
        t.module(f"vae.{half}.conv_out" if last else f"vae.{levels}.{level}.resample", f"{theirs}{number}")
        number += 1


_LEAF = r"\d+\.(conv\.[024]\.)?(weight|bias)"
DIALECTS = {
    "taesd": Dialect(_table("", 1), rf"(encoder|decoder)\.{_LEAF}"),
    "tiny": Dialect(_table("layers.", 0), rf"(encoder|decoder)\.layers\.{_LEAF}"),
}
