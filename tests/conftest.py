"""What all tests share: four virtual devices, and live comparisons only when asked for."""

import functools
import json
import os
import sys
import warnings
from pathlib import Path

# Before JAX is imported: four virtual CPU devices, so that meshes are tested everywhere.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests ask a hub of their own

import jax
import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from convert.random import write_random_checkpoint
from tests import compiled_programs, small_models
from tests.convert.diffusers_folder import random_tensors, write_folder
from tests.golden_weights import GOLDEN, write_model
from tests.pipelines import small_family
from unclip_jax import progress
from unclip_jax.distributed.mesh import local_mesh
from unclip_jax.pipelines.unclip import UnCLIPPipeline

jax.config.update("jax_numpy_rank_promotion", "allow")
compiled_programs.compile_fast(True)

# On a busy machine any work takes long enough to be told of, in a line that no test waits for.
progress.QUIET_SECONDS = 1e9

# The same examples on every machine and no deadline: the machines that run this differ in speed and load.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """Of several runs at once, one has the folder of compiled programs and the others make theirs anew."""
    kept = os.environ.get("UNCLIP_JAX_TEST_CACHE")
    if not kept or "PYTEST_XDIST_WORKER" in os.environ:
        return
    lock = compiled_programs.take(Path(kept))
    if lock is None:
        del os.environ["UNCLIP_JAX_TEST_CACHE"]  # before the processes of this run are started, which inherit it
    else:
        config.add_cleanup(lock.release)


def pytest_ignore_collect(collection_path, config: pytest.Config) -> bool | None:
    """Files named *_parity.py import torch, *_ray.py Ray: they are read only when that marker is selected."""
    for marker in ("parity", "ray"):
        selected = marker in config.option.markexpr.replace(f"not {marker}", "")
        if collection_path.name.endswith(f"_{marker}.py") and not selected:
            return True
    return None


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory):
    """Compiled programs are shared by the processes of a run; kept for the next where UNCLIP_JAX_TEST_CACHE says."""
    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "compiled"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("UNCLIP_JAX_TEST_CACHE") or str(folder))
    jax.config.update("jax_compilation_cache_max_size", 8 * 2**30)  # with a limit, JAX locks the folder
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A small hub on loopback, which huggingface_hub then asks, with an empty cache in `tmp_path`."""
    from tests.hub_server import serving

    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub", monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def fully_compiled():
    """Programs optimised as users have them, for the recordings of the original. Their memory is the same anyway."""
    compiled_programs.compile_fast(False)
    yield
    compiled_programs.compile_fast(True)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small random checkpoint as one file in the original's layout, and its yaml; not to be written to."""
    return write_random_checkpoint(tmp_path_factory.mktemp("original") / "tiny.safetensors")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random diffusers folder; not to be written to."""
    path = tmp_path_factory.mktemp("diffusers") / "folder"
    path.mkdir()
    return write_folder(path, random_tensors())


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory: pytest.TempPathFactory):
    """Name of a model in tests/golden/models -> its checkpoint file and the options that open it; written once."""
    folder = tmp_path_factory.mktemp("golden")

    @functools.cache
    def files(name: str) -> tuple[Path, dict[str, Path]]:
        options = {"config": GOLDEN / "models" / name / "config.yaml"}
        statistics = GOLDEN / "models" / name / "clip_stats.npz"
        if statistics.exists():
            options["clip_stats"] = statistics
        return write_model(name, folder / f"{name}.safetensors"), options

    return files


@pytest.fixture(scope="session")
def golden_pipeline(golden_files):
    """Name of a model in tests/golden/models -> its pipeline, in float32 on one device; loaded once."""

    @functools.cache
    def pipeline(name: str) -> UnCLIPPipeline:
        file, options = golden_files(name)
        pipe = UnCLIPPipeline.from_pretrained(file, "float32", local_mesh(jax.local_devices()[:1]), **options)
        pipe.progress = False
        return pipe

    return pipeline


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the family with 16x16 images and 8x8 latents; not to be written to."""
    return small_models.write(small_models.SMALL, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory):
    """Name of a model in tests/small_models.py -> its converted directory; not to be written to."""
    folder = tmp_path_factory.mktemp("family")
    return functools.cache(lambda name: small_family.write(name, folder / name))


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model on its own; not to be written to."""
    return small_models.write(small_models.CLIP, tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images of four things, with captions; not to be written to."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    things = {
        "red circle": (220, 40, 40),
        "blue square": (40, 40, 220),
        "green circle": (40, 180, 40),
        "yellow square": (230, 210, 40),
    }
    with (folder / "metadata.jsonl").open("w") as file:
        for number in range(16):
            name, color = list(things.items())[number % 4]
            inside = np.hypot(x - 16, y - 16) < 11 if "circle" in name else np.maximum(abs(x - 16), abs(y - 16)) < 10
            picture = np.where(inside[..., None], color, 255) + rng.integers(-12, 12, (32, 32, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
            row = {"file_name": f"{number:02d}.png", "text": name, "p_unsafe": number / 16}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The folder in which a page's blocks are run."""
    from tests import readme, stand_ins

    readme.like_a_clone(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    # A reader has one device; four would make three copies of every image to be thrown away.
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    stand_ins.small_architectures(monkeypatch)
    return tmp_path
