"""The safety check without torch: its arithmetic step by step, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.readers import CheckpointError
from convert.safety import open_safety_checker
from tests.convert.hostile_pickles import HOSTILE
from tests.convert.safety_folder import CONFIG, PREPROCESSOR, TOWER, random_tensors, write_safety_checker
from tests.convert.torch_files import torch_bytes
from unclip_jax.safety import Concepts, black_out, check, embed, is_flagged, scores


@pytest.fixture
def folder(tmp_path):
    return write_safety_checker(tmp_path / "model" / "safety_checker")


def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), np.uint8)


def test_an_image_near_a_concept_is_flagged(folder):
    checker = open_safety_checker(folder)
    found = [embed(checker, x) for x in pictures()]
    cosines = [x @ found[1] / np.linalg.norm(x) / np.linalg.norm(found[1]) for x in found]
    thresholds = np.full(17, 2, np.float32)
    thresholds[4] = (1 + max(cosines[0], cosines[2])) / 2
    embeds = checker.concepts.embeds.copy()
    embeds[4] = 3 * found[1]
    far = Concepts(embeds[:3], thresholds[:3])
    checker = dataclasses.replace(checker, concepts=Concepts(embeds, thresholds), special_care=far)
    assert check(checker, pictures()) == [False, True, False]
    assert check(checker, pictures()[1:]) == [True, False]
    assert check(checker, []) == []


@pytest.mark.parametrize(
    ("threshold", "special", "verdict"),
    [
        (0.7, 1.0, True),
        (0.7996, 1.0, False),  # 0.0004 rounds to 0
        (0.7994, 1.0, True),
        (0.809, 1.0, False),
        (0.809, 0.599, True),  # special care: 0.01 more
        (0.809, 0.5998, False),  # of which the score rounds to 0 as well
        (0.8104, 0.1, False),
    ],
)
def test_rounding_and_special_care(folder, threshold, special, verdict):
    checker = open_safety_checker(folder)
    embedding = np.array([8, 6], np.float32)  # cosines 0.8 and 0.6 with the axes
    axes = np.eye(2, dtype=np.float32)
    concepts = Concepts(axes[:1], np.float32([threshold]))
    checker = dataclasses.replace(checker, concepts=concepts, special_care=Concepts(axes[1:], np.float32([special])))
    assert is_flagged(checker, embedding) is verdict


def test_flagged_images_become_black():
    images = pictures()
    black = black_out(images, [False, True, False])
    assert black.dtype == np.uint8
    assert not black[1].any()
    np.testing.assert_array_equal(black[::2], images[::2])
    with pytest.raises(ValueError, match="flags has 2 entries for 3 images"):
        black_out(images, [False, True])


def test_a_score_that_is_no_number_passes_for_nothing(folder):
    concepts = open_safety_checker(folder).concepts
    with pytest.raises(FloatingPointError, match="not finite"):
        scores(concepts, np.full(16, np.nan, np.float32), 0)


def test_where_a_checker_is_found(folder):
    model = folder.parent
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_safety_checker(model)
    (model / "model_index.json").write_text("{}")
    (model / "feature_extractor").mkdir()
    (model / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    a, b = open_safety_checker(folder), open_safety_checker(str(model))
    np.testing.assert_array_equal(embed(a, pictures()[0]), embed(b, pictures()[0]))
    assert a.concepts.embeds.shape == (17, 16)
    np.testing.assert_array_equal(a.concepts.thresholds, random_tensors()["concept_embeds_weights"])
    np.testing.assert_array_equal(a.special_care.embeds, random_tensors()["special_care_embeds"])
    old = {**CONFIG, "vision_config": {}, "vision_config_dict": TOWER, "architectures": ["SafetyChecker"]}
    (folder / "config.json").write_text(json.dumps(old))
    np.testing.assert_array_equal(embed(open_safety_checker(folder), pictures()[0]), embed(a, pictures()[0]))
    (model / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "size": 224}))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: size is 224"):
        open_safety_checker(folder)
    folder.rename(model / "elsewhere")
    with pytest.raises(CheckpointError, match="model: a model without a safety_checker folder"):
        open_safety_checker(model)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_safety_checker(model / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["IFSafetyChecker"]}, "IFSafetyChecker"),
        ({"architectures": 3}, "architectures is 3"),
        ({"model_type": "siglip"}, "model_type is 'siglip'"),
        ({"vision_config": []}, "complete|missing|misshapen"),
        ({"vision_config": 3}, "vision_config is 3"),
        ({"vision_config": {**TOWER, "hidden_act": "relu"}}, "hidden_act is 'relu'"),
        ({"vision_config": {**TOWER, "num_hidden_layers": 3}}, r"missing: .*layers\.2"),
        ({"projection_dim": 8}, r"concept_embeds has shape \(17, 16\), want \(17, 8\)"),
        ({"projection_dim": "many"}, "projection_dim is 'many'"),
    ],
)
def test_configurations_that_are_refused(folder, change, words):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(CheckpointError, match=words) as error:
        open_safety_checker(folder)
    assert "\n" not in str(error.value)


def test_weights_that_are_refused(folder):
    tensors = random_tensors()
    for change, words in (
        ({"concept_embeds": np.zeros((18, 16), np.float32)}, r"concept_embeds has shape \(18, 16\)"),
        ({"p_head.weight": np.zeros((1, 16), np.float32)}, "unknown: p_head.weight"),
        ({"vision_model.post_layernorm.bias": np.zeros(32, np.float32)}, "twice"),
        ({"concept_embeds_weights": np.zeros(17, np.int32)}, "int32"),
    ):
        save_file({**tensors, **change}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            open_safety_checker(folder)
    del tensors["special_care_embeds"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing: special_care_embeds"):
        open_safety_checker(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_safety_checker(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        open_safety_checker(folder)
    (folder / "pytorch_model.bin").write_bytes(torch_bytes(HOSTILE["os.system"][0]))
    with pytest.raises(CheckpointError, match=r"os\.system"):
        open_safety_checker(folder)
