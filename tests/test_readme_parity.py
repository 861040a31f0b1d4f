"""The README's diffusers example and ours beside it run as they are written, on a small folder that diffusers saved."""

import numpy as np
import pytest
from transformers import CLIPTokenizer

from tests import readme
from tests.pipelines.live_unclip import build
from tests.references import write_tokenizer

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),  # there too
]


def test_side_by_side(tmp_path, monkeypatch):
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer"))
    build("h", tokenizer).save_pretrained(tmp_path / "sd2-community" / "stable-diffusion-2-1-unclip")
    (tmp_path / "docs").symlink_to(readme.ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    theirs, ours = [text for language, text in readme.blocks() if language == "python"][-2:]
    assert readme.needs_torch(theirs)
    made = []
    for text in (theirs, ours):
        names = {}
        exec(compile(text, "README.md", "exec"), names)
        made.append([np.asarray(picture) for picture in names["images"]])
    assert [picture.shape for picture in made[0]] == [picture.shape for picture in made[1]] == [(32, 32, 3)]
    assert all(picture.std() > 5 for pictures in made for picture in pictures)
