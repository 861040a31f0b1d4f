"""The tasks of `unclip-jax train`: each opens a checkpoint, trains, and writes the result.

The result is in the run's folder: `model/`, a converted checkpoint with the EMA weights; or the adapter or the textual
inversion embedding, in the files that diffusers reads.
"""

import dataclasses
import re
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.adapters.textual_inversion import with_placeholder
from unclip_jax.checkpoints import foreign
from unclip_jax.checkpoints.checkpoint import controlnet_config, family_config
from unclip_jax.checkpoints.config import ClipConfig
from unclip_jax.checkpoints.loading import load_networks
from unclip_jax.checkpoints.networks import Network, abstract_network, part
from unclip_jax.checkpoints.source import open_checkpoint, open_controlnet
from unclip_jax.compilation import use_compilation_cache
from unclip_jax.conditioning.clip_image import preprocess
from unclip_jax.distributed.hosts import once
from unclip_jax.models.clip import TextEncoder, VisionEncoder
from unclip_jax.models.configs import AutoencoderTinyConfig
from unclip_jax.models.controlnet import ControlNetModel
from unclip_jax.models.vae import VAE
from unclip_jax.training.contrastive import contrastive_loss, effective_rank
from unclip_jax.training.controlnet import fitting_config, initial_controlnet
from unclip_jax.training.data import Record, load_rgb, stacked
from unclip_jax.training.diffusion_trainer import DiffusionTrainer
from unclip_jax.training.initial import initial_network
from unclip_jax.training.lora import as_lora, initial_lora, merge_lora
from unclip_jax.training.rng import draw_step, step_keys
from unclip_jax.training.settings import Task, TrainSettings
from unclip_jax.training.setup import (
    averages,
    examples_of,
    mesh_of,
    run,
    save_checkpoint,
    save_controlnet,
    training_records,
    validation_records,
)
from unclip_jax.training.step import TrainState
from unclip_jax.training.textual_inversion import expand, initial_rows, with_rows
from unclip_jax.training.tiny_vae import tiny_autoencoder
from unclip_jax.training.transforms import ExampleLoader, square
from unclip_jax.training.vae_losses import autoencoding_losses, clip_distance, psnr

LARGEST_LOGIT_SCALE = np.log(100.0)  # where CLIP's own training stops it


def run_training(settings: TrainSettings, progress: bool = True) -> Path:
    """Does everything that the settings ask for, stage by stage.

    An interrupted run resumes where it stopped; a finished one is left as it is.

    Args:
        settings: The settings.
        progress: Show progress bars.

    Returns:
        The path of the last result.

    Raises:
        ValueError: The settings do not fit the checkpoint or the data.
        FileNotFoundError: A file is missing.
        FloatingPointError: As in `unclip_jax.training.run.train`, like its other errors.
    """
    use_compilation_cache()
    made: Path | None = None
    for stage in settings.each_stage():
        if made is not None:
            stage = _after(stage, made)
        made = TASKS[stage.task](stage, progress)
    assert made is not None
    return made


def _after(stage: TrainSettings, made: Path) -> TrainSettings:
    """A stage that begins with what the one before has made."""
    if stage.task == "controlnet":
        return dataclasses.replace(stage, controlnet=dataclasses.replace(stage.controlnet, model=str(made)))
    if stage.task == "tiny-autoencoder":
        return dataclasses.replace(stage, tiny_vae=dataclasses.replace(stage.tiny_vae, model=str(made)))
    return dataclasses.replace(stage, model=str(made), random_start=False)


def denoise(settings: TrainSettings, progress: bool) -> Path:
    """Trains a UNet, or the part of it that `objective.trainable` names."""
    made = Path(settings.out) / "model"
    with open_checkpoint(settings.model) as checkpoint:
        setup = DiffusionTrainer(settings, checkpoint, progress)
        pattern = re.compile(settings.objective.trainable)
        trained = {name: value for name, value in setup.unet.params.items() if pattern.fullmatch(name)}
        if not trained:
            raise ValueError(f"objective.trainable is {settings.objective.trainable!r}; the UNet has no such parameter")
        fixed = {name: value for name, value in setup.unet.params.items() if name not in trained}
        state = setup.train(trained, fixed, lambda frozen, params: {"unet": {**frozen["unet"], **params}})
        networks = {"unet": {**fixed, **averages(state)}}
        if setup.config.depth_estimator is not None:  # perhaps another checkpoint's
            networks["depth_estimator"] = setup.frozen["depth_estimator"]
        save_checkpoint(checkpoint, setup.config, networks, made)
    return made


def lora(settings: TrainSettings, progress: bool) -> Path:
    """Trains an adapter of the UNet."""
    foreign.require_convert()  # which writes it: not after hours
    options = settings.lora
    with open_checkpoint(settings.model) as checkpoint:
        setup = DiffusionTrainer(settings, checkpoint, progress)
        adapter = initial_lora(setup.unet.params, options.rank, settings.seed, options.targets, options.alpha)
        state = setup.train(
            adapter, setup.unet.params, lambda frozen, params: {"unet": merge_lora(frozen["unet"], params)}
        )
        trained = as_lora(averages(state), "unet")
        return Path(once(lambda: str(foreign.save_lora(setup.config, trained, Path(settings.out)))))


