"""The library's messages in the terms of the command line: options instead of Python's arguments and methods."""

import re

from unclip_jax.progress import one_line

# Arguments that are options of the same name.
ARGUMENTS = (
    "adapter_name", "clip_stats", "config", "controlnet", "ema", "prediction_type", "preprocess", "prior", "revision",
    "subfolder", "text_encoder", "unet", "vae", "variant",
)  # fmt: skip
METHODS = {
    "load_lora_weights": "--lora",
    "load_textual_inversion": "--textual-inversion",
    "convert.safety.open_safety_checker": "--safety-checker",
}
_ARGUMENT = re.compile(rf"(?<![\w.-])({'|'.join(ARGUMENTS)})=(?:'([^']*)'|True\b)?")


def message(error: object) -> str:
    """An exception or a warning for the terminal: one line, with options."""
    text = one_line(error)
    for method, option in METHODS.items():
        text = text.replace(method, option)
    return _ARGUMENT.sub(lambda m: f"--{m[1].replace('_', '-')}{f' {m[2]}' if m[2] else ''}", text)
