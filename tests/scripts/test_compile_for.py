"""What is read from a compiled program's text, and how it is told; the compiler itself is not asked, `.ci/run` does."""

import base64
import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

import hlo
import tpu_programs
import tpu_tables
from convert.architecture.presets import PRESETS
from tests.pipelines.small_family import one_level
from tests.small_models import SMALL
from unclip_jax.distributed.mesh import local_mesh

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_for"
CASE = tpu_programs.Case("v5e:2x2", "1", "bfloat16", "sd21-unclip-h", 64, 1, None, "run_steps")
RESULT = {
    **dataclasses.asdict(CASE),
    "seconds": 460.2,
    "error": None,
    "arguments": 2**30,
    "temporaries": 2**29,
    "flop": 2e12,
    "cycles": 30_000_000,
    "kernels": 2,
    "grid": 640,
    "collectives": {"all-reduce": [3, 2**20]},
    "copied": 2**21,
    "copied_arguments": 0,
}
# Lines as the compiler writes them, cut down: a loop of three trips, a fusion, a kernel, and copies of three kinds.
TEXT = (Path(__file__).parent / "compiled_for_tpu.txt").read_text("utf-8")


def double(x_ref, o_ref):
    o_ref[...] = 2 * x_ref[...]


@pytest.fixture(scope="module")
def kernel_body():
    """A kernel of 2 x 3 blocks as a program for TPUs holds it."""
    block = pl.BlockSpec((8, 128), lambda i, j: (i, j))
    call = pl.pallas_call(
        double, jax.ShapeDtypeStruct((16, 384), np.float32), grid=(2, 3), in_specs=[block], out_specs=block
    )
    traced = jax.jit(call).trace(jax.ShapeDtypeStruct((16, 384), np.float32))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    return text.split("\\22body\\22: \\22")[1].split("\\22")[0]


def test_the_text_of_a_program(kernel_body):
    assert hlo.text_facts(TEXT.replace("BODY", kernel_body)) == {
        "cycles": 1825 + 3 * 300,
        "kernels": 1,
        "grid": 6,
        "collectives": {"all-reduce": [3, 3 * 4096]},
        "copied": 2048 + 3 * 4096,
        "copied_arguments": 2048,
    }


def test_the_grid_of_a_kernel(kernel_body):
    assert hlo.grid_of(base64.b64decode(kernel_body)) == [2, 3]


def test_networks_of_few_levels_keep_their_widths():
    for config in PRESETS.values():
        few = tpu_programs.shallow(config, 1)
        assert few.unet.block_out_channels == config.unet.block_out_channels[:1]
        assert few.vae.block_out_channels == config.vae.block_out_channels[-1:]
        assert (few.text_encoder.layers, few.text_encoder.width) == (1, config.text_encoder.width)
        assert few.task == config.task


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """Nothing here loads it."""
    monkeypatch.setenv("TPU_LIBRARY_PATH", "libtpu.so")


def test_what_cannot_be_compiled_for_is_refused_before_anything_is(monkeypatch, capsys):
    parse = command()["parse"]
    with pytest.raises(SystemExit):
        parse(["v9:2x2"])
    assert "no such chip: v9:2x2; known: v5e, v5p, v6e" in capsys.readouterr().err
    monkeypatch.delenv("TPU_LIBRARY_PATH")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse(["v5e:2x2"])
    assert "install the extra `compile-tpu`" in capsys.readouterr().err


def test_programs_that_a_checkpoint_does_not_have_are_left_out():
    args = command()["parse"](["v5e:2x2", "--models", "768-v", "--dtypes", "float32", "--meshes", "1", "data,model"])
    programs = [(case.mesh, case.program) for case in command()["cases"](args)]
    inference = ["vae_encode", "text_encoder", "prepare", "run_steps", "decode"]
    assert programs == [
        *(("1", program) for program in [*inference, "train_unet", "train_lora"]),
        *(("data,model", program) for program in inference),
    ]


@pytest.mark.parametrize("program", tpu_programs.TRAINING)
def test_a_training_step_is_lowered(program, monkeypatch):
    monkeypatch.setattr(tpu_programs.Case, "config", one_level(SMALL))
    case = dataclasses.replace(CASE, program=program, dtype="float32", size=8)
    arguments = tpu_programs.lower_training(case, local_mesh(jax.local_devices()[:2])).in_avals
    images = arguments[0][2]
    assert images["moments"].shape == (2, 8, 8, 8)  # one image a device


def command():
    return runpy.run_path(str(SCRIPT))


def test_one_that_fails_does_not_keep_the_others_from_being_tried(monkeypatch, tmp_path, capsys):
    main, lines, page = command()["main"], tmp_path / "lines", tmp_path / "page.md"
    page.write_text(f"# Page\n\n{tpu_tables.BEGIN}\nold\n{tpu_tables.END}\nafter\n")
    tried = []

    def compiled(case, timeout):
        tried.append(case.program)
        broken = {"error": "Bad lhs type: a|b", "seconds": 3.0} if case.program == "prepare" else {}
        return {**RESULT, **dataclasses.asdict(case), **broken}

    monkeypatch.setitem(main.__globals__, "in_a_process", compiled)
    options = ["--dtypes", "bfloat16", "--meshes", "1", "--programs", "prepare", "run_steps"]
    assert main(["v5e:2x2", *options, "--json", str(lines), "--report", str(page)]) == 1
    assert tried == ["prepare", "run_steps"]
    printed = capsys.readouterr()
    assert "FAILS after 3 s: Bad lhs type" in printed.out
    assert "1 of 2 do not compile" in printed.err
    assert [json.loads(line)["program"] for line in lines.read_text().splitlines()] == tried
    text = page.read_text()
    assert "old" not in text
    assert text.endswith("after\n")
    assert "### sd21-unclip-h: v5e:2x2, one device, bfloat16, 64x64 latents, batch 1" in text
    assert "| prepare | fails: Bad lhs type: a\\|b |" in text
    row = "| 460 | 1,024.0 | 512.0 | 10 % | 2,000 | 20.00 | 2 kernels, 640 blocks | 3 all-reduce 1.0 MiB | 2.0 | 0.0 |"
    assert f"| run_steps {row}" in text
    assert main([*options, "--json", str(lines), "--report", str(page)]) == 0  # nothing is compiled, and the page stays
    assert page.read_text() == text