def controlnet(settings: TrainSettings, progress: bool) -> Path:
    """Trains a ControlNet beside a checkpoint, which stays as it is."""
    made, options = Path(settings.out) / "model", {"dtype": jnp.dtype(settings.dtype), "remat": settings.remat}
    if settings.random_start:
        raise ValueError("random_start: a ControlNet begins as a copy of the checkpoint's encoder")
    with open_checkpoint(settings.model) as checkpoint:
        setup = DiffusionTrainer(settings, checkpoint, progress)
        if settings.controlnet.model is None:
            config = fitting_config(setup.config)
            network = initial_controlnet(config, setup.unet.params, settings.seed, **options)
        else:
            with open_controlnet(settings.controlnet.model) as other:
                config = controlnet_config(other)
                network = abstract_network(ControlNetModel, config, param_dtype=jnp.float32, **options)
                network = load_networks(other, {"controlnet": network}, setup.mesh, progress)["controlnet"]
        setup.controlnet = network
        state = setup.train(
            network.params, setup.unet.params, lambda frozen, params: {"unet": frozen["unet"], "controlnet": params}
        )
        save_controlnet(checkpoint, config, averages(state), made)
    return made


def textual_inversion(settings: TrainSettings, progress: bool) -> Path:
    """Trains a textual inversion embedding."""
    foreign.require_convert()
    word = settings.inversion
    if settings.data.cache is not None:
        raise ValueError("data.cache is set; leave it out: the text encoder's states change with the embedding")
    with open_checkpoint(settings.model) as checkpoint:
        tokenizer, _ = with_placeholder(checkpoint.tokenizer, word.placeholder, word.vectors)
        setup = DiffusionTrainer(settings, checkpoint, progress)
        prompts = [expand(t.replace("{}", word.placeholder), word.placeholder, word.vectors) for t in word.templates]
        tokens = tokenizer(prompts)
        load = setup.load
        setup.load = lambda record, rng: {**load(record, rng), "tokens": tokens[rng.integers(len(tokens))]}
        known = checkpoint.tokenizer.tokens(word.initial_word)
        rows = initial_rows(setup.frozen["text_encoder"], known, word.vectors)
        state = setup.train(
            {"rows": rows},
            setup.unet.params,
            lambda frozen, params: {"text_encoder": with_rows(frozen["text_encoder"], params["rows"])},
        )
        trained = averages(state)["rows"]
        return Path(once(lambda: str(foreign.save_textual_inversion(word.placeholder, trained, Path(settings.out)))))


def autoencoder(settings: TrainSettings, progress: bool) -> Path:
    """Trains the VAE's encoder and decoder."""
    options, made = settings.autoencoder, Path(settings.out) / "model"
    mesh = mesh_of(settings)
    with open_checkpoint(settings.model) as checkpoint:
        config = family_config(checkpoint)
        if isinstance(config.vae, AutoencoderTinyConfig):
            raise ValueError(f"model is {settings.model}: its VAE is a tiny autoencoder; its task is tiny-autoencoder")
        network = _network(checkpoint, VAE, "vae", config.vae, settings, mesh, progress)
        side = settings.data.resolution or config.unet.sample_size * config.vae.factor
        if side < 1 or side % config.vae.factor:
            raise ValueError(f"data.resolution is {side}; want a multiple of {config.vae.factor}")
        load = ExampleLoader(side, settings.data.crop, settings.data.flip)
        judge, seeing = _judge(settings, mesh, progress)

        def losses(seeing: Any, params: Any, batch: Any, step: jax.Array) -> Any:
            model = network.merge(params)
            posterior = model.encode(batch["image"])
            keys = step_keys(settings.seed, step, jnp.arange(len(batch["image"])))
            noise = draw_step(keys, posterior.mean.shape[1:]).posterior_noise
            decoded = model.decode(posterior.sample(noise))
            each = autoencoding_losses(
                decoded,
                batch["image"],
                posterior,
                kl_weight=options.kl_weight,
                gradient_weight=options.gradient_weight,
                squared_weight=options.squared_weight,
                perceptual=None if judge is None else clip_distance(judge.merge(seeing)),
                perceptual_weight=options.perceptual_weight,
            )
            return each, {"psnr": psnr(decoded, batch["image"]).mean()}

        held_out = examples_of(validation_records(settings.data), load, settings.seed)

        @jax.jit
        def quality(params: Any, image: jax.Array) -> jax.Array:
            model = network.merge(params)
            return psnr(jnp.clip(model.decode(model.encode(image).mean), -1, 1), image)[0]

        def validate(state: TrainState) -> dict[str, float]:
            assert state.average is not None
            images = [stacked([row])["image"] for row in held_out]
            values = [float(quality(state.average.params, image)) for image in images]
            return {"loss": -float(np.mean(values)), "psnr": float(np.mean(values))}

        state = run(
            settings,
            jax.tree_util.Partial(losses, seeing),
            network.params,
            training_records(settings.data),
            load,
            mesh,
            progress,
            validate=validate if held_out else None,
        )
        save_checkpoint(checkpoint, config, {"vae": averages(state)}, made)
    return made


