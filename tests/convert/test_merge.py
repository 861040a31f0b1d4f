"""Checkpoints made of three: the sum by hand, in every layout, for every dtype; what is kept, refused and warned of."""

import dataclasses
import json
import re
import tracemalloc
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from convert.__main__ import main
from convert.export.diffusers import save_diffusers
from convert.export.original import save_original
from convert.merge import _add, add_difference, open_weights, shared
from holes import write_holes
from tests import small_models
from tests.convert.merged_files import BASE, INPAINTING, STATISTICS, UNCLIP, make
from tests.convert.published_files import shapes
from unclip_jax.checkpoints import directory
from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.conditioning.tokenizer import Tokenizer, open_clip_tokenizer_json

CONV_IN = "unet.conv_in.kernel"
DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))


def one(array, name="unet.x"):
    """A checkpoint of one parameter."""
    return dataclasses.replace(EMPTY, params={name: Parameter.of(array)})


EMPTY = Checkpoint(BASE, Tokenizer.from_json(open_clip_tokenizer_json([]), "open_clip"), {}, "one")


@pytest.fixture(scope="module")
def three():
    """An unCLIP in float16, a fine-tune in float32 and its base in bfloat16."""
    return make(UNCLIP, 1, np.float16), make(BASE, 2), make(BASE, 3, ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def layouts(three, tmp_path_factory):
    """The same three, each in another layout, and the arguments that open them."""
    folder = tmp_path_factory.mktemp("layouts")
    a, b, c = three
    save_original(a, folder / "unclip.safetensors")
    directory.save(b, folder / "tuned")
    save_diffusers(c, folder / "base")
    paths = [folder / "unclip.safetensors", folder / "tuned", folder / "base"]
    return [*map(str, paths), "--config", str(folder / "unclip.safetensors.yaml")]


def sums(three, scale):
    """By hand."""
    a, b, c = ({name: parameter.read() for name, parameter in checkpoint.params.items()} for checkpoint in three)
    return {
        name: (array + np.float32(scale) * (b[name] - c[name].astype(np.float32))).astype(array.dtype)
        if name in b
        else array
        for name, array in a.items()
    }


def assert_same(params, wanted):
    assert params.keys() == wanted.keys()
    for name, parameter in params.items():
        np.testing.assert_array_equal(parameter.read(), wanted[name], strict=True, err_msg=name)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_the_sum_by_hand(three, scale):
    a, b, _ = three
    merged = add_difference(*three, scale)
    assert (merged.config, merged.tokenizer) == (a.config, a.tokenizer)
    assert all(parameter.dtype == np.float16 for parameter in merged.params.values())
    assert_same(merged.params, sums(three, scale))
    kept = merged.params.keys() - b.params.keys()
    assert {name.split(".")[0] for name in kept} == {"unet", "image_encoder", "image_normalizer"}
    assert {name for name in kept if name.startswith("unet")} == {
        f"unet.class_embedding.linear_{i}.{leaf}" for i in (1, 2) for leaf in ("kernel", "bias")
    }


@pytest.mark.parametrize("target", ["jax", "orbax", "diffusers", "original"])
def test_the_command_takes_and_writes_every_layout(three, layouts, target, tmp_path, capsys):
    made = tmp_path / ("made.safetensors" if target == "original" else "made")
    assert main(["add-difference", *layouts, str(made), "--scale", "0.75", "--to", target]) == 0
    out = capsys.readouterr().out
    assert f"a difference is added to {len(three[1].params)}, " in out
    options = {"config": tmp_path / "made.safetensors.yaml"} if target == "original" else {}
    with open_checkpoint(made, **options) as checkpoint:
        wanted = sums(three, 0.75)
        wanted |= {name: wanted[name].astype(np.float32) for name in STATISTICS}  # which A's file does not hold
        assert_same(checkpoint.params, wanted)


def test_where_it_came_from(layouts, tmp_path):
    assert main(["add-difference", *layouts, str(tmp_path / "made"), "--scale", "0.5", "--dtype", "float16"]) == 0
    recorded = json.loads((tmp_path / "made" / "provenance.json").read_text())
    assert (recorded["method"], recorded["scale"], recorded["dtype"]) == ("add-difference", 0.5, "float16")
    assert [recorded[letter]["source"] for letter in "abc"] == ["unclip.safetensors", "tuned", "base"]
    kinds = ("*.safetensors*", "*", "*/*.safetensors")  # the file and its yaml, all of ours, the folder's weights
    for letter, source, kind in zip("abc", map(Path, layouts), kinds, strict=False):
        files = source.rglob(kind) if source.is_dir() else source.parent.glob(kind)
        digests = {f"{path.parent.name}/{path.name}": directory.sha256(path) for path in files}
        assert recorded[letter]["sha256"] == digests


def test_a_wider_dtype_has_the_sums_as_they_are_computed(three):
    merged = add_difference(*three, 0.3, np.dtype(np.float32))
    a, b, c = (checkpoint.params[CONV_IN].read().astype(np.float32) for checkpoint in three)
    np.testing.assert_array_equal(merged.params[CONV_IN].read(), a + np.float32(0.3) * (b - c), strict=True)


numbers = arrays(np.float32, (2, 3), elements=st.floats(-60000, 60000, width=16))


@settings(max_examples=20)
@given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), numbers, numbers, st.floats(-(2.0**100), 2.0**100, width=32))
def test_of_a_model_and_itself_nothing_is_added(of_a, of_b, a, b, scale):
    """Whatever the scale, bit for bit, -0 too; and nothing at scale 0."""
    a, b = a.astype(of_a), b.astype(of_b)
    a[0, 0] = -0.0
    for theirs, factor in ((b, scale), (b[::-1], 0.0)):
        out = add_difference(one(a), one(b), one(theirs), factor).params["unet.x"].read()
        assert out.dtype == of_a
        assert out.tobytes() == a.tobytes()


