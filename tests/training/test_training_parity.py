"""Training beside PyTorch's: twenty steps of AdamW, and what is exported read by diffusers, with the same result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.export.diffusers import save_diffusers
from convert.export.lora import save_lora
from convert.export.textual_inversion import save_textual_inversion
from unclip_jax.adapters.textual_inversion import EMBEDDING, with_placeholder
from unclip_jax.checkpoints.networks import Network
from unclip_jax.checkpoints.source import open_checkpoint
from unclip_jax.pipelines.unclip import UnCLIPPipeline
from unclip_jax.sampling.schedule import alphas_cumprod
from unclip_jax.training import diffusion_objective
from unclip_jax.training.diffusion_trainer import _schedule
from unclip_jax.training.lora import EVERYTHING, as_lora, initial_lora, merge_lora
from unclip_jax.training.optimizer import adamw, learning_rate
from unclip_jax.training.rng import draw_step, step_keys
from unclip_jax.training.step import start_training, train_step
from unclip_jax.training.textual_inversion import with_rows

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def both(small_model, tmp_path_factory):
    """A checkpoint of ours and the same as a diffusers folder."""
    folder = tmp_path_factory.mktemp("both") / "diffusers"
    with open_checkpoint(small_model) as checkpoint:
        save_diffusers(checkpoint, folder)
    return small_model, folder


def nhwc(x):
    return np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))


def test_twenty_steps_of_adamw(both):
    """Warm-up, clipping and weight decay among them; v-prediction, unCLIP's conditioning with its noise and drops."""
    import torch
    from diffusers import UNet2DConditionModel

    model, folder = both
    pipe = UnCLIPPipeline.from_pretrained(model)
    unet, config = pipe.networks["unet"], pipe.config
    rng = np.random.default_rng(0)
    encoded = {
        "moments": rng.standard_normal((6, 8, 8, 8)).astype(np.float32),
        "context": rng.standard_normal((6, 16, 32)).astype(np.float32),
        "image_embeds": rng.standard_normal((6, 16)).astype(np.float32),
    }
    table = alphas_cumprod(_schedule(config.scheduler_config), "diffusers")
    noising = {
        "alphas_cumprod": alphas_cumprod(config.image_noising, "diffusers"),
        "mean": np.zeros(16, np.float32),
        "std": np.ones(16, np.float32),
    }
    frozen = {"alphas_cumprod": table, "empty_context": np.zeros((1, 16, 32), np.float32), "noising": noising}
    options = diffusion_objective.DiffusionObjective("v_prediction", config.vae.scaling_factor, 0.25, 0.1)
    optimizer = adamw(learning_rate(1e-3, 5), weight_decay=0.01, max_grad_norm=1.0)

    @jax.jit
    def step(state):
        def losses(params, batch, number):
            return diffusion_objective.losses(options, unet, 3, frozen, params, batch, number)

        return train_step(losses, optimizer, state, encoded)

    state, ours = start_training(unet.params, optimizer, average=False), []
    for _ in range(20):
        state, report = step(state)
        ours.append(float(report["loss"]))

    theirs = UNet2DConditionModel.from_pretrained(folder / "unet").train()
    torch_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01)
    found = []
    for number in range(20):
        d = draw_step(step_keys(3, number, jnp.arange(6)), (8, 8, 4), 16, embedding_dropout=0.25, text_dropout=0.1)
        mean, logvar = np.split(encoded["moments"], 2, axis=-1)
        x0 = options.scaling_factor * (mean + np.exp(0.5 * logvar) * np.asarray(d.posterior_noise))
        share = table[np.asarray(d.timesteps)][:, None, None, None]
        noise = np.asarray(d.noise)
        noisy = np.sqrt(share) * x0 + np.sqrt(1 - share) * noise
        target = np.sqrt(share) * noise - np.sqrt(1 - share) * x0
        level = noising["alphas_cumprod"][np.asarray(d.levels)][:, None]
        noised = np.sqrt(level) * encoded["image_embeds"] + np.sqrt(1 - level) * np.asarray(d.embedding_noise)
        angles = np.asarray(d.levels)[:, None] * np.exp(-np.log(10000) * np.arange(8) / 8)
        labels = np.concatenate([noised, np.cos(angles), np.sin(angles)], -1) * np.asarray(d.keep_image)[:, None]
        context = encoded["context"] * np.asarray(d.keep_text)[:, None, None]
        for group in torch_optimizer.param_groups:
            group["lr"] = 1e-3 * min(number / 5, 1)
        out = theirs(
            torch.tensor(nhwc(noisy)),
            torch.tensor(np.asarray(d.timesteps)),
            torch.tensor(context),
            class_labels=torch.tensor(labels, dtype=torch.float32),
        ).sample
        loss = torch.square(out - torch.tensor(nhwc(target))).mean()
        torch_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch_optimizer.step()
        found.append(float(loss.detach()))
    np.testing.assert_allclose(ours, found, rtol=1e-4)
    trained = trained_tensors(both, state.params)
    moved = apart = 0.0
    start = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    for name, value in theirs.state_dict().items():
        moved += float(torch.square(value - start[name]).sum())
        apart += float(torch.square(value - torch.tensor(trained[name])).sum())
    # Of the way that they went: measured 1.2e-5, and the losses above 3e-6.
    assert (apart / moved) ** 0.5 < 1e-4, (apart / moved) ** 0.5
    whole = sum(float(torch.square(value).sum()) for value in start.values())
    assert (apart / whole) ** 0.5 < 1e-4  # of the weights


