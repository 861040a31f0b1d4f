"""A checkpoint prepared for training by denoising, whichever part of it is trained: for the tasks of `tasks.py`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unclip_jax.checkpoints.checkpoint import Checkpoint, family_config
from unclip_jax.checkpoints.config import OF_TWO_LATENTS, CheckpointConfig, EstimatorConfig, for_task
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import NETWORKS, Network, abstract_network
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.distributed.mesh import gathered, pad_batch, placed, replicated
from unclip_jax.models.configs import AutoencoderTinyConfig
from unclip_jax.models.unet import UNet
from unclip_jax.pipelines.estimate import EMPTY_TOKENS
from unclip_jax.sampling.schedule import NoiseSchedule, alphas_cumprod
from unclip_jax.sampling.solvers import make_solver
from unclip_jax.training import diffusion_objective
from unclip_jax.training.cache import CachedExamples, write_cache
from unclip_jax.training.controlnet import hint_of
from unclip_jax.training.data import Record, Skipped, skipping, stacked
from unclip_jax.training.initial import initial_network
from unclip_jax.training.samples import grid, sample_latents
from unclip_jax.training.settings import TrainSettings
from unclip_jax.training.setup import (
    Load,
    examples_of,
    mesh_of,
    run,
    training_records,
    validation_records,
)
from unclip_jax.training.step import TrainState
from unclip_jax.training.transforms import ExampleLoader

INPUT_CHANNELS = {"inpaint": 9, "depth-to-image": 5, **dict.fromkeys(OF_TWO_LATENTS, 8)}
ESTIMATOR_STEPS = 4  # as of the published estimators of the second version

# (frozen parameters with "unet", trained parameters) -> the parameters of the networks that are not frozen.
Combine = Callable[[Mapping[str, Any], Any], Mapping[str, Any]]


class DiffusionTrainer:
    """The networks of a checkpoint on their devices, and everything else that a run needs.

    Attributes:
        config: The checkpoint's, as it will be after training.
        unet: In float32 if it is trained itself, else in the settings' dtype.
        networks: The others, see `unclip_jax.training.diffusion_objective`.
        frozen: Their parameters.
        load: A record -> its example.
        controlnet: What is trained beside the UNet; None for nothing.
    """

    def __init__(self, settings: TrainSettings, checkpoint: Checkpoint, progress: bool):
        self.settings, self.progress, self.mesh = settings, progress, mesh_of(settings)
        objective, dtype = settings.objective, jnp.dtype(settings.dtype)
        config = family_config(checkpoint)
        if isinstance(config.vae, AutoencoderTinyConfig):
            raise ValueError(f"{checkpoint.source}: its VAE is a tiny autoencoder; train with the full one")
        if config.direct:
            raise ValueError(f"{checkpoint.source} predicts its map at once, which no task here trains")
        self.unet, filled = self._load_networks(checkpoint, config, dtype)
        if "depth_estimator" in self.networks:  # perhaps another checkpoint's
            config = dataclasses.replace(config, depth_estimator=filled["depth_estimator"].merge().config)
        if objective.becomes is not None:
            if config.task != "text-to-image":
                raise ValueError(
                    f"objective.becomes needs a text-to-image checkpoint; {checkpoint.source} is {config.task}"
                )
            wider = dataclasses.replace(config.unet, in_channels=INPUT_CHANNELS[objective.becomes])
            config = for_task(dataclasses.replace(config, unet=wider), [objective.becomes])
            structure = abstract_network(UNet, wider, dtype, self.stored, remat=settings.remat)
            self.unet = widened(self.unet, structure, first=config.image_first)
        if config.task == "depth-to-image" and "depth_estimator" not in filled:
            raise ValueError(f"{checkpoint.source} has no depth estimator; give objective.depth_model")

        diffusion = dict(config.scheduler_config)
        self.options = diffusion_objective.DiffusionObjective(
            objective.prediction_type or str(diffusion.get("prediction_type", "epsilon")),
            config.vae.scaling_factor,
            objective.embedding_dropout,
            objective.text_dropout,
            objective.clean_share,
            objective.min_snr_gamma,
            objective.noise_offset,
            objective.max_low_res_level,
            config.image_first,
        )
        diffusion["prediction_type"] = self.options.prediction_type
        if objective.zero_snr:
            if self.options.prediction_type != "v_prediction":
                raise ValueError(
                    "objective.zero_snr needs prediction_type v_prediction: pure noise determines no other"
                )
            diffusion |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self.config = dataclasses.replace(config, scheduler_config=diffusion)

        self.frozen: dict[str, Any] = {name: network.params for name, network in filled.items()}
        self.frozen["alphas_cumprod"] = alphas_cumprod(_schedule(diffusion), config.reference)
        if config.image_noising is not None:
            table = alphas_cumprod(config.image_noising, config.reference)
            if config.image_encoder is None:
                self.frozen["low_res_alphas_cumprod"] = table
            else:
                statistics = {name: checkpoint.params[f"image_normalizer.{name}"].read() for name in ("mean", "std")}
                self.frozen["noising"] = {"alphas_cumprod": table, **statistics}
        tokens = checkpoint.tokenizer([""])[:, : EMPTY_TOKENS if config.image_first else None]
        empty = {"tokens": placed(tokens, replicated(self.mesh))}
        self.frozen["empty_context"] = diffusion_objective.encode(self.networks, self.frozen, empty)["context"]
        self.controlnet: Network | None = None
        self.side = self._side()
        if config.estimator is not None:
            self.config = dataclasses.replace(self.config, estimator=self._estimator(config.estimator))
        self.load: Load = self._example_loader(checkpoint)

    @property
    def stored(self) -> Any:
        return jnp.float32 if self.settings.task == "denoise" else jnp.dtype(self.settings.dtype)

    def _load_networks(
        self, checkpoint: Checkpoint, config: CheckpointConfig, dtype: Any
    ) -> tuple[Network, dict[str, Network]]:
        """The UNet and the other networks; a UNet that begins from random weights is not read."""
        s = self.settings
        parts = {name: getattr(config, name, None) for name in NETWORKS if name != "unet"}
        self.networks = {
            name: abstract_network(NETWORKS[name], part, dtype) for name, part in parts.items() if part is not None
        }
        options = {"dtype": dtype, "param_dtype": self.stored, "remat": s.remat}
        if s.random_start:
            unet = initial_network(UNet, config.unet, s.seed, **options)
            filled = load_networks(checkpoint, self.networks, self.mesh, self.progress)
        else:
            wanted = {**self.networks, "unet": abstract_network(UNet, config.unet, **options)}
            filled = load_networks(checkpoint, wanted, self.mesh, self.progress)
            unet = filled.pop("unet")
        if s.objective.depth_model is not None:
            with open_checkpoint(s.objective.depth_model) as other:
                estimator = family_config(other).depth_estimator
                if estimator is None:
                    raise ValueError(f"objective.depth_model: {s.objective.depth_model} has no depth estimator")
                network = abstract_network(NETWORKS["depth_estimator"], estimator, dtype)
                self.networks["depth_estimator"] = network
                filled |= load_networks(other, {"depth_estimator": network}, self.mesh, self.progress)
        return unet, filled

    def _side(self) -> int:
        """The side of the training images, in pixels."""
        unet, factor = self.config.unet, self.config.vae.factor
        side = self.settings.data.resolution or unet.sample_size * factor
        if side < 1 or side % (factor * unet.size_multiple):
            raise ValueError(f"data.resolution is {side}; want a multiple of {factor * unet.size_multiple}")
        return side

    def _estimator(self, config: EstimatorConfig) -> EstimatorConfig:
        """How the estimator is run after training, where nothing was said of it."""
        return dataclasses.replace(
            config,
            prediction_type=config.prediction_type or self.config.task,
            num_inference_steps=config.num_inference_steps or ESTIMATOR_STEPS,
            processing_resolution=config.processing_resolution or self.side,
        )

    def _example_loader(self, checkpoint: Checkpoint) -> ExampleLoader:
        config, data, vision = self.config, self.settings.data, self.config.image_encoder
        original = self.settings.objective.original_image if config.task in OF_TWO_LATENTS else None
        if config.task == "normals" and data.flip:
            raise ValueError("data.flip is true: mirrored normals would point the wrong way; want false")
        if original is not None and data.image_folder is None:
            raise ValueError(
                f"objective.original_image is {original!r}, a column; want data.image_folder, with the files it names"
            )
        return ExampleLoader(
            self.side,
            data.crop,
            data.flip,
            None if config.image_first else checkpoint.tokenizer,
            None if vision is None else (vision.image_size, config.preprocess),
            self.settings.objective.whole_mask_share if config.task == "inpaint" else None,
            config.vae.factor if config.task == "upscale" else None,
            config.task == "depth-to-image",
            hint_of(self.settings) if self.settings.task == "controlnet" else None,
            original,
        )

    def train(self, trained: Mapping[str, Any], fixed: Mapping[str, Any], combine: Combine) -> TrainState:
        """Trains to the end.

        Args:
            trained: The parameters to train.
            fixed: The UNet's other parameters.
            combine: (frozen parameters with "unet", trained parameters) -> the parameters of the networks.

        Returns:
            The last state.
        """
        settings, networks, options, unet = self.settings, self.networks, self.options, self.unet
        frozen = {**self.frozen, "unet": {name: value.astype(settings.dtype) for name, value in fixed.items()}}
        encode = jax.jit(lambda frozen, batch: diffusion_objective.encode(networks, frozen, batch))

        records = training_records(settings.data)
        checked = validation_records(settings.data)
        shown = examples_of((checked or records)[: settings.samples.images], self.load, settings.seed)
        held_out = examples_of(checked, self.load, settings.seed)
        rows, load = self._cached(records, encode) if settings.data.cache is not None else (records, self.load)
        if settings.data.cache is not None:
            shown, held_out = (self._encoded_examples(each, encode) for each in (shown, held_out))
            for name in ("image_encoder", "text_encoder", "depth_estimator"):  # they have said all that is wanted
                frozen.pop(name, None)

        losses = losses_of(networks, options, unet, settings.seed, combine, self.controlnet)
        score = jax.jit(lambda frozen, params, batch: losses(frozen, params, batch, jnp.int32(0))[0])

        def validate(state: TrainState) -> dict[str, float]:
            assert state.average is not None
            size = settings.batch_size
            parts = [held_out[first : first + size] for first in range(0, len(held_out), size)]
            values = [
                gathered(score(frozen, state.average.params, pad_batch(stacked(part), size)))[: len(part)]
                for part in parts
            ]
            return {"loss": float(np.concatenate(values).mean())}

        return run(
            settings,
            jax.tree_util.Partial(losses, frozen),
            trained,
            rows,
            load,
            self.mesh,
            self.progress,
            validate=validate if held_out else None,
            samples=self._sampler(frozen, combine, stacked(shown)) if settings.run.sample_every else None,
        )

    def _cached(self, records: list[Record], encode: Any) -> tuple[CachedExamples, Load]:
        """The frozen networks' outputs for every image, from the cache, which is written first if it is not there."""
        settings = self.settings
        folder = Path(settings.data.cache or "")
        skipped = Skipped()
        load = skipping(self.load, skipped)
        facts = {"model": str(settings.model), "resolution": self.side, "dtype": settings.dtype}
        write_cache(
            folder,
            records,
            lambda record: load(record, np.random.default_rng(settings.seed)),
            lambda batch: gathered(encode(self.frozen, batch)),
            facts,
            batch_size=settings.batch_size,
            progress=self.progress,
        )
        if skipped:
            print(f"{len(skipped)} images could not be read and are not in the cache: {min(skipped.reasons)} …")
        rows = CachedExamples(folder)
        return rows, lambda row, rng: row

    def _encoded_examples(self, rows: list[Mapping[str, Any]], encode: Any) -> list[Mapping[str, Any]]:
        encoded = [gathered(encode(self.frozen, stacked([row]))) for row in rows]
        return [{name: value[0] for name, value in row.items()} for row in encoded]

    def _sampler(self, frozen: Any, combine: Combine, batch: Any) -> Callable[[TrainState], Image.Image]:
        """A grid: the images themselves, and below them what the denoiser generates from their conditions."""
        s, scaling = self.settings.samples, self.config.vae.scaling_factor
        solver = make_solver("ddim", self.config.scheduler_config, s.steps)
        scale = jnp.float32(s.guidance_scale)

        @jax.jit
        def images(frozen: Any, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            weights = {**frozen, **combine(frozen, params)}
            encoded = diffusion_objective.encode(self.networks, weights, batch)
            net = self.controlnet
            control = None if net is None else Network(net.graphdef, weights["controlnet"])
            given = (weights["unet"], encoded, scale, self.settings.seed, control, self.options.estimates)
            made = sample_latents(self.unet, solver, frozen, scaling, *given)
            vae = self.networks["vae"].merge(frozen["vae"])
            source = jnp.split(encoded["moments"], 2, axis=-1)[0]
            return vae.decode(source), vae.decode(made / scaling)

        def samples(state: TrainState) -> Image.Image:
            assert state.average is not None
            return grid(list(gathered(images(frozen, state.average.params, batch))))

        return samples


def losses_of(
    networks: Mapping[str, Network],
    options: diffusion_objective.DiffusionObjective,
    unet: Network,
    seed: int,
    combine: Combine,
    controlnet: Network | None = None,
) -> Callable[[Any, Any, Any, jax.Array], Any]:
    """(frozen parameters, trained ones, batch, step) -> as `unclip_jax.training.step.Losses`, of which it is a part.

    Args:
        networks: The frozen ones that the batch needs.
        options: The objective.
        unet: The UNet.
        seed: The run's.
        combine: See `Combine`.
        controlnet: With parameters under that name; None for none.
    """

    def losses(frozen: Any, params: Any, batch: Any, step: jax.Array) -> Any:
        weights = {**frozen, **combine(frozen, params)}
        encoded = diffusion_objective.encode(networks, weights, batch)
        control = None if controlnet is None else controlnet.merge(weights["controlnet"])
        return diffusion_objective.losses(options, unet, seed, frozen, weights["unet"], encoded, step, control)

    return losses


def widened(base: Network, wider: Network, first: bool = False) -> Network:
    """A UNet with more input channels than `base`. Their weights are zero, so that it starts out equal to `base`.

    Args:
        base: The UNet with fewer channels.
        wider: The structure of the result.
        first: Whether the new channels come before those of `base`.

    Returns:
        The wider UNet.

    Raises:
        ValueError: `wider` does not read more channels.
    """
    params = dict(base.params)
    kernel, wanted = params["conv_in.kernel"], wider.params["conv_in.kernel"].shape
    missing = wanted[2] - kernel.shape[2]
    if missing < 0 or (kernel.shape[:2], kernel.shape[3]) != (wanted[:2], wanted[3]):
        raise ValueError(f"objective.becomes: the UNet reads {kernel.shape[2]} channels; want fewer than {wanted[2]}")
    added = (missing, 0) if first else (0, missing)
    params["conv_in.kernel"] = jnp.pad(kernel, ((0, 0), (0, 0), added, (0, 0)))
    return Network(wider.graphdef, params)


def _schedule(diffusion: Mapping[str, Any]) -> NoiseSchedule:
    names = {field.name for field in dataclasses.fields(NoiseSchedule)}
    return NoiseSchedule(**{name: value for name, value in diffusion.items() if name in names})