def test_statistics_of_embeddings_stay(three):
    """They are tensors of a diffusers folder and not of an original file: layouts must not differ."""
    a, *_ = three
    other = make(UNCLIP, 4)
    other.params["image_normalizer.mean"] = Parameter.of(np.ones(48, np.float32))
    merged = add_difference(a, other, make(UNCLIP, 5))
    for name in STATISTICS:
        np.testing.assert_array_equal(merged.params[name].read(), a.params[name].read(), strict=True)


def test_an_inpainting_model_of_a_fine_tune():
    """The difference goes to the latents' channels; those of the mask and the hidden image are as they were."""
    a, b, c = make(INPAINTING, 1), make(BASE, 2), make(BASE, 3)
    merged = add_difference(a, b, c).params[CONV_IN].read()
    first, *others = (checkpoint.params[CONV_IN].read() for checkpoint in (a, b, c))
    np.testing.assert_array_equal(merged[:, :, :4], first[:, :, :4] + (others[0] - others[1]))
    np.testing.assert_array_equal(merged[:, :, 4:], first[:, :, 4:])


def test_shapes_that_differ_are_refused_by_name():
    """And so is a difference of more channels than A's network reads."""
    for channels in ((4, 9, 9), (9, 9, 4), (4, 4, 9)):
        shapes = [(3, 3, count, 8) for count in channels]
        listed = ", ".join(f"{shape} in {letter}" for shape, letter in zip(shapes, "ABC", strict=True))
        with pytest.raises(ValueError, match=f"^{re.escape(f'{CONV_IN} has shape {listed}; want one shape')}$"):
            add_difference(*(one(np.zeros(shape, np.float32), CONV_IN) for shape in shapes))
    for shapes in (((2, 3), (3, 2), (3, 2)), ((2, 3), (2, 3), (1, 3)), ((2,), (2, 1), (2, 1)), ((4,), (1,), (1,))):
        with pytest.raises(ValueError, match=r"^unet\.x has shape .* in A, .* in B, .* in C"):
            add_difference(*(one(np.zeros(shape, np.float32)) for shape in shapes))
    with pytest.raises(ValueError, match="have no parameter in common"):
        add_difference(one(np.zeros(3)), one(np.zeros(3)), one(np.zeros(3), "unet.y"))


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "1e39"])
def test_a_scale_that_is_no_number_is_refused_before_anything_is_opened(scale, tmp_path, capsys):
    assert main(["add-difference", "no", "such", "file", str(tmp_path / "x"), f"--scale={scale}"]) == 2
    assert "scale is" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match="want a finite number"):
        add_difference(EMPTY, EMPTY, EMPTY, float(scale))


def test_a_scale_that_is_no_number_at_all(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["add-difference", "a", "b", "c", "d", "--scale", "much"])
    assert stopped.value.code == 2


