"""The README's code blocks, and checkpoints of small random networks under the names that it opens."""

import dataclasses
import functools
import re
import runpy
import shlex
import sys
from pathlib import Path

from convert.__main__ import main as convert
from tests import small_models
from tests.pipelines import small_family
from unclip_jax import cli
from unclip_jax.models.vae import VAEConfig

ROOT = Path(__file__).parents[1]
PUBLISHED = {
    "stable-diffusion-2-1-unclip": small_models.SMALL,
    "stable-diffusion-2-1": small_models.TEXT_TO_IMAGE,
    "stable-diffusion-2-1-base": small_models.TEXT_TO_IMAGE,
    "stable-diffusion-2-depth": small_models.DEPTH,
    "stable-diffusion-2-inpainting": small_models.INPAINT,
    "stable-diffusion-x4-upscaler": small_models.UPSCALE,
}


@functools.cache
def blocks() -> list[tuple[str, str]]:
    """The language ("" where there is none) and text of every block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)


def needs_torch(text: str) -> bool:
    return "import torch" in text


def like_a_clone(folder: Path) -> Path:
    """A folder to run the blocks in: what they read of a clone, the checkpoints, and a place for what they write."""
    for name in ("docs", "unclip_jax", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "outputs").mkdir()
    # Eight pixels a latent as in the published ones: the pictures are theirs, the networks are small.
    vae = VAEConfig(block_out_channels=(16, 16, 16, 16), layers_per_block=1, norm_groups=4)
    text = dataclasses.replace(small_models.TEXT, context_length=77)
    for name, config in PUBLISHED.items():
        config = dataclasses.replace(small_family.one_level(config), vae=vae, text_encoder=text)
        owner = "stabilityai" if "upscaler" in name else "sd2-community"
        small_models.write(config, folder / owner / name)
    return folder


def run(language: str, text: str) -> None:
    """Executes a block, in the present folder."""
    if language == "python":
        exec(compile(text, "README.md", "exec"), {"__name__": "readme"})
        return
    for line in text.strip().splitlines():
        match shlex.split(line):
            case ["unclip-jax", *arguments]:
                status = cli.main(arguments)
            case ["python", "-m", "convert", *arguments]:
                status = convert(arguments)
            case ["python", script, *arguments]:
                sys.argv = [script, *arguments]
                try:
                    runpy.run_path(script, run_name="__main__")
                    status = 0
                except SystemExit as error:
                    status = error.code
            case _:
                raise AssertionError(f"nobody runs {line!r}")
        assert not status, line
