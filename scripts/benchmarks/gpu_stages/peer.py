"""The same UNet in diffusers, eager and compiled by torch, and torch's attention at the same shapes."""

import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

from gpu_stages.run import Add, Row, Run, add_each, times, unet_settings

# (latents, rows, how): what the bounds need comes early.
CASES = (
    *((64, rows, "eager") for rows in (2, 16)),
    *((64, rows, "compiled") for rows in (16, 2)),
    (64, 2, "reduce-overhead"),
    *((96, rows, "eager") for rows in (2, 16)),
    (64, 64, "eager"),
)
COMPILING = 70.0  # seconds that have to be left for it at full size
CONTEXT, LABELS = (77, 1024), 2048


def measure(run: Run, add: Add) -> None:
    if importlib.util.find_spec("torch") is None:
        add({"what": "torch", "left_out": "torch is not installed"})
        return
    for measured in attention_rows(run):
        add(measured)
    if importlib.util.find_spec("diffusers") is None:
        add({"what": "UNet", "left_out": "diffusers is not installed"})
        return
    unet = make_unet(run)
    cases = [
        (
            {"what": f"UNet, {how}", "latents": latents, "rows": rows},
            functools.partial(unet_times, run, unet, run.scaled(latents), rows, how),
            COMPILING if how != "eager" and run.full_size else 0.0,
        )
        for latents, rows, how in CASES
    ]
    add_each(run, add, cases)


def device_and_wait() -> tuple[str, Callable[[], Any]]:
    import torch

    on_gpu = torch.cuda.is_available()
    return ("cuda", torch.cuda.synchronize) if on_gpu else ("cpu", lambda: None)


def attention_rows(run: Run) -> list[Row]:
    """Self-attention of the UNet's three levels that have it, for a guided batch of 8."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    (device, wait), made = device_and_wait(), []
    for level in range(3):
        tokens, heads = (run.scaled(64) >> level) ** 2, max(run.width // 64, 1) << level
        q, k, v = torch.randn(3, 16, heads, tokens, 64, device=device, dtype=getattr(torch, run.dtype))

        def attend(q: Any = q, k: Any = k, v: Any = v) -> None:
            for _ in range(run.calls):
                scaled_dot_product_attention(q, k, v)
            wait()

        ms = times({"sdpa": attend}, run.rounds, run.calls)["sdpa"]
        speed = 4 * 16 * heads * tokens**2 * 64 / ms["ms"] / 1e9
        made.append({"what": f"attention, {tokens} tokens, {heads} heads", "rows": 16, **ms, "tflop_per_s": speed})
    return made


def make_unet(run: Run) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    device, _ = device_and_wait()
    unet = UNet2DConditionModel.from_config(unet_settings(run)).eval()
    return unet.to(device, getattr(torch, run.dtype), memory_format=torch.channels_last)


def unet_times(run: Run, unet: Any, latents: int, rows: int, how: str) -> Row:
    """Milliseconds of a call without gradients, seconds until the first was done, and its peak of memory on a GPU."""
    import torch

    device, wait = device_and_wait()

    def draw(*shape: int) -> Any:
        return torch.randn(rows, *shape, device=device, dtype=getattr(torch, run.dtype))

    x = draw(4, latents, latents).to(memory_format=torch.channels_last)
    timesteps, context, labels = torch.full((rows,), 501, device=device), draw(*CONTEXT), draw(LABELS)
    call = unet
    if how != "eager":
        torch._dynamo.reset()
        call = torch.compile(unet, mode=None if how == "compiled" else how)

    def step(calls: int = run.calls) -> None:
        for _ in range(calls):
            call(x, timesteps, encoder_hidden_states=context, class_labels=labels, return_dict=False)
        wait()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        started = time.time()
        step(1)
        first = time.time() - started
        figures = times({how: step}, run.rounds, run.calls)[how]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {"first_s": first, **figures, "peak_gib": peak}
