"""What the columns of a row mean, what is read for them, and the fingerprint of a row."""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from unclip_jax.bulk.rows import Base, Stored, argument_names, fingerprint, make_row, resolve
from unclip_jax.pipelines.arguments import InpaintArguments, TextToImageArguments, UnCLIPArguments

UNCLIP = argument_names(UnCLIPArguments)


def row(columns, arguments=UNCLIP, folder="/data", inside=False, names=(), number=7):
    return make_row(number, columns, "t.jsonl, line 8", arguments, dict(names), Base(str(folder), inside))


def npy(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def test_the_arguments_that_may_be_columns():
    assert {"image", "prompt", "seed", "noise_level", "image_weights", "height"} <= UNCLIP
    assert {"mask_image", "strength"} <= argument_names(InpaintArguments) - UNCLIP
    settings = {"batch_size", "output_type", "num_images_per_prompt", "scheduler", "step_noise", "projected_guidance"}
    assert not settings & UNCLIP
    for name in settings:
        with pytest.raises(ValueError, match=f"line 8: column {name} is a setting of the whole job"):
            row({name: 1})


def test_columns_are_arguments_or_carried_along():
    made = row({"image": "a.png", "seed": 3, "prompt": "x", "score": 0.5, "height": None, "image_embeds": "e.npy"})
    assert made.number == 7
    assert made.values == {
        "image": Stored("/data/a.png", None, "a.png"),
        "seed": 3,
        "prompt": "x",
        "image_embeds": Stored("/data/e.npy", None, "e.npy"),
    }
    assert made.others == {"score": 0.5}


def test_names_that_data_sets_have():
    made = row({"file_name": "a.png", "text": "t", "caption": "c"})
    assert (made.values["image"].name, made.values["prompt"], made.others) == ("a.png", "t", {"caption": "c"})
    assert row({"caption": "c"}).values == {"prompt": "c"}
    made = row({"file_name": "a.png", "image": "b.png", "text": "t", "prompt": ""})
    assert (made.values["image"].name, made.values["prompt"]) == ("b.png", "")
    assert made.others == {"file_name": "a.png", "text": "t"}
    made = row({"file_name": "a.png", "text": "t"}, argument_names(TextToImageArguments))
    assert (made.values, made.others) == ({"prompt": "t"}, {"file_name": "a.png"})


def test_columns_can_be_renamed():
    names = {"text_en": "prompt", "width": "width_of_the_original"}
    made = row({"prompt": "auf deutsch", "text_en": "in English", "width": 640}, names=names)
    assert made.values == {"prompt": "in English"}
    assert made.others == {"width_of_the_original": 640}


def test_texts_of_csv_are_numbers_where_the_argument_is_one():
    given = {"seed": "12", "guidance_scale": "7.5", "prompt": "12", "image": "3", "score": "4", "noise_level": "much"}
    made = row(given | {"image_weights": "[0.5, 1]"})
    assert made.values.pop("image").name == "3"
    assert made.values == {
        "seed": 12,
        "guidance_scale": 7.5,
        "prompt": "12",
        "noise_level": "much",
        "image_weights": [0.5, 1],
    }
    assert made.others == {"score": "4"}
    assert row({"paste_back": "True"}, argument_names(InpaintArguments)).values == {"paste_back": True}


def test_pictures_of_parquet_and_several_of_them():
    made = row({"image": {"bytes": b"x", "path": "a.png"}, "prompt": "x"})
    assert made.values["image"] == b"x"
    made = row({"image": [{"bytes": None, "path": "a.png"}, "b.png", b"c"]})
    assert made.values["image"] == [Stored("/data/a.png", None, "a.png"), Stored("/data/b.png", None, "b.png"), b"c"]
    carried = row({"image": {"bytes": b"x", "path": "a"}, "raw": b"x", "n": 1}, argument_names(TextToImageArguments))
    assert carried == (7, {}, {"n": 1})


@pytest.mark.parametrize(
    "name",
    [
        "../x.png",
        "/etc/x.png",
        "a/../../x.png",
        "file:///etc/x",
        "zip://x::file:///etc/x",
        "x::file:///etc/x",
        "local://x",
    ],
)
def test_no_name_leaves_a_folder(name):
    for value in (name, [name], {"bytes": None, "path": name}):
        with pytest.raises(ValueError, match=r"t\.jsonl, line 8: .*points outside the folder"):
            row({"image": value}, folder="memory://x", inside=True)


def test_names_of_local_tables_go_anywhere():
    assert row({"image": "/etc/x.png"}).values["image"].place == "/etc/x.png"
    assert row({"image": "../x.png"}).values["image"].place == "/data/../x.png"
    assert row({"image": "file:///etc/x.png"}).values["image"].place == "/etc/x.png"
    address = "https://example.org/x.png?key=secret"
    assert row({"image": address}, inside=True).values["image"] == Stored(address, None, address)
    assert row({"image": "./x.png"}, folder="gs://b/y", inside=True).values["image"].place == "gs://b/y/x.png"


def test_what_a_call_is_given(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "e.npy").write_bytes(npy(np.arange(3, dtype=np.float16)))
    columns = {"image": ["a.png", "data:,x"], "image_embeds": "e.npy", "image_weights": [1, 2], "seed": 3}
    made = resolve(pickle.loads(pickle.dumps(row(columns, folder=tmp_path, inside=True))))
    assert made["image"] == [b"picture", b"x"]
    assert made["image_embeds"].dtype == np.float16
    np.testing.assert_array_equal(made["image_embeds"], [0, 1, 2])
    assert made["image_weights"].dtype == np.float32
    np.testing.assert_array_equal(made["image_weights"], [1, 2])
    assert made["seed"] == 3
    depth = make_row(0, {"depth_map": "e.npy"}, "", {"depth_map"}, {}, Base(str(tmp_path), True))
    np.testing.assert_array_equal(resolve(depth)["depth_map"], [0, 1, 2])


@pytest.mark.parametrize(
    ("columns", "kind", "words"),
    [
        ({"image": "gone.png"}, FileNotFoundError, r"image: gone\.png: no such file"),
        ({"image": "."}, IsADirectoryError, "image: "),
        ({"image": 3}, ValueError, "image: is 3; want a path"),
        ({"image": {}}, ValueError, "image: is None; want a path"),
        ({"image": "a\0.png"}, ValueError, "image: .*null byte"),
        ({"image_embeds": "text.npy"}, ValueError, r"image_embeds: text\.npy: not a \.npy file"),
        ({"image_embeds": "pickle.npy"}, ValueError, r"image_embeds: pickle\.npy: not a \.npy file: .*allow_pickle"),
        ({"image_embeds": "empty.npy"}, ValueError, r"image_embeds: empty\.npy: not a \.npy file"),
        ({"image_embeds": "huge.npy"}, ValueError, r"image_embeds: huge\.npy: not a \.npy file"),
        ({"image_embeds": "several.npy"}, ValueError, r"image_embeds: several\.npy: a \.npz file"),
        ({"image_embeds": [[1], [1, 2]]}, ValueError, "image_embeds: is .*; want numbers"),
        ({"image_weights": {"a": 1}}, ValueError, "image_weights: is .*; want numbers"),
    ],
)
def test_what_cannot_be_read_is_told_with_row_and_column(columns, kind, words, tmp_path):
    (tmp_path / "text.npy").write_text("text")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "pickle.npy").write_bytes(npy(np.array([print], object)))
    with (tmp_path / "huge.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**13,)}
        np.lib.format.write_array_header_1_0(file, header)
    np.savez(tmp_path / "several.npz", a=1)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    with pytest.raises(kind, match=f"^row 7: {words}"):
        resolve(row(columns, folder=tmp_path))


def test_the_fingerprint_is_of_all_that_a_row_says(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    columns = {"image": "a.png", "seed": 1, "score": 2.0}
    first = fingerprint(row(columns, folder=tmp_path))
    assert first == fingerprint(row(dict(reversed(columns.items())), folder=tmp_path))
    changed = [
        row(columns, folder=tmp_path, number=8),
        row(columns | {"seed": 2}, folder=tmp_path),
        row(columns | {"score": 3.0}, folder=tmp_path),
        row(columns | {"image": b"1"}, folder=tmp_path),
        row(columns | {"image": [b"1"]}, folder=tmp_path),
        row(columns | {"image": "./a.png"}, folder=tmp_path),
        row(columns | {"image": "b.png"}, folder=tmp_path),
        row(columns | {"image": "https://a/?1"}, folder=tmp_path),
        row(columns | {"image": "https://a/?2"}, folder=tmp_path),
    ]
    prints = [first, *map(fingerprint, changed)]
    (tmp_path / "a.png").write_bytes(b"12")
    prints.append(fingerprint(row(columns, folder=tmp_path)))
    prints += [fingerprint(row({"image": "a\0.png"})), fingerprint(row({"image": {}}))]
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_is_the_same_on_another_machine(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for folder in (tmp_path, other):
        (folder / "a.png").write_bytes(b"1")
    columns = {"image": "a.png", "prompt": "é\ud800", "score": 0.1, "tags": ["x", {"b": 1, "a": None}]}
    want = fingerprint(row(columns, folder=tmp_path))
    assert fingerprint(row(columns, folder=other)) == want
    code = (
        "from unclip_jax.bulk.rows import *; import sys;"
        f"print(fingerprint(make_row(7, {columns!a}, '', {{'image', 'prompt'}}, {{}}, Base({str(other)!r}, True))))"
    )
    again = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.strip() == want
