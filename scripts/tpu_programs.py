"""The programs of a checkpoint's networks, compiled for TPUs that are not there, without weights."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from convert.architecture.presets import PRESETS
from unclip_jax.checkpoints.config import CheckpointConfig
from unclip_jax.checkpoints.networks import Network, abstract_network, abstract_networks
from unclip_jax.distributed.mesh import batch_sharding, data_size, replicated
from unclip_jax.models import platform
from unclip_jax.models.configs import VAEConfig
from unclip_jax.models.unet import UNet
from unclip_jax.pipelines.compiled import make_programs
from unclip_jax.pipelines.lowering import around_the_loop, parameters, shaped, the_loop
from unclip_jax.pipelines.memory import Memory
from unclip_jax.training.diffusion_objective import DiffusionObjective
from unclip_jax.training.diffusion_trainer import losses_of
from unclip_jax.training.lora import initial_lora, merge_lora
from unclip_jax.training.optimizer import adamw
from unclip_jax.training.run import RunOptions, state_shardings, step_program
from unclip_jax.training.step import start_training

# Training is over "data" alone.
TRAINING = ("train_unet", "train_lora")
PROGRAMS = (
    *("image_encoder", "depth_estimator", "vae_encode", "text_encoder", "prepare", "run_steps", "decode"),
    *TRAINING,
)
MESHES = ("1", "data", "data,model")


@dataclasses.dataclass(frozen=True)
class Case:
    """One program, and what it is compiled for.

    Attributes:
        topology: as `jax.experimental.topologies` names it, "v5e:2x2".
        mesh: of `MESHES`; "data,model" has two devices along "model".
        dtype: of weights and computation; a trained UNet's weights are float32.
        model: of `convert.architecture.presets.PRESETS`.
        size: the side of the latents.
        batch: guided images, or training images, of all devices together.
        levels: how many of the networks' levels and layers; None for all.
        program: of `PROGRAMS`.
    """

    topology: str
    mesh: str
    dtype: str
    model: str
    size: int
    batch: int
    levels: int | None
    program: str

    @property
    def config(self) -> CheckpointConfig:
        whole = PRESETS[self.model]
        return whole if self.levels is None else shallow(whole, self.levels)

    @property
    def exists(self) -> bool:
        """Whether the checkpoint has the network, and the mesh is one that the program may run on."""
        return getattr(self.config, self.program, self) is not None and not (
            self.program in TRAINING and self.mesh == "data,model"
        )


def shallow(config: CheckpointConfig, levels: int) -> CheckpointConfig:
    """Networks with as many levels and layers, in their real widths: the UNet's first levels, the VAE's last."""
    unet, vae, estimator = config.unet, config.vae, config.depth_estimator
    assert isinstance(vae, VAEConfig)
    per_level = ("block_out_channels", "attention_levels", "num_heads", "only_cross_attention")
    few: dict[str, Any] = {name: getattr(unet, name)[:levels] for name in per_level}
    towers = {
        name: dataclasses.replace(getattr(config, name), layers=levels)
        for name in ("text_encoder", "image_encoder")
        if getattr(config, name) is not None
    }
    if estimator is not None:
        layers = max(2, levels)
        estimator = dataclasses.replace(estimator, layers=layers, taps=(layers - 2, layers - 1), stage_depths=(1, 1, 1))
    return dataclasses.replace(
        config,
        unet=dataclasses.replace(unet, layers_per_block=1, **few),
        vae=dataclasses.replace(vae, layers_per_block=1, block_out_channels=vae.block_out_channels[-levels:]),
        depth_estimator=estimator,
        **towers,
    )


def compile_case(case: Case) -> Any:
    """The compiled program. Raises whatever the compiler raises."""
    mesh = make_mesh(case)
    with tracing_for_tpus():
        if case.program in TRAINING:
            return lower_training(case, mesh).compile()
        config, dtype = case.config, jnp.dtype(case.dtype)
        networks = abstract_networks(config, dtype)
        family = (
            config,
            make_programs(config, networks, mesh, dtype, Memory()),
            mesh,
            parameters(config, networks, mesh),
        )
        latents = (case.size, case.size, config.vae.latent_channels)
        programs = around_the_loop(*family, latents, case.batch)
        if case.program != "run_steps":
            return programs[case.program].lower().compile()
        before = (programs[name].lower().compile() for name in ("start", "prepare"))
        return the_loop(*family, case.batch, *before).lower().compile()


def make_mesh(case: Case) -> Mesh:
    """The devices of a topology, one or all of them."""
    devices: Any = np.array(topologies.get_topology_desc(case.topology, platform="tpu").devices)
    axes = ("data", "model") if case.mesh == "data,model" else ("data",)
    devices = devices[:1] if case.mesh == "1" else devices.reshape(-1, 2) if len(axes) == 2 else devices
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


@contextmanager
def tracing_for_tpus() -> Iterator[None]:
    """What is traced here chooses as in a process that has TPUs."""
    with mock.patch.object(platform, "accelerator", return_value="tpu"):
        yield


def lower_training(case: Case, mesh: Mesh) -> Any:
    """A training step of a UNet or of an adapter, which reads the other networks' outputs as a cache keeps them.

    Activations are recomputed. Over several devices each of them holds its part of the trained weights.
    """
    config, dtype, adapts = case.config, jnp.dtype(case.dtype), case.program == "train_lora"
    stored = dtype if adapts else jnp.float32
    unet: Network = abstract_network(UNet, config.unet, dtype, stored, remat=True)
    if adapts:
        trained = jax.eval_shape(lambda: initial_lora(unet.params, 16, 0))
        losses = losses_of({}, objective(config), unet, 0, lambda frozen, p: {"unet": merge_lora(frozen["unet"], p)})
    else:
        trained = unet.params
        losses = losses_of({}, objective(config), unet, 0, lambda frozen, p: {"unet": {**frozen["unet"], **p}})
    optimizer, options = adamw(1e-4), RunOptions(total_steps=1, shard_parameters=mesh.size > 1)
    state = jax.eval_shape(lambda params: start_training(params, optimizer), trained)
    shardings = state_shardings(state, options, mesh)

    def everywhere(shape: tuple[int, ...], dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return shaped(shape, replicated(mesh), dtype)

    text, embedding = config.text_encoder, config.image_embedding_dim
    frozen: dict[str, Any] = {
        "unet": {name: everywhere(spec.shape, dtype) for name, spec in unet.params.items() if adapts},
        "alphas_cumprod": everywhere((1000,)),
        "low_res_alphas_cumprod": everywhere((1000,)),
        "empty_context": everywhere((1, text.context_length, text.width), dtype),
    }
    if embedding is not None:
        table = {"alphas_cumprod": everywhere((1000,))}
        frozen["noising"] = table | {name: everywhere((embedding,)) for name in ("mean", "std")}
    count = -(-case.batch // data_size(mesh)) * data_size(mesh)
    shapes = {name: (count, *shape) for name, shape in encoded_shapes(config, case.size).items()}
    batch = {name: shaped(shape, batch_sharding(mesh)) for name, shape in shapes.items()}
    placed = jax.tree.map(lambda leaf, sharding: shaped(leaf.shape, sharding, leaf.dtype), state, shardings)
    move = step_program(optimizer, options, mesh, shardings)
    return move.lower(jax.tree_util.Partial(losses, frozen), placed, batch, everywhere((), np.int32))


def objective(config: CheckpointConfig) -> DiffusionObjective:
    return DiffusionObjective(str(config.scheduler_config["prediction_type"]), config.vae.scaling_factor)


def encoded_shapes(config: CheckpointConfig, size: int) -> dict[str, tuple[int, ...]]:
    """What a cache holds of an image: the entries of `diffusion_objective.ENCODED` and their shapes."""
    moments = (size, size, 2 * config.vae.latent_channels)
    shapes = {"moments": moments, "context": (config.text_encoder.context_length, config.text_encoder.width)}
    if config.image_embedding_dim is not None:
        shapes["image_embeds"] = (config.image_embedding_dim,)
    if config.task == "inpaint":
        shapes |= {"masked_moments": moments, "mask": (size, size, 1)}
    if config.task == "depth-to-image":
        shapes["depth_map"] = (size, size, 1)
    if config.task == "upscale":
        shapes["low_res"] = (size, size, 3)
    return shapes