def test_numbers_too_large_are_warned_of_by_name():
    def large(value, dtype=np.float32):
        return one(np.array([value, 1], dtype))

    with pytest.warns(UserWarning, match=r"unet\.x has numbers beyond the range of float16: they become infinite"):
        out = add_difference(large(60000, np.float16), large(1e4), large(0)).params["unet.x"].read()
    np.testing.assert_array_equal(out, np.array([np.inf, 1], np.float16))
    with pytest.warns(UserWarning, match=r"unet\.x holds NaN or infinite numbers"):
        add_difference(large(1), large(3e38), large(-3e38)).params["unet.x"].read()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_difference(large(60000, np.float16), large(1e4), large(0), dtype=DTYPES[1]).params["unet.x"].read()


def test_a_destination_that_exists_is_refused_before_anything_is_opened(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    assert main(["add-difference", "no", "such", "file", str(tmp_path / "x")]) == 2
    assert "x exists; choose another name" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["jax", "diffusers", "original"])
def test_a_failure_leaves_nothing(layouts, target, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    name = str(tmp_path / ("x.safetensors" if target == "original" else "x"))
    assert main(["add-difference", *layouts, name, "--to", target]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["jax", "orbax", "diffusers", "original"])
def test_an_interruption_leaves_nothing(layouts, target, tmp_path, monkeypatch, capsys):
    """Kills at random points: test_killed.py, where there is time for them."""
    summed = []

    def interrupted(name, *arguments):
        summed.append(name)
        if len(summed) == 100:
            raise KeyboardInterrupt
        return _add(name, *arguments)

    monkeypatch.setattr("convert.merge._add", interrupted)
    name = str(tmp_path / ("x.safetensors" if target == "original" else "x"))
    assert main(["add-difference", *layouts, name, "--to", target]) == 1
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_configurations_of_the_other_two(layouts, three, tmp_path):
    """Files of unknown architecture need their yaml, wherever they stand."""
    _, b, c = three
    save_original(b, tmp_path / "b.safetensors")
    save_original(c, tmp_path / "c.safetensors")
    files = [str(tmp_path / f"{letter}.safetensors") for letter in "bc"]
    configured = [f"--config-{letter}={file}.yaml" for letter, file in zip("bc", files, strict=True)]
    assert main(["add-difference", layouts[0], *files, str(tmp_path / "x"), *layouts[3:], *configured]) == 0
    with open_checkpoint(tmp_path / "x") as checkpoint:
        made = {name: parameter.read() for name, parameter in checkpoint.params.items()}
    np.testing.assert_array_equal(made[CONV_IN], sums(three, 1)[CONV_IN])


def test_published_checkpoints_fit(tmp_path):
    """What the bases predict need not be known: 512-base and 768-v have the same tensors."""
    names = ("v2-1-stable-unclip-h", "v2-inpainting-inference", "v2-inference-v", "v2-inference")
    for name in names:
        write_holes(tmp_path / f"{name}.safetensors", shapes(name))
    unclip, inpainting, *bases = (tmp_path / f"{name}.safetensors" for name in names)
    with open_checkpoint(unclip) as a, open_checkpoint(inpainting) as other:
        b, c = map(open_weights, bases)
        with b, c:
            for first in (a, other):
                assert add_difference(first, b, c).params.keys() == first.params.keys()
                assert set(shared(first, b, c)) == b.params.keys()


def test_a_folder_of_the_commands_name_is_converted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_models.write(small_models.TEXT_TO_IMAGE, tmp_path / "add-difference")
    assert main(["./add-difference", "--check"]) == 0
    assert "complete" in capsys.readouterr().out


def test_memory_is_for_one_tensor_at_a_time(tmp_path):
    """Of a model that is many times its largest tensor. Files are mapped, and what is mapped is not counted."""
    text = dataclasses.replace(small_models.TEXT, width=256, heads=4, mlp_width=2048, layers=12)
    config = dataclasses.replace(small_models.TEXT_TO_IMAGE, text_encoder=text)
    unet = dataclasses.replace(config.unet, cross_attention_dim=256)
    config = dataclasses.replace(config, unet=unet)
    for seed, name in enumerate("abc"):
        small_models.write(config, tmp_path / name, seed)
    with open_checkpoint(tmp_path / "a") as a, open_weights(tmp_path / "b") as b, open_weights(tmp_path / "c") as c:
        merged = add_difference(a, b, c)
        largest = max(p.dtype.itemsize * int(np.prod(p.shape)) // len(p.pieces) for p in merged.params.values())
        assert merged.nbytes > 20 * largest
        tracemalloc.start()
        try:
            directory.save(merged, tmp_path / "made")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 5 * largest  # 4.1
