"""Where numbers go beside the run's own file."""

import sys
import time
import types

import pytest

from unclip_jax.training.reports import tensorboard, wandb


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of protobuf
def test_metrics_reach_tensorboard(tmp_path):
    report = tensorboard(tmp_path)
    report(3, {"loss": 0.5})
    (file,) = tmp_path.iterdir()
    for _ in range(100):  # another thread writes
        if b"loss" in file.read_bytes():
            return
        time.sleep(0.1)
    pytest.fail("nothing was written in ten seconds")


def test_metrics_reach_wandb(monkeypatch):
    """The service is not reached: a module in its place notes what it is told."""
    told = []
    run = types.SimpleNamespace(log=lambda metrics, step: told.append((step, metrics)))
    service = types.SimpleNamespace(init=lambda **settings: told.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", service)
    wandb("cats", id="7")(3, {"loss": 0.5})
    assert told == [{"project": "cats", "resume": "allow", "id": "7"}, (3, {"loss": 0.5})]


@pytest.mark.parametrize(("make", "name"), [(tensorboard, "tensorboardX"), (wandb, "wandb")])
def test_without_them_it_says_what_to_install(make, name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {name}"):
        make(str(tmp_path))
