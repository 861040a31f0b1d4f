"""The pages in docs, whose blocks of code are run, and what they work on."""

import re

import numpy as np
from PIL import Image

from tests import readme

# Lines of shell blocks that nothing here can run, and why.
NOT_RUN = {
    r"pip install .*": "an installation",
    r"apt-get install .*|npm install .*": "an installation, of the material that the demo model is made from",
    r"gcloud .*": "a cloud; distributed/test_hosts.py reads the command in it",
    r"scripts/demo/(drawings|train|report|edges) .*": "hours, with that material; tests/demo has the parts",
}


def photo(path, size=32, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def mask(path, size=32):
    Image.fromarray(np.pad(np.full((size // 2, size // 2), 255, np.uint8), size // 4)).save(path)


def without_installations(text):
    """A shell block's lines that are run."""
    lines = text.replace("\\\n", " ").splitlines()
    return "\n".join(line for line in lines if not any(re.fullmatch(pattern, line) for pattern in NOT_RUN))


def run(page, names=None, only=None, options=""):
    """Runs a page's blocks in order, or one of them; returns what Python's leave behind."""
    names = {} if names is None else names
    for index, (language, text) in enumerate(readme.blocks(f"docs/{page}.md")):
        if only in (None, index):
            language = "python" if language == "python" else "shell"
            text = text if language == "python" else without_installations(text)
            readme.run(language, text, names, f"docs/{page}.md", options)
    return names
