"""Networks of ours and the same as a pipeline of diffusers."""

import jax.numpy as jnp
import pytest

from convert.export.diffusers import save_diffusers
from tests import small_models
from tests.adapters.live import CONFIG
from unclip_jax.checkpoints.networks import abstract_networks, fill
from unclip_jax.checkpoints.source import open_checkpoint


@pytest.fixture(scope="module")
def any_release_of_peft():
    """transformers asks for one newer than the last that was published when this was written, and works with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
        yield


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Networks and tokenizer of ours, and a function that opens the same as a pipeline of diffusers."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("both")
    small_models.write(CONFIG, folder / "ours")
    with open_checkpoint(folder / "ours") as checkpoint:
        save_diffusers(checkpoint, folder / "theirs")
        abstract = abstract_networks(CONFIG)
        networks = {
            name: fill(
                abstract[name],
                lambda n, name=name: checkpoint.params[f"{name}.{n}"].read(),
                lambda _, a: jnp.asarray(a),
            )
            for name in ("unet", "text_encoder")
        }
    with open_checkpoint(folder / "theirs") as checkpoint:
        tokenizer = checkpoint.tokenizer
    return networks, tokenizer, lambda: StableDiffusionPipeline.from_pretrained(folder / "theirs", safety_checker=None)