def trained_tensors(both, params):
    """Our UNet's parameters under diffusers' names."""
    from convert.engine import export_tensors
    from convert.rules import diffusers
    from unclip_jax.checkpoints.checkpoint import Parameter

    with open_checkpoint(both[0]) as checkpoint:
        new = {f"unet.{name}": Parameter.of(value) for name, value in params.items()}
        everything = {**checkpoint.params, **new}
        tensors = export_tensors(diffusers.table(checkpoint.config, everything).rules, everything)
        return {
            name.removeprefix("unet/"): np.ascontiguousarray(tensor.read())
            for name, tensor in tensors.items()
            if name.startswith("unet/")
        }


def test_an_exported_adapter_is_the_same_in_diffusers(both, tmp_path):
    """Of every linear layer and convolution there is; at full strength and at half."""
    import torch
    from diffusers import StableUnCLIPImg2ImgPipeline

    model, folder = both
    pipe = UnCLIPPipeline.from_pretrained(model)
    unet = pipe.networks["unet"]
    adapter = initial_lora(unet.params, 4, 0, EVERYTHING, alpha=8.0)
    rng = np.random.default_rng(1)
    adapter = {
        name: jnp.asarray(rng.standard_normal(value.shape) * 0.1, jnp.float32) if name.endswith(".up") else value
        for name, value in adapter.items()
    }
    save_lora(pipe.config, as_lora(adapter, "unet"), tmp_path)
    x = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    context = rng.standard_normal((2, 16, 32)).astype(np.float32)
    labels = rng.standard_normal((2, 32)).astype(np.float32)
    theirs = StableUnCLIPImg2ImgPipeline.from_pretrained(folder)

    def predict():
        with torch.no_grad():
            arguments = (torch.tensor(nhwc(x)), torch.tensor([5, 700]), torch.tensor(context))
            return np.moveaxis(theirs.unet(*arguments, class_labels=torch.tensor(labels)).sample.numpy(), 1, -1)

    base = predict()
    theirs.load_lora_weights(tmp_path, adapter_name="ours")
    assert len(theirs.get_list_adapters()["unet"]) == 1
    for scale in (1.0, 0.5):
        theirs.set_adapters(["ours"], [scale])
        merged = Network(unet.graphdef, merge_lora(unet.params, adapter, scale))
        ours = np.asarray(merged.merge()(x, jnp.array([5, 700]), context, labels))
        want = predict()
        assert np.linalg.norm(want - base) > 0.05 * np.linalg.norm(base)
        relative = np.linalg.norm(ours - want) / np.linalg.norm(want)
        assert relative < 1e-5, relative


def test_an_exported_word_is_the_same_in_diffusers(both, tmp_path):
    import torch
    from diffusers import StableUnCLIPImg2ImgPipeline

    model, folder = both
    rows = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    save_textual_inversion("<thing>", rows, tmp_path)
    pipe = UnCLIPPipeline.from_pretrained(model)
    tokenizer, ids = with_placeholder(pipe.tokenizer, "<thing>", 3)
    text = pipe.networks["text_encoder"]
    params = with_rows(text.params, jnp.asarray(rows))
    assert params[EMBEDDING].shape[0] == ids[-1] + 1
    tokens = tokenizer(["a <thing> <thing>_1 <thing>_2, red"])
    ours = np.asarray(text.merge(params)(tokens))

    theirs = StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    theirs.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    prompt = theirs.maybe_convert_prompt("a <thing>, red", theirs.tokenizer)
    padded = theirs.tokenizer(prompt, padding="max_length", max_length=16, return_tensors="pt").input_ids
    np.testing.assert_array_equal(padded.numpy(), tokens)
    with torch.no_grad():
        want = theirs.text_encoder(padded)[0].numpy()
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-5)