def clip(settings: TrainSettings, progress: bool) -> Path:
    """Trains both towers of a CLIP model on its own or, with pairs of images, the vision tower alone."""
    made, mesh, options = Path(settings.out) / "model", mesh_of(settings), settings.clip
    with open_checkpoint(settings.model) as checkpoint:
        config = checkpoint.config
        if not isinstance(config, ClipConfig):
            raise ValueError(f"model is {settings.model}; task clip needs a CLIP model on its own")
        vision = _network(checkpoint, VisionEncoder, "image_encoder", config.image_encoder, settings, mesh, progress)
        text = _network(checkpoint, TextEncoder, "text_encoder", config.text_encoder, settings, mesh, progress)
        params = {f"image_encoder.{name}": value for name, value in vision.params.items()}
        params["logit_scale"] = jnp.asarray(checkpoint.params["similarity.logit_scale"].read(), jnp.float32)
        images_only = options.pairs == "image-image"
        if not images_only:
            params |= {f"text_encoder.{name}": value for name, value in text.params.items()}
        side, data = config.image_encoder.image_size, settings.data
        records = training_records(data)
        mates: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            mates[record.text].append(record)

        def pixels(record: Record, rng: np.random.Generator) -> np.ndarray:
            image = square(load_rgb(record), side, data.crop, rng)
            image = image[:, ::-1] if data.flip and rng.random() < 0.5 else image
            return preprocess(np.ascontiguousarray(image), "diffusers", side)

        def load(record: Record, rng: np.random.Generator) -> dict[str, Any]:
            row = {"pixel_values": pixels(record, rng), "label": np.uint32(zlib.crc32(record.text.encode()))}
            if not images_only:
                return {**row, "tokens": checkpoint.tokenizer([record.text])[0]}
            others = [mate for mate in mates[record.text] if mate is not record] or [record]
            return {**row, "other": pixels(others[rng.integers(len(others))], rng)}

        def losses(params: Any, batch: Any, step: jax.Array) -> Any:
            see = vision.merge(part(params, "image_encoder"))
            seen = see(batch["pixel_values"])
            mate = (
                see(batch["other"]) if images_only else text.merge(part(params, "text_encoder")).embed(batch["tokens"])
            )
            scale = jnp.minimum(params["logit_scale"], LARGEST_LOGIT_SCALE)
            loss = contrastive_loss(seen, mate, scale, batch["label"])
            return jnp.broadcast_to(loss, len(seen)), {"effective_rank": effective_rank(seen)}

        state = run(settings, losses, params, records, load, mesh, progress)
        trained = averages(state)
        networks = {name: part(trained, name) for name in ("image_encoder", "text_encoder")}
        networks["similarity"] = {"logit_scale": np.minimum(trained["logit_scale"], np.float32(LARGEST_LOGIT_SCALE))}
        save_checkpoint(checkpoint, config, networks, made)
    return made


def _network(
    checkpoint: Any, cls: Any, name: str, config: Any, settings: TrainSettings, mesh: Any, progress: bool
) -> Network:
    """A network to train: float32, computing in the settings' dtype, from the checkpoint or from random weights."""
    options = {"dtype": jnp.dtype(settings.dtype), "param_dtype": jnp.float32}
    if settings.random_start:
        return initial_network(cls, config, settings.seed, **options)
    network = abstract_network(cls, config, **options)
    return load_networks(checkpoint, {name: network}, mesh, progress)[name]


def _judge(settings: TrainSettings, mesh: Any, progress: bool) -> tuple[Network | None, Any]:
    """The image encoder of the autoencoder's perceptual loss, and its weights; None without one."""
    source = settings.autoencoder.perceptual_model
    if source is None:
        return None, {}
    with open_checkpoint(source) as checkpoint:
        config = getattr(checkpoint.config, "image_encoder", None)
        if config is None:
            raise ValueError(f"autoencoder.perceptual_model: {source} has no image encoder")
        network = abstract_network(VisionEncoder, config, jnp.dtype(settings.dtype))
        return network, load_networks(checkpoint, {"image_encoder": network}, mesh, progress)["image_encoder"].params


TASKS: dict[Task, Callable[[TrainSettings, bool], Path]] = {
    "denoise": denoise,
    "lora": lora,
    "controlnet": controlnet,
    "textual-inversion": textual_inversion,
    "autoencoder": autoencoder,
    "tiny-autoencoder": tiny_autoencoder,
    "clip": clip,
}
