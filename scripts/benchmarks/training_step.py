"""A training step of a UNet in both libraries: AdamW on the mean squared error, of all weights or of an adapter."""

import time
from typing import Any

import numpy as np

from random_networks import read_unet
from turns import Step, compiled_facts, torch_facts

RATE = 1e-4


def training_data(batch: int, size: int, context: tuple[int, int], labels: int) -> dict[str, np.ndarray]:
    """Random latents x and targets y (batch, size, size, 4), timesteps t, text states and class labels."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((batch, *shape), np.float32)

    x, y, timesteps = draw(size, size, 4), draw(size, size, 4), rng.integers(0, 1000, batch)
    return {"x": x, "y": y, "t": timesteps, "context": draw(*context), "labels": draw(labels)}


def unclip_jax_training(
    folder: str, data: dict[str, np.ndarray], dtype: str, rank: int | None
) -> tuple[Step, dict[str, Any]]:
    """One step in ours. rank: of an adapter, trained with the activations recomputed; None: all weights are."""
    import jax
    import jax.numpy as jnp

    from unclip_jax.compilation import compiler_options
    from unclip_jax.distributed.mesh import batch_sharding, local_mesh, replicated
    from unclip_jax.training.lora import initial_lora, merge_lora
    from unclip_jax.training.optimizer import adamw
    from unclip_jax.training.step import start_training, train_step

    network = read_unet(folder, dtype=jnp.dtype(dtype), param_dtype=jnp.float32, remat=rank is not None)
    optimizer = adamw(RATE)
    trained = network.params if rank is None else initial_lora(network.params, rank, 0)
    frozen = {} if rank is None else network.params

    def move(frozen: Any, state: Any, batch: Any) -> Any:
        def losses(params: Any, batch: Any, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            weights = params if rank is None else merge_lora(frozen, params)
            made = network.merge(weights)(batch["x"], batch["t"], batch["context"], batch["labels"])
            return jnp.square(made.astype(jnp.float32) - batch["y"]).mean((1, 2, 3)), {}

        return train_step(losses, optimizer, state, batch)

    # The state is given away at every step, weights too: let nothing else hold them.
    mesh = local_mesh()
    begin = jax.jit(lambda p: start_training(p, optimizer, average=False), out_shardings=replicated(mesh))
    held = [begin(trained)]
    batch = jax.device_put(data, batch_sharding(mesh))
    frozen = jax.device_put(frozen, replicated(mesh))
    if rank is None:
        network = type(network)(network.graphdef, {})
    del trained
    started = time.perf_counter()
    options = compiler_options(mesh)
    jitted = jax.jit(move, donate_argnums=1, out_shardings=replicated(mesh), compiler_options=options)
    compiled = jitted.lower(frozen, held[0], batch).compile()

    def step() -> np.ndarray:
        held[0], metrics = compiled(frozen, held[0], batch)
        return np.asarray(metrics["loss"])

    return step, compiled_facts(compiled, started)


def diffusers_training(
    folder: str, data: dict[str, np.ndarray], dtype: str, rank: int | None
) -> tuple[Step, dict[str, Any]]:
    """The same step in diffusers and torch; the adapter is peft's."""
    import torch
    from diffusers import UNet2DConditionModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = UNet2DConditionModel.from_pretrained(folder).to(device).train()
    if rank is not None:
        from peft import LoraConfig

        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    channels_first = {**data, **{name: np.ascontiguousarray(np.moveaxis(data[name], -1, 1)) for name in "xy"}}
    x, y, timesteps, context, labels = (
        torch.from_numpy(channels_first[name]).to(device) for name in ("x", "y", "t", "context", "labels")
    )

    def step() -> np.ndarray:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            made = model(x, timesteps, encoder_hidden_states=context, class_labels=labels).sample
        loss = torch.square(made.float() - y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach().cpu().numpy()

    return step, torch_facts()
