"""The page of adapters: every block of Python runs as it is written, on a small model in the checkpoint's place."""

import re

import jax
import numpy as np
import pytest

import unclip_jax
from convert.export.lora import save_lora
from convert.export.textual_inversion import save_textual_inversion
from tests import small_models
from tests.convert.test_adapters import CONFIG, random_lora
from tests.convert.test_readers import mapping, storage, tensor, torch_bytes
from tests.readme import ROOT
from unclip_jax.distributed.mesh import local_mesh


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What the page calls by name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    save_lora(CONFIG, random_lora(0, 0.3), "cat.safetensors", "kohya")
    save_lora(CONFIG, random_lora(1, 0.3), "ink_folder")
    rows = np.random.default_rng(0).standard_normal((3, 32), np.float32)
    save_textual_inversion("<cat>", rows, "learned_embeds.safetensors")
    code = mapping({"string_to_param": mapping({"*": tensor(storage(size=96), shape=(3, 32), strides=(32, 1))})})
    (tmp_path / "style.pt").write_bytes(torch_bytes(code, {"0": rows.tobytes()}))
    small_models.write(CONFIG, tmp_path / "model")
    pipe = unclip_jax.TextToImagePipeline.from_pretrained(
        tmp_path / "model", "float32", local_mesh(jax.local_devices()[:1])
    )
    pipe.progress = False
    monkeypatch.setattr(unclip_jax.TextToImagePipeline, "from_pretrained", lambda source: pipe)
    return tmp_path


def test_the_blocks_run(files):
    page = (ROOT / "docs" / "adapters.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names = {"unclip_jax": unclip_jax}
    for index, block in enumerate(blocks):
        if "denoise" in block:  # as the page's reader has them
            unet = names["unet"].merge()
            names["x"] = np.zeros((1, 8, 8, 4), np.float32)
            names["emb"] = unet.embed_time(np.array([5]))
            names["text"] = unet.encode_context(names["pipe"].encode_prompts(["a cat"]))
            names["params"] = names["unet"].params
        exec(compile(block, f"docs/adapters.md, block {index}", "exec"), names)
    assert names["out"].shape == (1, 8, 8, 4)
    assert "<cat>_2 in <style>" in names["expand_words"](names["tokenizer"], "a <cat> in <style>")
    assert (files / "cat-kohya.safetensors").exists()
    context = names["pipe"].encode_prompts(["a cat"])
    predicted = names["predict"](names["unet"].params, names["lora"], 0.5, names["x"], np.array([5]), context)
    assert predicted.shape == (1, 8, 8, 4)
