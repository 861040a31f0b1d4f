"""The method by which a pipeline puts what it was opened with on the hub."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from unclip_jax.checkpoints.checkpoint import Checkpoint, Parameter
from unclip_jax.checkpoints.networks import Network, is_stacked
from unclip_jax.checkpoints.upload import push
from unclip_jax.pipelines.adapters import Adaptable
from unclip_jax.pipelines.opening import Opened


class Publishable(Adaptable):
    """A pipeline whose checkpoint can be put on the hub."""

    opened: Opened
    progress: bool

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Uploads the checkpoint, as a diffusers folder with a model card; returns the commit's address.

        The weights are those of `networks`, in the pipeline's dtype; with `Memory(free_networks=True)` the opened
        checkpoint's. A prior or a ControlNet beside them is a checkpoint of its own: `python -m convert --push`.

        Args:
            repo_id: "owner/name". The repository is made if it is not there.
            private: whether a new repository is private. None: the owner's default.
            commit_message: of the commit. None: one that names this library.
            revision: the branch, which is made if it is not there. None: the main branch.
            token: one that may write. None: the login's, or HF_TOKEN.

        Raises:
            ValueError: for an argument, and while adapters are loaded.
            PermissionError: when there is no token, or it is refused.
            ConnectionError: when there is no network.
            OSError: for another failure.
        """
        if loaded := [*self.adapters.loras, *self.adapters.words]:
            raise ValueError(
                f"adapters are loaded ({', '.join(map(repr, loaded))}), and a checkpoint's folder has none: take them "
                "away first (unload_lora_weights, unload_textual_inversion), and publish their own files"
            )
        return push(
            checkpoint_of(self.opened, self.networks),
            repo_id,
            private=private,
            commit_message=commit_message,
            revision=revision,
            token=token,
            progress=self.progress,
        )


def checkpoint_of(opened: Opened, networks: Mapping[str, Network]) -> Checkpoint:
    """The checkpoint that a pipeline's networks are, with the configuration by which it runs."""
    if opened.residency is not None:
        return dataclasses.replace(opened.residency.checkpoint, config=opened.config)
    source, *others = opened.sources
    return Checkpoint(opened.config, opened.tokenizer, dict(_parameters(opened, networks)), source, tuple(others))


def _parameters(opened: Opened, networks: Mapping[str, Network]) -> Iterator[tuple[str, Parameter]]:
    for part, network in networks.items():
        for name, value in network.params.items():
            yield f"{part}.{name}", _parameter(name, value)
    for name in ("mean", "std"):
        if name in opened.noising:
            yield f"image_normalizer.{name}", _parameter(name, opened.noising[name])


def _parameter(name: str, value: jax.Array) -> Parameter:
    """Fetched from the devices when it is read; a tower's layers one by one."""
    rows = [slice(i, i + 1) for i in range(len(value))] if is_stacked(name) else [slice(None)]
    return Parameter(value.shape, np.dtype(value.dtype), tuple(functools.partial(_fetch, value, row) for row in rows))


def _fetch(value: jax.Array, rows: slice) -> np.ndarray:
    return np.asarray(value if rows == slice(None) else value[rows])
