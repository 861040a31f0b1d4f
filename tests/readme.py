"""The blocks of code in the README and on the pages in docs, how they are run, and what the README's are run with."""

import dataclasses
import functools
import re
import runpy
import shlex
import sys
from pathlib import Path

from convert.__main__ import main as convert
from tests import small_models, stand_ins
from unclip_jax import cli
from unclip_jax.models.configs import VAEConfig

ROOT = Path(__file__).parents[1]


@functools.cache
def blocks(page: str = "README.md") -> list[tuple[str, str]]:
    """The language ("" where there is none) and text of every block of a page, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)


def needs_torch(text: str) -> bool:
    return "import torch" in text


def like_a_clone(folder: Path) -> Path:
    """A folder to run blocks in: what they read of a clone, and a place for what they write."""
    for name in ("docs", "unclip_jax", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "outputs").mkdir()
    return folder


def published(folder: Path) -> dict[str, dict[str, bytes]]:
    """What the hub has under the README's ids, small: id -> its files."""
    # Eight pixels a latent as in the published ones: the images are theirs, the networks are small.
    vae = VAEConfig(block_out_channels=(16, 16, 16, 16), layers_per_block=1, norm_groups=4)
    text = dataclasses.replace(small_models.TEXT, context_length=77)
    return stand_ins.repositories(folder, stand_ins.HUB, vae=vae, text_encoder=text)


def run(language: str, text: str, names: dict | None = None, page: str = "README.md", options: str = "") -> None:
    """Executes a block, in the present folder. names: those that Python finds and leaves; options: of every command."""
    if language == "python":
        exec(compile(text, page, "exec"), {"__name__": "readme"} if names is None else names)
        return
    for line in text.replace("\\\n", " ").strip().splitlines():
        match [*shlex.split(line), *options.split()]:
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
