"""Every published checkpoint of Stable Diffusion 2 by its tensors' names and shapes, in files that hold only holes."""

import re

import pytest

from convert.__main__ import main
from holes import write_holes
from tests.convert.published_files import shapes

INVENTORIES = {
    "v2-1-stable-unclip-h": "",
    "v2-1-stable-unclip-h-ema": "--ema",
    "v2-1-stable-unclip-l": "",
    "v2-inference": "",
    "v2-inference-v": "",
    "v2-inpainting-inference": "",
    "v2-midas-inference": "",
    "x4-upscaling": "",
    "karlo_prior": "",
}


@pytest.mark.parametrize(("name", "option"), INVENTORIES.items())
def test_check_is_complete(name, option, tmp_path, capsys):
    tensors = shapes(name)
    write_holes(tmp_path / "x.safetensors", tensors)
    assert main([str(tmp_path / "x.safetensors"), "--check", *option.split()]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("x.safetensors:")]  # a note
    first, *others = lines
    used = int(re.fullmatch(r"complete: (\d+) tensors are used, .*", first)[1])
    assert used + sum(int(line.split()[0]) for line in others) == len(tensors)


@pytest.mark.parametrize(
    "wrong",
    [
        "depth_model.model.pretrained.act_postprocess4.4.bias",
        "depth_model.model.pretrained.model.blocks.11.attn.qkv.weight",
        "depth_model.model.scratch.refinenet4.resConfUnit1.conv1.weight",
    ],
)
def test_a_tensor_of_the_depth_estimator_is_missed_by_name(wrong, tmp_path, capsys):
    tensors = shapes("v2-midas-inference")
    shape, dtype = tensors.pop(wrong)
    write_holes(tmp_path / "x.safetensors", tensors)
    assert main([str(tmp_path / "x.safetensors"), "--check", "--config", "512-depth"]) == 2
    assert f"1 missing: {wrong}" in capsys.readouterr().err
    write_holes(tmp_path / "y.safetensors", tensors | {wrong: ((*shape[:-1], shape[-1] + 1), dtype)})
    assert main([str(tmp_path / "y.safetensors"), "--check", "--config", "512-depth"]) == 2
    assert f"1 misshapen: {wrong}" in capsys.readouterr().err
