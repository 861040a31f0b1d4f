"""Settings from YAML: defaults, overrides, stages, and what is refused by name."""

import re
from pathlib import Path

import pytest
import yaml

from unclip_jax.training.settings import read_settings

LEAST = "task: denoise\nmodel: m\nout: o\ndata: {image_folder: d}\nrun: {total_steps: 10}\n"


@pytest.fixture
def read(tmp_path):
    def made(text=LEAST, *overrides):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return read_settings(path, overrides)

    return made


def test_the_defaults_are_the_cards(read):
    settings = read()
    assert (settings.optimizer.learning_rate, settings.optimizer.warmup_steps) == (1e-4, 10_000)
    assert settings.optimizer.decay == "constant"
    assert settings.objective.embedding_dropout == 0.25
    assert settings.run.ema_decay == 0.9999
    assert settings.each_stage() == [settings]


def test_overrides(read):
    settings = read(
        LEAST,
        "optimizer.learning_rate=1e-5",
        "data.filters={p_unsafe: [null, 0.1]}",
        "data.flip=true",
        "stages=[{data: {resolution: 64}}, {run: {total_steps: 5}, data: {resolution: 128}}]",
        "run.total_steps=2000000",
    )
    assert settings.optimizer.learning_rate == 1e-5
    assert settings.data.filters == {"p_unsafe": [None, 0.1]}
    first, second = settings.each_stage()
    assert (first.data.resolution, first.run.total_steps, first.out) == (64, 2_000_000, "o/stage-1")
    assert (second.data.resolution, second.run.total_steps, second.data.flip) == (128, 5, True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=cook", "settings: task is 'cook'"),
        ("unknown=1", r"unknown keys \['unknown'\]"),
        ("run.total_steps=many", "run: total_steps is 'many'; want int"),
        ("run.total_steps=0", "total_steps is 0"),
        ("optimizer.learning_rate=fast", "learning_rate is 'fast'"),
        ("data.tars=[a.tar]", "want either image_folder or tars"),
        ("data.filters={x: 3}", "data.filters: x is 3; want"),
        ("data={image_folder: d, cache: c, flip: true}", "data.cache"),
        ("dtype=float64", "dtype is 'float64'"),
        ("reports=[mail]", "reports has 'mail'; accepted"),
        ("batch_size=0", "batch_size is 0"),
        ("model=null", "model is None"),
        ("nonsense", "want KEY=VALUE"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(read, override, message):
    with pytest.raises(ValueError, match=message):
        read(LEAST, override)


@pytest.mark.parametrize("text", ["", "[]", "a: [", "task: denoise\n"])
def test_files_that_are_no_settings(read, text):
    with pytest.raises(ValueError, match=r"settings|YAML"):
        read(text)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="CONFIG"):
        read_settings(tmp_path / "none.yaml")


def test_the_pages_settings_are_settings(tmp_path):
    """docs/training.md's own blocks: the first as it is, the others on top of it."""
    page = (Path(__file__).parents[2] / "docs/training.md").read_text("utf-8")
    whole, *more = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    base = yaml.safe_load(whole)
    path = tmp_path / "settings.yaml"
    path.write_text(whole)
    assert read_settings(path).optimizer.accumulate == 4
    assert len(more) == 3
    instruct, cached, staged = (yaml.safe_load(block) for block in more)
    for changes in (instruct, cached, staged):
        path.write_text(yaml.safe_dump({**base, **changes}))
        settings = read_settings(path)
    assert [stage.data.resolution for stage in settings.each_stage()] == [256, 512, 768]
